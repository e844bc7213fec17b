"""The command: readable tables, JSON, exit statuses, one-line errors."""

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

from kernelry import ModelShape, Request, Target, cli
from kernelry.cli import report, speeds
from kernelry.config import load_config
from kernelry.phases.calls import calls
from kernelry.plugin import Refusal, RefusalCode
from kernelry.policy.lock import Lock
from kernelry.policy.policy import Policy, Switches
from kernelry.registry import contents, discovery, installed

pytestmark = pytest.mark.versions


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernelry", *arguments])
        status = cli.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def test_list_names_every_kernel(run):
    status, out, _ = run("list")
    assert status == 0
    assert "dot_product" in out
    assert "blockwise" in out


def test_list_as_json(run):
    status, out, _ = run("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)["kernels"]}
    assert status == 0
    assert "causal" in rows["dot_product"]["atoms"]
    assert rows["dot_product"]["distribution"].startswith("kernelry-dot-product ")
    assert {"kv_quantizations", "pages", "context_parallel"} <= rows["dot_product"].keys()
    assert (rows["dot_product"]["manual_axes"], rows["dot_product"]["partitioned_by_xla"]) == ("checked", True)
    assert (rows["splash"]["manual_axes"], rows["splash"]["partitioned_by_xla"]) == ("unchecked", False)


def test_list_shows_how_a_kernel_reads_keys_and_runs_on_several_devices():
    shown = {"summary": "", "gradient": "none", "kv_quantizations": ["int8:head_dim"], "pages": True}
    shown |= {"kv_layouts": ["interleaved", "separate"], "context_parallel": ["ring"], "manual_axes": "checked"}
    shown |= {"partitioned_by_xla": True, "reservations": ["new"]}
    lists = dict.fromkeys(("platforms", "modes", "dtypes", "atoms", "features", "statistics"), ())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report._serves({**lists, **shown}))
    text = " ".join(console.export_text().split())
    assert "keys stored as int8:head_dim pages interleaved separate" in text
    assert "across devices by ring" in text
    assert "Auto axes partitioned by XLA manual axes checked" in text
    assert "only if named new" in text


FIRST = (Refusal(RefusalCode.EXPERIMENTAL, "first release"),)


@pytest.mark.parametrize(
    ("reservations", "told"),
    [
        (lambda _: FIRST, ["first release"]),
        (lambda request: FIRST * request.partial, ["for some requests; kernelry explain says why"]),
        (
            lambda _: 1 / 0,
            ["its reservations raised ZeroDivisionError('division by zero'); report it to the kernel's authors"],
        ),
    ],
)
def test_list_says_which_kernels_are_chosen_only_if_they_are_named(run, monkeypatch, reservations, told):
    kernel = installed.registry().kernels["dot_product"]
    changed = dataclasses.replace(kernel, spec=dataclasses.replace(kernel.spec, reservations=reservations))
    found = dataclasses.replace(installed.registry(), kernels={"dot_product": changed})
    monkeypatch.setattr(installed, "registry", lambda: found)
    [row] = json.loads(run("list", "--json")[1])["kernels"]
    assert row["reservations"] == told


MLA = ("--kv-heads", "1", "--head-dim", "576", "--value-dim", "512", "--kv-layout", "value_in_key")


def test_values_stored_with_the_keys_are_asked_for(run):
    step = ("explain", "--target", "cpu", "--mode", "decode", "--q-len", "1", "--kv-len", "4096", *MLA)
    status, out, _ = run(*step, "--page-size", "16", "--kv-quantization", "int8", "--kernel", "dot_product")
    assert status == 0
    assert "kv_layout=value_in_key" in out
    assert "through separate_kv" in out
    assert json.loads(run(*step, "--json")[1])["request"]["kv_layout"] == "value_in_key"
    status, _, err = run(*step[:-1], "interleaved")
    assert (status, "kv_layout=interleaved needs page_size" in " ".join(err.split())) == (2, True)


