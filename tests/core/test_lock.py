"""Lock files: written from a config, checked by the command, by `use(strict=…)` and by KERNELRY_STRICT."""

import contextlib
import dataclasses
import json

import importlib_metadata
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import kernelry
from kernelry import Request, masks
from kernelry.cli import lock as verb
from kernelry.cli.output import console
from kernelry.config import load_config
from kernelry.errors import ArgumentError, ConfigError
from kernelry.policy.lock import Lock
from kernelry.policy.policy import Switches
from kernelry.registry import discovery, installed

app = typer.Typer()
app.command()(verb.lock)
OPTIONS = ["--target", "cpu", "--q-len", "64", "--max-len", "96", "--heads", "2", "--head-dim", "32"]
REQUEST = Request(q_len=64)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Keeps the lines of these tests whole; tests/core/test_cli_output.py is about narrow terminals."""
    monkeypatch.setattr(console, "_width", 2000)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[[attention.rules]]\nuse = ['dot_product']\n")
    return path


def _run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def _write(config):
    file = config.parent / "kernelry.lock.json"
    assert _run(config, *OPTIONS, "--file", file).exit_code == 0
    return file


def _locked(tmp_path, *requests, kernel="auto"):
    file = tmp_path / "some.lock.json"
    Lock.of(kernelry.explain(request, kernel=kernel) for request in requests).write(file)
    return file


def test_the_verb_writes_the_three_phases(config):
    data = json.loads(_write(config).read_text())
    assert sorted(entry["request"]["mode"] for entry in data["resolutions"]) == ["decode", "prefill", "train"]
    assert {entry["kernel"] for entry in data["resolutions"]} == {"dot_product"}
    assert all("c.toml:1: rule 1" in entry["rule"] for entry in data["resolutions"])
    assert data["versions"]["kernelry"] == kernelry.__version__


def test_the_same_config_writes_the_same_bytes(config):
    first = _write(config).read_bytes()
    kernelry.resolution.resolver.clear_cache()
    assert _write(config).read_bytes() == first


def test_the_order_of_resolutions_does_not_matter():
    found = [kernelry.explain(Request(q_len=length)) for length in (3, 1, 2)]
    assert Lock.of(found).to_json() == Lock.of(reversed(found)).to_json()


def test_a_lock_is_read_back(config):
    file = _write(config)
    assert Lock.read(file).to_json() == json.loads(file.read_text())


def test_check_passes_what_stands(config):
    done = _run(config, "--check", "--file", _write(config))
    assert (done.exit_code, done.output) == (0, "3 resolutions are unchanged.\n")


def test_check_passes_a_lock_written_before_a_field_was_added(config):
    file = _write(config)
    data = json.loads(file.read_text())
    for entry in data["resolutions"]:
        assert entry["request"].pop("bias_after_cap") is False
    file.write_text(json.dumps(data))
    done = _run(config, "--check", "--file", file)
    assert (done.exit_code, done.output) == (0, "3 resolutions are unchanged.\n")


def test_check_prints_what_changed_and_fails(config):
    file = _write(config)
    training = "[[attention.rules]]\nwhen = { mode = 'train' }\nuse = ['blockwise']\n"
    config.write_text(training + config.read_text())
    done = _run(config, "--check", "--json", "--file", file)
    assert done.exit_code == 1
    [text] = json.loads(done.output)["differences"]
    assert "says dot_product (by " in text
    assert "now it would get blockwise" in text


def test_strict_allows_what_is_locked(tmp_path):
    with kernelry.use(strict=_locked(tmp_path, REQUEST)):
        assert kernelry.resolve(REQUEST).kernel == "dot_product"


@pytest.mark.parametrize("change", [{"kernel": "blockwise"}, {"tiling": {"block_q": 32}}])
def test_strict_refuses_another_kernel_or_tiling(tmp_path, change):
    file = _locked(tmp_path, REQUEST, kernel="dot_product" if "kernel" in change else "blockwise")
    kernel = "auto" if "kernel" in change else "blockwise"
    with (
        kernelry.use(strict=file),
        kernelry.use(**change),
        pytest.raises(ConfigError, match=r"strict mode: .* says .*, now it would get blockwise.*Run kernelry lock"),
    ):
        kernelry.resolve(REQUEST, kernel=kernel)


def test_strict_refuses_other_adapters(tmp_path):
    file = _locked(tmp_path, REQUEST)
    lock = Lock.read(file)
    entry = dataclasses.replace(lock.entries[0], adapters=("pad_head_dim",))
    with (
        kernelry.use(strict=Lock((entry,))),
        pytest.raises(ConfigError, match="says dot_product through pad_head_dim"),
    ):
        kernelry.resolve(REQUEST)


def test_strict_refuses_what_is_not_locked(tmp_path):
    with (
        kernelry.use(strict=_locked(tmp_path, REQUEST)),
        pytest.raises(ConfigError, match=r"is not in .*some\.lock\.json; it would get dot_product"),
    ):
        kernelry.resolve(Request(q_len=65))


def test_explain_answers_in_strict_mode(tmp_path):
    with kernelry.use(strict=_locked(tmp_path, REQUEST)):
        assert kernelry.explain(Request(q_len=65)).kernel == "dot_product"


@pytest.mark.parametrize(("strict", "refused"), [("1", True), ("0", False), ("", False)])
def test_the_environment_puts_a_lock_in_force(tmp_path, monkeypatch, strict, refused):
    switches = Switches.parse({"KERNELRY_STRICT": strict, "KERNELRY_LOCK": str(_locked(tmp_path, REQUEST))})
    monkeypatch.setattr(Switches, "of_process", staticmethod(lambda: switches))
    kernelry.resolve(REQUEST)
    with pytest.raises(ConfigError, match="strict mode") if refused else contextlib.nullcontext():
        kernelry.resolve(Request(q_len=65))


def test_a_strict_process_refuses_what_is_not_locked(shelf, tmp_path):
    file = _locked(tmp_path, REQUEST)
    done = shelf.run(
        """
        import kernelry
        try:
            kernelry.resolve(kernelry.Request(q_len=65))
        except kernelry.errors.ConfigError as error:
            print(error)
        """,
        KERNELRY_STRICT="yes",
        KERNELRY_LOCK=str(file),
    )
    assert "strict mode: " in done.stdout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a lock file of format 1"),
        ('{"format": 2}', "not a lock file of format 1"),
        ('{"format": 1}', "cannot be read: KeyError"),
        ('{"format": 1, "resolutions": [{"request": {"q_len": 1}}]}', "cannot be read: KeyError"),
        (
            '{"format": 1, "resolutions": [{"request": {"x": 1}, "tiling": {}, "adapters": []}]}',
            "unknown field 'x'",
        ),
    ],
)
def test_files_that_are_no_locks_say_so(tmp_path, text, complaint):
    path = tmp_path / "x.lock.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        Lock.read(path)


def test_an_absent_lock_file_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match="run kernelry lock"), kernelry.use(strict=tmp_path / "absent.json"):
        pass


def test_a_locked_config_stands_in_strict_mode(config):
    policy = load_config(config).policy
    lock = Lock.read(_write(config))
    with kernelry.use(strict=lock):
        assert [kernelry.resolve(entry.request, policy=policy).kernel for entry in lock.entries] == ["dot_product"] * 3


LAYER = "[attention]\ntype = 'local_sliding'\nwindow = 8\nkernel = 'dot_product'\n"
SMALL = ["--target", "cpu", "--q-len", "16", "--heads", "2", "--head-dim", "32", "--dtype", "float32"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "global.toml").write_text("[attention]\nkernel = 'dot_product'\n")
    (tmp_path / "local.toml").write_text(LAYER)
    return tmp_path


def _entries():
    return Lock.read("kernelry.lock.json").entries


def _check(config):
    done = _run(config, "--check")
    return done.exit_code, done.output


def test_a_second_config_is_added(folder):
    assert _run("global.toml", *SMALL).exit_code == 0
    done = _run("local.toml", *SMALL, "-o", "kernelry.lock.json")
    assert done.exit_code == 0
    assert "3 other resolutions of kernelry.lock.json were kept." in done.output
    assert len(_entries()) == 6
    assert _check("global.toml") == (
        0,
        "3 resolutions are unchanged.\nnot checked: what local.toml asked for; pass it with --check.\n",
    )


def test_other_sizes_are_added(folder):
    assert _run("global.toml", *SMALL, "--batch", "1", "--batch", "4").exit_code == 0
    assert _run("global.toml", *SMALL, "--batch", "8", "--cache", "paged:4:int8").exit_code == 0
    assert {entry.request.batch for entry in _entries()} == {1, 4, 8}
    assert {entry.request.page_size for entry in _entries()} == {None, 4}
    code, output = _check("global.toml")
    assert (code, output) == (0, f"{len(_entries())} resolutions are unchanged.\n")


def test_what_a_config_no_longer_asks_is_stale_until_it_is_locked_again(folder):
    for config in ("global.toml", "local.toml"):
        _run(config, *SMALL)
    (folder / "local.toml").write_text(LAYER.replace("8", "4") + "soft_cap = 30.0\n")
    code, output = _check("local.toml")
    assert code == 1
    wanted = "local.toml no longer asks for this, but for mask=window(3, 0) instead of window(7, 0), soft_cap=30.0"
    assert wanted in output
    assert output.count("run kernelry lock again") == 3
    assert "is not in" not in output
    assert _run("local.toml", *SMALL).exit_code == 0
    assert len(_entries()) == 6
    assert _check("local.toml")[0] == 0


def test_a_config_that_was_not_locked_does_not_pass(folder):
    _run("global.toml", *SMALL)
    code, output = _check("local.toml")
    assert code == 1
    assert "has nothing that local.toml asked for; run kernelry lock local.toml" in output


def test_configs_that_decide_differently_for_one_request_are_an_error(folder):
    _run("global.toml", *SMALL)
    (folder / "other.toml").write_text("[attention]\nkernel = 'blockwise'\n")
    done = _run("other.toml", *SMALL)
    assert isinstance(done.exception, ConfigError)
    assert "global.toml got dot_product, and other.toml gets blockwise" in str(done.exception)
    assert "Strict mode allows one of them" in str(done.exception)
    assert {entry.kernel for entry in _entries()} == {"dot_product"}


def test_packed_training_passes_in_strict_mode_once_it_is_locked(folder):
    _run("global.toml", *SMALL)
    query = jax.ShapeDtypeStruct((1, 16, 2, 32), jnp.float32)
    mask = masks.Causal() & masks.Segments(np.zeros(16, np.int32))
    policy = load_config("global.toml").policy

    def loss(query):
        return kernelry.attention(query, query, query, mask=mask).sum()

    with (
        kernelry.use(strict="kernelry.lock.json", policy=policy),
        pytest.raises(ConfigError, match=r"the nearest one there has mask=causal instead of causal & segments\. Run"),
    ):
        jax.eval_shape(jax.grad(loss), query)
    assert _run("global.toml", *SMALL, "--mask", "segments").exit_code == 0
    with kernelry.use(strict="kernelry.lock.json", policy=policy):
        jax.eval_shape(jax.grad(loss), query)


def test_what_was_recorded_is_merged_into_a_lock_file(folder):
    _run("global.toml", *SMALL)
    with kernelry.record() as made:
        kernelry.resolve(REQUEST)
    written = Lock.of(made).write("kernelry.lock.json", merge=True)
    assert Lock.read("kernelry.lock.json").to_json() == written.to_json()
    assert len(written.entries) == 4
    with kernelry.use(strict="kernelry.lock.json"):
        kernelry.resolve(REQUEST)
    assert Lock.of(made).write("kernelry.lock.json").entries == Lock.of(made).entries


def test_locks_without_origins_are_read(folder):
    _run("global.toml", *SMALL)
    data = json.loads((folder / "kernelry.lock.json").read_text())
    for entry in data["resolutions"]:
        del entry["origins"]
    (folder / "kernelry.lock.json").write_text(json.dumps(data))
    code, output = _check("local.toml")
    assert code == 1
    assert "has nothing that local.toml asked for; run kernelry lock local.toml" in output
    assert "not checked: what a program recorded, without a config (3).\n" in output


def test_what_was_recorded_under_other_rules_is_not_compared(folder):
    _run("global.toml", *SMALL)
    with kernelry.record() as made, kernelry.use(kernel="blockwise"):
        kernelry.resolve(REQUEST)
    Lock.of(made).write("kernelry.lock.json", merge=True)
    assert _check("global.toml") == (
        0,
        "3 resolutions are unchanged.\nnot checked: what a program recorded, without a config (1).\n",
    )


def test_check_refuses_the_options_that_it_does_not_read(folder):
    _run("global.toml", *SMALL)
    done = _run("global.toml", "--check", "--batch", "16", "--cache", "rolling")
    assert done.exit_code == 2
    assert "does not read --batch, --cache: leave it out" in " ".join(done.output.replace("│", " ").split())


MAXTEXT = "attention: dot_product\nattention_type: global\nattn_logits_soft_cap: 0\n"


def test_maxtext_files_are_locked_and_checked(folder):
    (folder / "base.yml").write_text(MAXTEXT)
    (folder / "model.yml").write_text("attention_type: local_sliding\nsliding_window_size: 8\n")
    files = ["--maxtext", "base.yml", "--maxtext", "model.yml"]
    assert _run(*files, *SMALL).exit_code == 0
    assert {entry.origins[0].config for entry in _entries()} == {"base.yml + model.yml"}
    assert all("window(7, 0)" in str(entry.request.mask) for entry in _entries())
    assert _run(*files, "--check").exit_code == 0
    (folder / "model.yml").write_text("sliding_window_size: 8\n")
    assert _run(*files, "--check").exit_code == 1
    done = _run("--maxtext", "base.yml", "--check")
    assert "has nothing that base.yml asked for; run kernelry lock --maxtext base.yml\n" in done.output


def test_json_says_what_was_not_checked(folder):
    for config in ("global.toml", "local.toml"):
        _run(config, *SMALL)
    data = json.loads(_run("local.toml", "--check", "--json").output)
    left = {"not_checked": ["global.toml"], "not_checked_recorded": 0}
    assert data == {"file": "kernelry.lock.json", "checked": 3, "differences": [], "advice": [], **left}


@pytest.fixture
def without_plain_kernels(monkeypatch):
    points = importlib_metadata.entry_points(group=discovery.GROUP)

    def leave_out():
        found = discovery.build(points, ("cudnn_te",))
        monkeypatch.setattr(installed, "registry", lambda: found)
        kernelry.resolution.resolver.clear_cache()

    yield leave_out
    monkeypatch.undo()
    kernelry.resolution.resolver.clear_cache()


ADVICE = "which would serve every mask and option: add dot_product to KERNELRY_PLUGINS, or unset it.\n"


def test_what_no_kernel_serves_is_not_written_and_status_1(folder, without_plain_kernels):
    without_plain_kernels()
    (folder / "auto.toml").write_text("[attention]\n")
    done = _run("auto.toml", *SMALL)
    assert done.exit_code == 1
    assert done.output.count(": no kernel; not written to kernelry.lock.json\n") == 3
    assert done.output.count(ADVICE) == 1
    assert not (folder / "kernelry.lock.json").exists()
    data = json.loads(_run("auto.toml", *SMALL, "--target", "gpu:h100", "--dtype", "bfloat16", "--json").output)
    assert {entry["request"]["mode"] for entry in data["resolutions"]} == {"prefill", "train"}
    assert [text.split()[1] for text in data["unserved"]] == [
        "mode=train",
        "mode=prefill",
        "mode=decode",
        "mode=decode",
    ]
    assert all(advice.startswith("No plain kernel is available") for advice in data["advice"])
    assert {entry.kernel for entry in _entries()} == {"cudnn_jax"}


def test_what_no_kernel_serves_any_more_leaves_the_file(folder, without_plain_kernels):
    (folder / "auto.toml").write_text("[attention]\n")
    _run("auto.toml", *SMALL)
    _run("local.toml", *SMALL)
    without_plain_kernels()
    code, output = _check("auto.toml")
    assert (code, output.count(": no kernel serves it (cudnn_jax: "), output.count(ADVICE)) == (1, 3, 1)
    assert _run("auto.toml", *SMALL).exit_code == 1
    assert {origin.config for entry in _entries() for origin in entry.origins} == {"local.toml"}
    assert "has nothing that auto.toml asked for" in _check("auto.toml")[1]
    unserved = kernelry.explain(REQUEST)
    assert Lock.of([unserved]).write("kernelry.lock.json", merge=True).entries == _entries()


def test_options_left_out_of_maxtext_files_are_a_part_of_what_was_locked(folder):
    (folder / "base.yml").write_text(f"{MAXTEXT}quantize_kvcache: true\n")
    ignoring = ("--maxtext", "base.yml", "--ignore", "quantize_kvcache")
    assert _run(*ignoring, *SMALL).exit_code == 0
    assert {entry.origins[0].config for entry in _entries()} == {"base.yml --ignore quantize_kvcache"}
    done = _run(*ignoring, "--check")
    assert (done.exit_code, done.output) == (0, "3 resolutions are unchanged.\n")
    (folder / "base.yml").write_text(MAXTEXT)
    done = _run("--maxtext", "base.yml", "--check")
    assert done.exit_code == 1
    assert "not checked: what base.yml --ignore quantize_kvcache asked for; pass it with --check." in done.output
    (folder / "kernelry.lock.json").write_text('{"format": 1, "resolutions": []}')
    assert f"run kernelry lock {' '.join(ignoring)}\n" in _run(*ignoring, "--check").output


def test_a_lock_that_cannot_be_written_says_why(folder):
    with pytest.raises(ConfigError, match=r"cannot write the lock file absent/x\.json: No such file"):
        Lock(()).write("absent/x.json")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch", "8", "batch must be an integer from 1 to 2147483647, got '8'; run kernelry lock again."),
        ("q_len", None, "q_len must be an integer from 1 to 2147483647, got None; run kernelry lock again."),
        ("batch", [1], "facts must be numbers and names"),
        ("target", 3, "a target is a name such as 'gpu:h100', got 3; run kernelry lock again."),
        ("depth", 3, "unexpected keyword argument 'depth'; run kernelry lock again."),
    ],
)
def test_facts_of_a_lock_file_that_mean_nothing_say_so(config, name, value, words):
    file = _write(config)
    data = json.loads(file.read_text())
    for entry in data["resolutions"]:
        entry["origins"][0]["facts"][name] = value
    file.write_text(json.dumps(data))
    done = _run(config, "--check", "--file", file)
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)


@pytest.mark.parametrize(("option", "value"), [("--q-len", 10**10), ("--batch", 10**20 - 1)])
def test_sizes_that_nothing_has_are_refused(config, option, value):
    done = _run(config, "--file", config.parent / "x.json", option, value)
    assert isinstance(done.exception, ArgumentError)
    assert f"got {value}." in str(done.exception)