def test_doctor_reports_versions_and_no_faults(run):
    status, out, _ = run("doctor")
    assert status == 0
    assert "No faults." in out
    data = json.loads(run("doctor", "--json")[1])
    assert data["faults"] == []
    assert {"kernelry", "python", "jax", "contract"} <= set(data["versions"])


@pytest.mark.parametrize(
    ("switches", "variable", "words"),
    [
        (Switches(kernel="blokwise", measurements=""), "KERNELRY_KERNEL", "did you mean 'blockwise'?"),
        (Switches(unknown=("KERNELRY_KERNAL",), measurements=""), "KERNELRY_KERNAL", "did you mean 'KERNELRY_KERNEL'?"),
        (
            Switches(strict=True, lock="absent.json", measurements=""),
            "KERNELRY_LOCK",
            "cannot read the lock file absent.json: No such",
        ),
        (Switches(strict=True, lock=__file__, measurements=""), "KERNELRY_LOCK", "test_cli.py is not valid JSON: "),
    ],
)
def test_doctor_reports_environment_variables_that_mean_nothing(run, monkeypatch, switches, variable, words):
    monkeypatch.setattr(Switches, "unchecked", lambda: switches)
    status, out, _ = run("doctor")
    [fault] = json.loads(run("doctor", "--json")[1])["faults"]
    assert status == 1
    assert "No faults." not in out
    assert (fault["plugin"], fault["kind"]) == (variable, "wrong environment variable")
    assert words in fault["detail"]
    assert variable in fault["fix"] or "kernelry list" in fault["fix"]


def test_doctor_and_list_answer_where_a_variable_is_wrong(run, monkeypatch):
    variables = {"KERNELRY_STRICT": "maybe", "KERNELRY_MEASUREMENTS": ""}
    monkeypatch.setattr("kernelry.policy.policy._of_process", lambda: Switches._read(variables))
    status, out, _ = run("doctor")
    [fault] = json.loads(run("doctor", "--json")[1])["faults"]
    assert status == 1
    assert "Plugins" in out
    assert fault["detail"] == "KERNELRY_STRICT='maybe' is neither yes nor no"
    assert fault["fix"].startswith("write one of 1, true, ")
    assert run("explain")[0] == 2
    monkeypatch.setattr(installed, "registry", discovery.find)
    assert run("list")[0] == 0


def test_doctor_says_nothing_of_variables_that_are_right(run, monkeypatch, tmp_path):
    lock = tmp_path / "kernelry.lock.json"
    Lock(()).write(lock)
    switches = Switches(kernel="blockwise", strict=True, lock=str(lock), measurements="")
    monkeypatch.setattr(Switches, "unchecked", lambda: switches)
    status, out, _ = run("doctor")
    assert (status, "No faults." in out) == (0, True)


def test_explain_answers_for_hardware_that_is_not_here(run):
    status, out, _ = run("explain", "--target", "gpu:h100", "--mode", "train", "--q-len", "8192", "--json")
    data = json.loads(out)
    assert status == 0
    assert data["request"]["target"] == "gpu:h100"
    assert data["request"]["q_len"] == 8192
    assert data["plan"]["kernel"]


def test_explain_takes_how_keys_are_held(run):
    options = ("--mode", "decode", "--q-len", "1", "--kv-len", "64", "--heads", "4")
    status, out, _ = run("explain", *options, "--kv-quantization", "int4", "--page-size", "16", "--json")
    request = json.loads(out)["request"]
    assert (status, request["kv_quantization"], request["page_size"]) == (0, "int4:head_dim", 16)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ((), "causal at query=traced"),
        (("--mask", "window(3) & segments"), "segments & window(3, 0) at query=traced"),
        (("--mask", "causal.at(query_offset=63)"), "causal at query=63"),
        (("--mask", "lengths"), "lengths"),
    ],
)
def test_explain_puts_a_mask_anywhere_in_more_keys(run, options, mask):
    out = run("explain", "--target", "cpu", "--mode", "decode", "--q-len", "1", "--kv-len", "64", "--json", *options)[1]
    assert str(Request.from_json(json.loads(out)["request"]).mask) == mask


def test_explain_of_pages_that_do_not_make_up_the_keys_says_so(run):
    status, _, error = run("explain", "--kv-len", "40", "--page-size", "16")
    assert status == 2
    assert "page_size must be a positive integer that divides kv_len=40, got 16" in error


def test_explain_prints_the_choice_and_the_rule(run):
    status, out, _ = run("explain", "--target", "cpu", "--mask", "window(63)", "--q-len", "1024")
    assert status == 0
    assert "→" in out
    assert "shipped policy" in out


CONFIG = """
[attention]
type = "local_sliding"
window = 64
soft_cap = 30.0
scale = 0.5
sinks = true
record_max_logits = true
dropout_rate = 0.25
precision = "highest"
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG)
    return tmp_path


def test_explain_asks_what_the_config_says(run, config):
    data = json.loads(run("explain", "--target", "cpu", "--config", "c.toml", "--json")[1])
    facts = {"soft_cap": 30.0, "scale": 0.5, "sinks": True, "max_logits": True, "dropout_rate": 0.25}
    assert facts.items() <= data["request"].items()
    assert data["config"]["fields"]["mask"] == "window(63, 0)"
    assert data["config"]["fields"]["precision"] == data["request"]["precision"] == "highest"


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_explain_asks_what_is_locked(run, config, mode):
    read = load_config("c.toml")
    shape = ModelShape(q_len=64, max_len=96, batch=2, q_heads=4, head_dim=32)
    [wanted] = [c.request for c in calls(read, shape, Target("cpu")) if c.request.mode.value == mode]
    lengths = ("--q-len", "1", "--kv-len", "96") if mode == "decode" else ("--q-len", "64")
    options = ("--target", "cpu", "--mode", mode, "--batch", "2", "--heads", "4", "--head-dim", "32")
    out = run("explain", *options, *lengths, "--config", "c.toml", "--json")[1]
    assert Request.from_json(json.loads(out)["request"]) == wanted


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("layer", ["type = 'global'", "type = 'local_sliding'\nwindow = 8", "type = 'full'"])
def test_explain_of_pages_asks_what_is_locked(run, config, mode, layer):
    (config / "c.toml").write_text(f"[attention]\n{layer}\nrecord_max_logits = true\n")
    shape = ModelShape(q_len=1 if mode == "decode" else 64, max_len=96, q_heads=4, head_dim=32, cache="paged:16:int8")
    wanted = [call.request for call in calls(load_config("c.toml"), shape, Target("cpu"))]
    sizes = ("--q-len", str(shape.q_len), "--kv-len", "96", "--heads", "4", "--head-dim", "32")
    options = (
        "--target",
        "cpu",
        "--mode",
        mode,
        "--page-size",
        "16",
        "--kv-quantization",
        "int8",
        "--config",
        "c.toml",
    )
    found = Request.from_json(json.loads(run("explain", *options, *sizes, "--json")[1])["request"])
    assert found in wanted
    assert found.page_size == 16


def test_explain_of_pages_refuses_what_lock_refuses(run, config):
    (config / "c.toml").write_text("[attention]\nmoba = {chunk_size = 4, top_k = 2}\n")
    status, _, err = run("explain", "--target", "cpu", "--page-size", "16", "--config", "c.toml")
    assert (status, "cache 'paged:16' with moba: blocks are chosen among the keys of one array" in err) == (2, True)


def test_options_given_go_before_the_config(run, config):
    options = ("--soft-cap", "20", "--no-sinks", "--mask", "config & segments")
    _, out, _ = run("explain", "--target", "cpu", "--config", "c.toml", *options)
    text = " ".join(out.split())
    assert "mask=segments & window(63, 0) soft_cap=20.0" in text
    assert "from c.toml: mask=window(63, 0) scale=0.5 dropout_rate=0.25 precision=highest max_logits=True" in text
    assert "; not its soft_cap=30.0 sinks=True, as given here" in text


@pytest.mark.parametrize(
    ("mask", "overridden"),
    [("causal", {"mask": "window(63, 0)"}), ("window(63)", {}), ("config", {}), ("segments & ~(~config)", {})],
)
def test_a_mask_made_of_the_configs_own_is_not_instead_of_it(run, config, mask, overridden):
    out = run("explain", "--target", "cpu", "--config", "c.toml", "--mask", mask, "--json")[1]
    assert json.loads(out)["config"]["overridden"] == overridden
    assert ("mask" in json.loads(out)["config"]["fields"]) == (not overridden)


@pytest.mark.parametrize(
    ("number", "text"), [(0.0, "0"), (1.234e-5, "0.0000123"), (0.5, "0.500"), (9.999, "10.00"), (1234.5, "1234")]
)
def test_times_have_three_digits(number, text):
    assert speeds.three_digits(number) == text


def test_explain_reads_maxtext_files(run, config):
    (config / "base.yml").write_text("attention: dot_product\nattn_logits_soft_cap: 0\n")
    (config / "model.yml").write_text("attn_logits_soft_cap: 50.0\n")
    files = ("--maxtext", "base.yml", "--maxtext", "model.yml")
    data = json.loads(run("explain", "--target", "cpu", *files, "--json")[1])
    assert (data["request"]["soft_cap"], data["request"]["scale"]) == (50.0, 1.0)
    assert (data["plan"]["kernel"], data["config"]["source"]) == ("dot_product", "base.yml + model.yml")


@pytest.mark.parametrize("verb", ["explain", "lock", "check"])
def test_options_of_maxtext_are_ignored_by_name(run, config, without_compilers, verb):
    (config / "base.yml").write_text("attention: dot_product\nquantize_kvcache: true\nmy_attention_sink: 1\n")
    target = "tpu:v5e:9x8" if verb == "check" else "cpu"
    question = (verb, "--maxtext", "base.yml", "--target", target, "--q-len", "64")
    status, _, err = run(*question, "--ignore", "my_attention_sink")
    assert (status, "quantize_kvcache = True is not supported" in err) == (2, True)
    assert "or drop it with --ignore quantize_kvcache.\n" in err
    _, out, err = run(*question, "--ignore", "my_attention_sink", "--ignore", "quantize_kvcache")
    assert "dot_prod" in out  # the table may fold the rest
    assert err == ""
    status, _, err = run(verb, *(("--config",) if verb == "explain" else ()), "c.toml", *question[3:], "--ignore", "a")
    assert (status, "--ignore is for MaxText's files" in " ".join(err.split())) == (2, True)


def test_a_warning_is_one_line(run, config):
    (config / "base.yml").write_text("attention: dot_product\nreshape_q: true\n")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = run("explain", "--maxtext", "base.yml", "--target", "cpu")
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("warning: base.yml: MaxText options that are not read, as they do not change what attention")


def test_what_is_said_of_maxtext_files_is_for_the_command_line(run, config):
    wrong = {
        "my_attention_sink: 1": "If it is not about attention, pass --ignore my_attention_sink.",
        "brand_new: 1": "Pass --ignore brand_new if they are not about attention.",
        "reshape_q: true\nforce_q_layout: true": "Pass --ignore reshape_q --ignore force_q_layout to leave them out.",
        "sliding_window_size: 8": "One more --maxtext FILE with attention_type: local_sliding builds the config "
        "of such a layer, and --model FILE, in place of the model's --maxtext FILE, describes all layers. If "
        "Causal() is right for this layer, pass --ignore sliding_window_size.",
    }
    for content, words in wrong.items():
        (config / "base.yml").write_text(f"attention: dot_product\n{content}\n")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            _, _, err = run("explain", "--maxtext", "base.yml", "--target", "cpu")
        assert words in err
        assert "ignore=" not in err


WRONG_FILES = {
    "none.toml": ("[model]\nlayers = 2\n", "none.toml: there is no table [attention]; found instead: model. Write one"),
    "misspelt.toml": ("[atention]\n", "unknown table 'atention'; did you mean 'attention'?"),
    "name.toml": ('[attention]\nkernel = "blokwise"\n', "of that name; did you mean 'blockwise'?"),
    "base.yml": ("attention: dot_product\n", "or by the command's option --maxtext"),
    "twice.toml": (
        "[attention]\nkernl = 'a'\nmoba = {top_k = 2}\n",
        "twice.toml:2: unknown key 'kernl'; did you mean 'kernel'?",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
@pytest.mark.parametrize("verb", ["explain", "lock", "check"])
def test_files_that_are_not_meant_are_one_message_and_status_2(run, config, verb, name):
    text, words = WRONG_FILES[name]
    (config / name).write_text(text)
    target = () if verb == "lock" else ("--target", "gpu:h100" if verb == "check" else "cpu")
    file = ("--config", name) if verb == "explain" else (name,)
    status, out, err = run(verb, *file, *target)
    assert status == 2
    assert words in " ".join((out + err).split()) or (verb, name) == ("explain", "name.toml")
    assert not (config / "kernelry.lock.json").exists()


@pytest.mark.parametrize("verb", ["lock", "check"])
@pytest.mark.parametrize("files", [(), ("c.toml", "--maxtext", "base.yml")])
def test_a_config_and_maxtext_files_are_one_or_the_other(run, config, verb, files):
    status, _, err = run(verb, *files, "--target", "gpu:h100")
    assert status == 2
    assert "name either a config or, with --maxtext, MaxText's files" in " ".join(err.split())


def test_explain_of_a_refused_kernel_exits_2_with_the_reason(run):
    question = ("explain", "--target", "cpu", "--dtype", "float64", "--kernel", "blockwise")
    status, out, _ = run(*question)
    assert status == 2
    assert "No kernel serves this request." in out
    [candidate] = json.loads(run(*question, "--json")[1])["candidates"]
    assert candidate["refusals"][0]["detail"] == "dtype=float64 is not bfloat16 or float16 or float32"


def test_explain_follows_a_config(run, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[attention]\nkernel = "blockwise"\n')
    _, out, _ = run("explain", "--target", "cpu", "--config", str(path), "--json")
    assert json.loads(out)["plan"]["kernel"] == "blockwise"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["explain", "--target", "gpu:h10"], "did you mean 'h100'"),
        (
            ["explain", "--target", "gpu:h100,tpu:v5e"],
            "must be one target; on the command line write --target for each.",
        ),
        (["explain", "--mode", "trian"], "did you mean 'train'"),
        (["explain", "--mask", "causl"], "mask 'causl': unknown name 'causl'; did you mean 'causal'?"),
        (["explain", "--dtype", "float99"], "--dtype 'float99' is unknown; write e.g. 'bfloat16' or 'float32'"),
        (["explain", "--dtype", "fp32"], "--dtype 'fp32' is unknown; write 'float32'"),
        (["explain", "--batch", "99999999999999"], "2147483647"),
        (["explain", "--soft-cap", "nan"], "must be a finite number above 0"),
        (["explain", "--soft-cap", "inf", "--json"], "must be a finite number above 0"),
        (["explain", "--soft-cap", "0"], "must be a finite number above 0"),
        (["explain", "--mask", ""], "is not an expression: invalid syntax; write e.g. 'causal & window(511)'."),
        (["explain", "--mask", "causal and segments"], "write &, | and ~ for and, or and not."),
        (
            ["explain", "--mask", "window()"],
            "missing a required argument: 'left'; it is written window(left, right=0).",
        ),
        (["mask", "causal(1)"], "causal(…): too many positional arguments; it is written causal()."),
        (["conformance", "--all", "dot_product"], "either name kernels or pass --all"),
        (["conformance", "dot_product", "--known-failures", "no.toml"], "no.toml: No such file or directory."),
        (["mask", "segments"], "write segments(0, 0, 1, 1)"),
        (["mask", "causl"], "did you mean 'causal'"),
        (["mask", "~" * 5000 + "causal"], "is nested more than"),
        (["mask", "causal", "--q-len", "2", "--kv-len", "4"], "query_offset"),
        (["mask", "causal", "--q-len", "0"], "q-len"),
        (["mask", "segments(0, 1)", "--q-len", "3"], "query_ids must be"),
        (["mask", "causal", "--png", "absent/folder/mask.png"], "cannot write the image"),
        (["explain", "--heads", "4", "--kv-heads", "3"], "must divide"),
        (["explain", "--q-len", "-1"], "q-len"),
        (["explain", "--config", "absent.toml"], "absent.toml"),
        (["explian"], "explian"),
    ],
)
def test_mistakes_are_one_message_and_status_2(run, arguments, complaint):
    status, _, err = run(*arguments)
    assert status == 2
    assert complaint in " ".join(err.split())
    assert "Traceback" not in err
    assert "?." not in err


def test_mask_is_drawn_as_text(run):
    status, out, _ = run("mask", "causal & window(3) & segments(0,0,0,1,1,1)")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "segments & window(3, 0)"
    assert lines[3:9] == ["1 . . . . .", "1 1 . . . .", "1 1 1 . . .", ". . . 1 . .", ". . . 1 1 .", ". . . 1 1 1"]


def test_mask_as_json(run):
    status, out, _ = run("mask", "causal", "--q-len", "4", "--block-q", "2", "--block-kv", "2", "--json")
    data = json.loads(out)
    assert status == 0
    assert {data["q_len"], data["kv_len"]} == {4}
    assert [atom["kind"] for atom in data["form"]] == ["causal"]
    [picture] = data["pictures"]
    assert picture["visible"] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert picture["block_map"] == [[1, 0], [2, 1]]
    assert (picture["batch_row"], picture["head"], data["block_q"]) == (None, None, 2)


def test_mask_as_json_leaves_out_many_tokens(run):
    data = json.loads(run("mask", "causal", "--q-len", "2048", "--json")[1])
    assert data["pictures"][0]["visible"] is None
    assert len(data["pictures"][0]["block_map"]) == 2048 // data["block_q"]


def test_mask_as_json_has_a_picture_for_each_row(run):
    data = json.loads(run("mask", "lengths(1, 2)", "--q-len", "2", "--json")[1])
    assert [picture["visible"] for picture in data["pictures"]] == [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]
    assert [picture["batch_row"] for picture in data["pictures"]] == [0, 1]


@pytest.mark.parametrize("tokens", [6, 1024])
def test_mask_as_an_image(run, tmp_path, tokens):
    path = tmp_path / "mask.png"
    status, out, _ = run("mask", "causal & window(3)", "--q-len", str(tokens), "--png", str(path))
    content = path.read_bytes()
    assert (status, out) == (0, f"{path}\n")
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert min(width, height) > 500


def test_mask_image_without_matplotlib_names_the_extra(run, monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run("mask", "causal", "--png", str(tmp_path / "mask.png"))
    assert status == 2
    assert err == "drawing images needs matplotlib; pip install 'kernelry[plot]'.\n"


ONE_AFTER_ANOTHER = """
import json, sys
from kernelry.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["kernelry", *arguments]
    main()
    for stream in (sys.stdout, sys.stderr):
        print("END", file=stream, flush=True)
"""


def test_outputs_that_know_ascii_alone_get_plainer_signs():
    least = next(
        t.value for t in Policy.shipped().thresholds if t.name == "cpu_blockwise_min_train_head_dim_128_kv_len"
    )
    shown = {
        ("mask", "causal", "--q-len", "128"): "# full   + partial   . empty",
        ("explain", "--target", "cpu", "--q-len", "64", "--kv-quantization", "int8"): "| -> | dot_product",
        ("explain", "--target", "cpu", "--q-len", "64"): f"q_len and kv_len >= {least}",
        ("explain", "--target", "cpu", "--q-len", "8192"): f"q_len and kv_len <= {least - 1}",
        ("list",): "dot_product",
        ("mask", "causal.at(x=1)"): "unknown .at(x=...)",
    }
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(list(shown))]
    done = subprocess.run(command, env=environ, capture_output=True, encoding="ascii", check=True, timeout=120)
    assert "Traceback" not in done.stderr
    outputs, errors = (text.split("END\n")[:-1] for text in (done.stdout, done.stderr))
    for expected, output, error in zip(shown.values(), outputs, errors, strict=True):
        assert expected in output + error
        assert (
            len({len(line) for line in output.splitlines() if line.startswith(("|", "+"))}) <= 1
        )  # tables are aligned


def test_a_platform_that_is_not_here_is_a_fault_and_one_message():
    verbs = [["doctor", "--json"], ["explain"], ["lock", "--maxtext", __file__, "--json"], ["list"]]
    environ = {**os.environ, "JAX_PLATFORMS": "cuba"}
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(verbs)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=120)
    outputs, errors = (text.split("END\n")[:-1] for text in (done.stdout, done.stderr))
    [fault] = json.loads(outputs[0])["faults"]
    assert (fault["plugin"], fault["kind"]) == ("JAX_PLATFORMS", "wrong environment variable")
    assert fault["detail"].startswith("JAX_PLATFORMS=cuba is not what this machine has, so JAX can do nothing: ")
    fix = "'cuba' is not a platform of JAX itself; did you mean 'cuda'? Correct or unset JAX_PLATFORMS"
    assert fault["fix"] == fix
    assert errors[1].endswith(f"; {fix}.\n")
    assert "Traceback" not in done.stderr
    assert "dot_product" in outputs[3]


@pytest.mark.parametrize(
    ("named", "fix"),
    [
        ("cpu", "unset JAX_PLATFORMS, or set it to cpu"),
        ("tpu,cpu", "unset JAX_PLATFORMS, or set it to cpu; tpu needs a TPU and pip install 'jax[tpu]'"),
        ("tpu, cpu", "' cpu' is not a platform of JAX itself; did you mean 'cpu'? Correct or unset JAX_PLATFORMS"),
    ],
)
def test_each_platform_that_is_not_here_has_its_own_fix(named, fix):
    assert contents._other_platforms(named) == fix


@pytest.fixture
def without_compilers(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    absent = ("libtpu", "jax_plugins")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(absent) else find(name))
    path = tmp_path / "c.toml"
    path.write_text('[attention]\ntype = "local_sliding"\nwindow = 64\nkernel = "dot_product"\n')
    return str(path)


def test_check_shows_in_its_rows_that_compilers_are_missing(run, without_compilers):
    targets = ("--target", "tpu:v5e:9x8", "--target", "gpu:h100:63")
    status, out, _ = run("check", without_compilers, *targets, "--q-len", "256")
    text = " ".join(out.split())
    assert status == 2
    assert out.count("no compiler") == 6
    assert (
        "train, prefill, decode: compiling for TPUs needs libtpu, their compiler; pip install 'kernelry[aot-tpu]'."
    ) in text
    assert "compilers; pip install 'kernelry[aot-gpu]'." in text
    assert "roofline: at least, but without the lengths of the mask in decode; a decode step reads a full" in text


def test_check_as_json_says_that_compilers_are_missing(run, without_compilers):
    status, out, _ = run("check", without_compilers, "--target", "tpu:v5e:9x8", "--q-len", "256", "--json")
    data = json.loads(out)
    phases = data["targets"]["tpu:v5e:9x8"]
    assert (status, data["ok"]) == (2, False)
    assert {(phase["outcome"], phase["ok"]) for phase in phases} == {("no compiler", False)}
    assert phases[2]["work"]["assumed"] == ["lengths"]
    assert all("pip install 'kernelry[aot-tpu]'" in phase["verdict"] for phase in phases)


def test_check_finds_a_wrong_target_before_it_compiles(run, without_compilers):
    status, out, err = run("check", without_compilers, "--target", "tpu:v5e:9x8", "--target", "gpu:h10")
    assert (status, out) == (2, "")
    assert "did you mean 'h100'" in err


def test_version(run):
    assert run("--version")[1].startswith("kernelry ")
