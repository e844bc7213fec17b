"""The command with --model: a table of kinds, phases and targets, and what check and lock do with a model."""

import dataclasses
import importlib.util
import json
import sys
import warnings

import pytest

from kernelry import Request, cli
from kernelry.cli import models, options
from kernelry.cli.output import console
from kernelry.config import AttentionConfig
from kernelry.models import LayerKind, Model, OtherLayers, from_huggingface
from kernelry.models.named import model_from, named_configs
from kernelry.phases.resolving import resolve_phases
from kernelry.plugin import Refusal, RefusalCode
from kernelry.policy.lock import Lock
from kernelry.registry import installed

pytestmark = pytest.mark.versions

GEMMA = {
    "model_type": "gemma2",
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "head_dim": 32,
    "query_pre_attn_scalar": 64,
    "sliding_window": 8,
    "attn_logit_softcapping": 50.0,
}
HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 32, "value_dim": 32}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    (tmp_path / "c.toml").write_text('[attention]\nkernel = "blockwise"\n')
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys, folder):
    def call(*arguments, width=200):
        monkeypatch.setattr(sys, "argv", ["kernelry", *map(str, arguments)])
        monkeypatch.setattr(console, "_width", width)
        status = cli.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture
def given(monkeypatch):
    """Puts a model in place of the one that is read."""
    return lambda model: monkeypatch.setattr(options, "model_from", lambda _: model)


TARGETS = ("--target", "cpu", "--target", "gpu:h100")


def cells_of(out):
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_a_model_is_a_table_of_kinds_phases_and_targets(run):
    status, out, _ = run("explain", "--model", "config.json", *TARGETS, "--q-len", 64)
    assert status == 0
    assert out.startswith("config.json: gemma2, 6 layers; facts of transformers ")
    assert "B=1 T=64 S=64 dtype=bfloat16\n" in out
    facts, phases, cpu, gpu = zip(*cells_of(out), strict=True)
    assert facts == (
        *("sliding: layers 0, 2, 4", "window(7, 0)", "N=4 K=2 H=32", "scale=0.125, soft_cap=50"),
        *("full: layers 1, 3, 5", "causal", "N=4 K=2 H=32", "scale=0.125, soft_cap=50"),
    )
    assert phases == ("train", "prefill", "decode", "") * 2
    assert cpu == ("dot_product", "blockwise", "dot_product", "") * 2
    assert gpu[2] == "pallas_decode"


def test_the_table_has_the_kernels_of_resolve_phases(run):
    model, shape = from_huggingface("config.json"), options.ModelShape(q_len=64, max_len=64)
    data = json.loads(run("explain", "--model", "config.json", *TARGETS, "--q-len", 64, "--json")[1])
    assert data["model"] == model.to_json()
    found = {(row["kind"], row["call"], t): r for row in data["rows"] for t, r in row["targets"].items()}
    assert len(found) == 2 * 3 * 2
    for (name, call, target), resolution in found.items():
        wanted = getattr(resolve_phases(model, shape, target=target, changes=False)[name], call)
        assert resolution == wanted.to_json()


def test_reasons_are_told_once_for_all_rows_that_they_decide(run):
    out = run("explain", "--model", "config.json", "--target", "gpu:h100", "--q-len", 4096, width=500)[1]
    lines = [line.strip() for line in out.splitlines()]
    reasons = lines[lines.index("gpu:h100:") + 1 :]
    first = [line.partition(":")[0] for line in reasons]
    assert first[:5] == ["train", "prefill", "decode", "train, prefill", "prefill"]
    assert reasons[2].startswith("decode: decided by shipped policy: when platform=gpu mode=decode use pallas_decode")
    assert reasons[3] == "train, prefill: not cudnn_jax: soft_cap=50.0 is not supported"


def test_reservations_of_kernels_that_are_chosen_are_told(run, monkeypatch):
    kernel = installed.registry().kernels["dot_product"]
    first = (Refusal(RefusalCode.EXPERIMENTAL, "first release"),)
    spec = dataclasses.replace(kernel.spec, name="new", reservations=lambda request: first * (request.q_len == 1))
    new = dataclasses.replace(kernel, spec=spec)
    found = dataclasses.replace(installed.registry(), kernels={"new": new})
    monkeypatch.setattr(installed, "registry", lambda: found)
    asked = ("--model", "config.json", "--target", "cpu", "--q-len", 71)  # asked nowhere else
    out = run("explain", *asked, "--kernel", "new")[1]
    assert "  decode: new has a reservation: first release\n" in out
    status, out, _ = run("explain", *asked)
    assert status == 2
    assert "  decode: not new: first release\n" in out


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_fits_the_terminal(run, width):
    out = run("explain", "--model", "gpt-oss-120b", *TARGETS, "--target", "tpu:v6e", width=width)[1]
    assert max(map(len, out.splitlines())) <= width
    assert len({len(line) for line in out.splitlines() if line.startswith(("│", "┏", "└"))}) == (width >= 80)
    # All but prefill, which tokamax_splash serves with sinks.
    assert width >= 80 or out.count(" + sinks_from_lse\n") == 2 * (2 + 3)


def test_a_narrow_terminal_gets_lines_in_place_of_the_table(run):
    out = run("explain", "--model", "gpt-oss-120b", "--target", "tpu:v6e", *TARGETS, "--q-len", 8192, width=50)[1]
    assert NARROW in out, out


NARROW = """
sliding: layers 0, 2, …, 34
  window(127, 0)
  N=64 K=8 H=64
  sinks
  train
    tpu:v6e: splash + sinks_from_lse
    cpu: blockwise
"""


def test_all_explains_every_call_in_full(run):
    out = run("explain", "--model", "config.json", *TARGETS, "--mode", "decode", "--q-len", 64, "--all")[1]
    assert out.count("decode of sliding: layers 0, 2, 4: ") == out.count("decode of full: layers 1, 3, 5: ") == 2
    assert out.count("Other kernels:\n") == 4
    assert "  blockwise [kernelry-dot-product " in out


def test_a_kind_a_target_and_a_mode_are_explained_in_full(run):
    one = ("--layer-kind", "sliding", "--target", "cpu", "--mode", "decode")
    status, out, _ = run("explain", "--model", "config.json", *one, "--q-len", 64, "--kv-len", 96)
    assert status == 0
    assert "decode of sliding: layers 0, 2, 4: mask=window(7, 0), scale=0.125, soft_cap=50, " in out
    assert "mode=decode B=1 T=1 S=96 N=4 K=2 H=32 dtype=bfloat16 mask=lengths & window(7, 0) at query=traced" in out
    assert "from config.json: sliding: mask=lengths & window(7, 0) at query=traced soft_cap=50.0 scale=0.125" in out
    assert "decided by: shipped policy" in out
    assert "could serve, ranked lower" in out


def test_a_mode_leaves_out_the_other_phases(run):
    out = run("explain", "--model", "config.json", *TARGETS, "--mode", "prefill")[1]
    assert {row[1] for row in cells_of(out)} == {"prefill", ""}


def test_kinds_are_chosen_by_name(run):
    out = run("explain", "--model", "config.json", "--target", "cpu", "--layer-kind", "full")[1]
    assert "sliding" not in out
    status, _, err = run("explain", "--model", "config.json", "--layer-kind", "slidin")
    assert (status, err) == (2, "config.json: unknown kind of layers 'slidin'; did you mean 'sliding'?\n")


def test_caches_masks_and_shardings_are_those_of_the_calls(run):
    more = ("--page-size", 16, "--kv-quantization", "int8", "--mask", "config & segments", "--batch", 2)
    out = run("explain", "--model", "config.json", "--target", "cpu", "--q-len", 64, *more)[1]
    assert "B=2 T=64 S=64 dtype=bfloat16 cache=paged:16:int8:head_dim mask=config & segments\n" in out
    assert {row[1] for row in cells_of(out)} == {"train", "prefill", "prefill from the cache", "decode", ""}
    assert "+ gather_pages" in out
    cut = run("explain", "--model", "config.json", "--target", "cpu", "--sharding", "heads=t:2")[1]
    assert "dtype=bfloat16 sharding=heads=t:2\n" in cut


def test_a_config_chooses_the_kernels_of_a_model(run):
    out = run("explain", "--model", "config.json", "--config", "c.toml", "--target", "cpu")[1]
    assert {row[2] for row in cells_of(out)} == {"blockwise", ""}
    assert "  decided by c.toml:2: kernel = 'blockwise'" in out


def test_options_of_a_layer_in_that_config_are_a_warning(run, folder):
    (folder / "c.toml").write_text("[attention]\ntype = 'full'\nsoft_cap = 3.0\nforbid_adapters = ['gather_pages']\n")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, out, err = run("explain", "--model", "config.json", "--config", "c.toml", "--target", "cpu")
    said = "warning: c.toml: not read, because the model says what its layers are: soft_cap, type.\n"
    assert (err, "soft_cap=50" in out) == (said, True)


def test_a_kernel_by_name_is_for_all_of_a_model(run):
    status, out, _ = run("explain", "--model", "config.json", "--target", "cpu", "--kernel", "splash")
    assert status == 2
    assert {row[2] for row in cells_of(out)} == {"none", ""}


def test_a_phase_without_a_kernel_is_a_disagreement_with_its_reasons(run, folder):
    (folder / "c.toml").write_text("[[attention.rules]]\nuse = ['ragged']\n")
    status, out, _ = run("explain", "--model", "config.json", "--config", "c.toml", "--target", "tpu:v6e")
    assert status == 2
    assert "disagreement: sliding on tpu:v6e: train: no kernel serves it (ragged: " in out


ENCODER = Model(
    "bert",
    (LayerKind("full", (0, 1), AttentionConfig(type="full", **HEADS), rope=False),),
    source="config.json",
)


def test_an_encoder_has_no_row_for_decode_and_says_why(run, given):
    given(ENCODER)
    status, out, _ = run("explain", "--model", "config.json", *TARGETS)
    assert status == 0
    assert [row[1] for row in cells_of(out) if row[1]] == ["train", "prefill"]
    assert "no RoPE" in out
    assert "full: no decode phase: queries of these layers see later tokens, as in an encoder" in out
    status, _, err = run("explain", "--model", "config.json", "--mode", "decode")
    assert status == 2
    assert "--mode decode: there is no such phase: full: no decode phase: queries" in " ".join(err.split())


def test_an_encoder_and_a_decoder_have_their_own_phases(run, folder):
    sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    (folder / "t5.json").write_text(json.dumps({"model_type": "t5", **sizes}))
    out = run("explain", "--model", "t5.json", "--target", "tpu:v6e", "--kv-len", 2048)[1]
    phases = [row[1] for row in cells_of(out) if row[1]]
    assert phases == ["train", "prefill", *["train", "prefill", "decode"] * 2]
    assert "  decode: decided by" in out
    assert "  decoder full decode: not ragged: bias=(1, 4, 1, 2048) is not supported" in out
    assert "encoder full and decoder full: bias: " in out


def test_other_layers_and_remarks_follow_the_table(run, given):
    kinds = (
        LayerKind("sliding", (0, 2), AttentionConfig(type="local_sliding", window=8), bidirectional="image"),
        LayerKind("full", (1,), AttentionConfig(bias=True, **HEADS), bidirectional="image"),
    )
    others = (OtherLayers("linear_attention", (3, 4), "its layers keep a state"),)
    given(Model("hybrid", kinds, others, source="x", remarks=("layer 5 is a router",)))
    out = run("explain", "--model", "x", "--target", "cpu")[1]
    assert "N=8 K=8 H=128" in out
    assert "linear_attention: layers 3-4: its layers keep a state\n" in out
    assert "sliding and full: image tokens see each other: where a call has such tokens" in out
    assert "layer 5 is a router\n" in out
    assert "bias" in out


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (tuple(range(6)), "0-5"),
        ((0, 2, 4, 6), "0, 2, …, 6"),
        ((0, 2, 4), "0, 2, 4"),
        ((0, 1, 2), "0-2"),
        ((0, 1, 3, 4, 6, 7, 9), "0-1, 3-4, 6-7, 9"),
        ((0, 1, 3, 4, 6, 7, 9, 11), "0-1, 3-4, …, 11"),
    ],
)
def test_layers_are_shortened(layers, text):
    assert models._shortened(models.ranges(layers)) == text


@pytest.mark.parametrize("verb", ["explain", "lock", "check"])
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--heads", 8, "q_heads=4"), ("--kv-heads", 4, "kv_heads=2"), ("--head-dim", 64, "head_dim=32")],
)
def test_heads_that_contradict_the_model_name_both(run, verb, option, value, said):
    status, _, err = run(verb, "--model", "config.json", "--target", "gpu:h100", option, value)
    assert status == 2
    assert f"{option} {value} contradicts {said} of config.json: sliding: leave {option} out" in " ".join(err.split())


def test_heads_that_the_model_has_may_be_given(run):
    given = ("--heads", 4, "--kv-heads", 2, "--head-dim", 32, "--value-dim", 32)
    assert run("explain", "--model", "config.json", "--target", "cpu", *given)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("explain", "--model", "gemma-2-72b"),
            "no file 'gemma-2-72b', and no model of that name; did you mean 'gemma-2",
        ),
        (("explain", "--model", "no/config.json"), "A file is a config.json, or a folder that has one."),
        (("explain", "--layer-kind", "full"), "--layer-kind is for a model, named with --model"),
        (("lock", "c.toml", "--layer-kind", "full"), "--layer-kind is for a model, named with --model"),
        (("explain", "--model", "config.json", "--soft-cap", "3"), "--soft-cap with --model: the model says what"),
        (("explain", "--model", "config.json", "--partial", "--no-sinks"), "--partial, --sinks with --model"),
        (
            ("explain", "--model", "config.json", "--kv-len", "8"),
            "--kv-len 8 with --model: a cache of 8 slots cannot hold the prompt",
        ),
        (("explain", "--model", "config.json", "--mode", "trian"), "did you mean 'train'"),
        (("explain", "--model", "c.toml"), "c.toml is not valid JSON"),
        (("explain", "--model", "config.json", "--target", "gpu:h10"), "did you mean 'h100'"),
    ],
)
def test_mistakes_with_a_model_are_one_message_and_status_2(run, arguments, complaint):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert complaint.lower() in " ".join(err.split()).lower()


def test_single_requests_take_several_targets(run):
    request = ("explain", *TARGETS, "--q-len", 64, "--heads", 2)
    data = json.loads(run(*request, "--json")[1])
    assert list(data) == ["cpu", "gpu:h100"]
    assert [Request.from_json(found["request"]).q_heads for found in data.values()] == [2, 2]
    out = run(*request)[1]
    assert out.index("platform=cpu mode=train") < out.index("platform=gpu:h100 mode=train")


def test_a_config_says_heads_and_a_bias_of_a_single_request(run, folder):
    (folder / "c.toml").write_text("[attention]\nq_heads = 4\nkv_heads = 2\nhead_dim = 16\nbias = true\n")
    data = json.loads(run("explain", "--config", "c.toml", "--target", "cpu", "--q-len", 64, "--json")[1])
    request = Request.from_json(data["request"])
    assert (request.q_heads, request.kv_heads, request.head_dim, request.value_dim) == (4, 2, 16, 16)
    assert request.bias == (1, 4, 64, 64)
    assert data["config"]["fields"]["bias"] == "(1, 4, 64, 64)"
    status, _, err = run("explain", "--config", "c.toml", "--heads", 8)
    assert (status, "--heads 8 contradicts q_heads=4 of c.toml" in " ".join(err.split())) == (2, True)


# lock


LOCK = ("lock", "--target", "cpu", "--q-len", 64)


def test_lock_writes_every_kind_of_a_model(run, folder):
    status, out, _ = run(*LOCK, "--model", "config.json")
    assert status == 0
    assert "sliding: train cpu B=1 T=64 S=64 mask=window(7, 0): dot_product\n" in out
    assert "full: decode cpu B=1 T=1 S=64 mask=causal at query=traced & lengths: dot_product\n" in out
    entries = Lock.read("kernelry.lock.json").entries
    assert {origin.config for entry in entries for origin in entry.origins} == {
        "config.json: sliding",
        "config.json: full",
    }
    facts = dict(entries[0].origins[0].facts)
    assert (facts["q_heads"], facts["head_dim"]) == (None, None)  # the model's, whatever it says later
    assert {(entry.request.q_heads, entry.request.head_dim) for entry in entries} == {(4, 32)}
    assert run("lock", "--check", "--model", "config.json")[:2] == (0, "6 resolutions are unchanged.\n")


def test_lock_check_finds_what_a_model_no_longer_asks_for(run, folder):
    run(*LOCK, "--model", ".")
    (folder / "config.json").write_text(json.dumps({**GEMMA, "sliding_window": 16}))
    status, out, _ = run("lock", "--check", "--model", "config.json", width=1000)
    assert status == 1
    assert out.count("config.json: sliding no longer asks for this, but for mask=") == 3
    assert "config.json: full" not in out


def test_lock_of_some_kinds_leaves_the_others(run):
    run(*LOCK, "--model", "config.json", "--layer-kind", "full")
    assert run("lock", "--check", "--model", "config.json", "--layer-kind", "full")[0] == 0
    status, out, _ = run("lock", "--check", "--model", "config.json", "--layer-kind", "sliding")
    assert status == 1
    advice = "run kernelry lock --model config.json --layer-kind sliding\n"
    assert f"has nothing that config.json: sliding asked for; {advice}" in out
    assert "not checked: what config.json: full asked for; pass it with --check." in out


def test_a_model_and_the_config_that_chooses_are_one_origin(run):
    run(*LOCK, "--model", "llama-3-8b", "c.toml")
    entries = Lock.read("kernelry.lock.json").entries
    assert {entry.kernel for entry in entries} == {"blockwise"}
    assert {origin.config for entry in entries for origin in entry.origins} == {"llama-3-8b with c.toml: full"}
    assert run("lock", "--check", "--model", "llama-3-8b", "c.toml")[0] == 0
    assert "asked for; run kernelry lock --model llama-3-8b\n" in run("lock", "--check", "--model", "llama-3-8b")[1]


def test_kinds_that_ask_the_same_are_locked_together(run, given):
    kinds = [LayerKind(name, (0,), AttentionConfig(**HEADS), rope=name == "full 1") for name in ("full 1", "full 2")]
    given(Model("cohere2", tuple(kinds), source="config.json"))
    _, out, _ = run(*LOCK, "--model", "config.json")
    assert "full 1: full 2: train cpu" in out
    assert len(Lock.read("kernelry.lock.json").entries) == 3
    assert run("lock", "--check", "--model", "config.json")[1] == "3 resolutions are unchanged.\n"


def test_lock_as_json_names_the_kinds_that_disagree(run, folder):
    (folder / "c.toml").write_text("[[attention.rules]]\nwhen = {mode = 'decode'}\nuse = ['splash']\n")
    status, out, _ = run(*LOCK, "--model", "config.json", "c.toml", "--json")
    assert status == 1
    assert [text.partition(": ")[0] for text in json.loads(out)["disagreements"]] == ["sliding", "full"]


def test_a_lock_file_of_an_older_version_is_still_checked(run, folder):
    run("lock", "c.toml", "--target", "cpu", "--q-len", 64)
    facts = dict(Lock.read("kernelry.lock.json").entries[0].origins[0].facts)
    older = {"q_heads": 8, "kv_heads": None, "head_dim": 128, "value_dim": None}
    assert older.items() <= facts.items()
    assert run("lock", "c.toml", "--check")[0] == 0


# check


def test_check_compiles_every_kind_and_names_it(run, monkeypatch, without_compilers):
    status, out, _ = run("check", "--model", "config.json", "--target", "tpu:v5e:9x8", "--q-len", 256)
    assert status == 2
    assert [row[0] for row in cells_of(out)] == [
        f"{kind}: {phase}" for kind in ("sliding", "full") for phase in ("train", "prefill", "decode")
    ]


@pytest.fixture
def without_compilers(monkeypatch):
    find = importlib.util.find_spec
    absent = ("libtpu", "jax_plugins")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(absent) else find(name))


def test_check_of_an_encoder_has_no_decode(run, given, without_compilers):
    given(ENCODER)
    data = json.loads(run("check", "--model", "config.json", "--target", "tpu:v5e:9x8", "--q-len", 256, "--json")[1])
    assert [each["name"] for each in data["targets"]["tpu:v5e:9x8"]] == ["full: train", "full: prefill"]


# Names


def test_a_folder_with_a_config_of_a_known_name_is_read(folder):
    (folder / "llama-3-8b").mkdir()
    (folder / "llama-3-8b" / "config.json").write_text(json.dumps(GEMMA))
    assert model_from("llama-3-8b").model_type == "gemma2"


NAMED = {
    "bert-base": {"full": ("full", 12, 12, 64, 64, 12, None)},
    "deepseek-v3": {"full": ("causal", 128, 128, 192, 128, 61, 192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)},
    "gemma-2-27b": {
        "sliding": ("window(4095, 0)", 32, 16, 128, 128, 23, 144**-0.5),
        "full": ("causal", 32, 16, 128, 128, 23, 144**-0.5),
    },
    "gemma-3-27b": {
        "sliding": ("window(1023, 0)", 32, 16, 128, 128, 52, 168**-0.5),
        "full": ("causal", 32, 16, 128, 128, 10, 168**-0.5),
    },
    "gpt-oss-120b": {
        "sliding": ("window(127, 0)", 64, 8, 64, 64, 18, None),
        "full": ("causal", 64, 8, 64, 64, 18, None),
    },
    "llama-3-70b": {"full": ("causal", 64, 8, 128, 128, 80, None)},
    "llama-3-8b": {"full": ("causal", 32, 8, 128, 128, 32, None)},
    "mistral-7b": {"sliding": ("window(4095, 0)", 32, 8, 128, 128, 32, None)},
    "modernbert-large": {
        "full": ("full", 16, 16, 64, 64, 10, None),
        "sliding": ("window(64, 64)", 16, 16, 64, 64, 18, None),
    },
    "olmo-3-32b": {
        "sliding": ("window(4095, 0)", 40, 8, 128, 128, 48, None),
        "full": ("causal", 40, 8, 128, 128, 16, None),
    },
    "qwen-3-32b": {"full": ("causal", 64, 8, 128, 128, 64, None)},
}
"""Of each kind: mask, N, K, H, D, how many layers it has, and its scale."""


def test_every_name_is_in_the_table():
    assert named_configs().keys() == NAMED.keys()


@pytest.mark.parametrize("name", NAMED)
def test_named_models_have_the_published_shapes(name):
    model = model_from(name)
    found = {}
    for kind in model.kinds:
        config = kind.config
        assert config.source == f"{name}: {kind.name}"
        heads = (config.q_heads, config.kv_heads, config.head_dim, config.value_dim)
        found[kind.name] = (str(config.mask.form), *heads, len(kind.layers), config.scale)
    wanted = {kind: tuple(facts) for kind, facts in NAMED[name].items()}
    assert {kind: facts[:-1] for kind, facts in found.items()} == {kind: facts[:-1] for kind, facts in wanted.items()}
    for kind, facts in wanted.items():
        scale, default = found[kind][-1], facts[3] ** -0.5
        assert (default if scale is None else scale) == pytest.approx(facts[-1] or default, rel=1e-12)
    assert model.source == name


def test_sinks_and_soft_caps_of_named_models():
    assert all(kind.config.sinks for kind in model_from("gpt-oss-120b").kinds)
    assert {kind.config.soft_cap for kind in model_from("gemma-2-27b").kinds} == {50.0}
    assert not any(kind.config.sinks or kind.config.soft_cap for kind in model_from("llama-3-8b").kinds)


def test_shapes_of_a_model_leave_its_heads_to_it(folder):
    asked = options.ModelOptions(model="config.json", batch=[1, 2])
    [sliding, _] = asked.files.read()
    assert [(shape.batch, shape.q_heads) for shape in asked.shapes(sliding)] == [(1, None), (2, None)]
    without = dataclasses.replace(sliding, config=AttentionConfig(q_heads=4))
    assert asked.shapes(without)[0].of(without.config).heads == (4, 4, 128, 128)


def test_a_models_file_of_maxtext_is_read_over_its_base(run, folder):
    (folder / "base.yml").write_text("attention: autoselected\nuse_tokamax_splash: true\n")
    (folder / "gemma.yml").write_text(
        "decoder_block: gemma2\nbase_num_decoder_layers: 2\nbase_num_query_heads: 4\nbase_num_kv_heads: 2\n"
        "head_dim: 64\nsliding_window_size: 128\n"
    )
    arguments = ("explain", "--model", "gemma.yml", "--maxtext", "base.yml", "--target", "tpu:v5e", "--json")
    status, out, _ = run(*arguments)
    found = json.loads(out)["model"]["kinds"]
    assert status == 0
    assert [(kind["mask"], kind["layers"]) for kind in found] == [("window(127, 0)", [0, 2]), ("causal", [1, 3])]
    assert "MaxText: use_tokamax_splash = True" in out


def test_a_models_file_of_maxtext_with_a_config_that_chooses(run, folder):
    (folder / "llama.yml").write_text("decoder_block: llama2\nbase_num_decoder_layers: 2\n")
    status, out, _ = run("explain", "--model", "llama.yml", "--config", "c.toml", "--target", "cpu")
    assert status == 0
    assert "blockwise" in out


FULL_ALONE = {**GEMMA, "layer_types": ["full_attention"] * 6}


def test_lock_check_finds_a_kind_that_a_model_no_longer_has(run, folder):
    run(*LOCK, "--model", ".")
    (folder / "config.json").write_text(json.dumps(FULL_ALONE))
    status, out, _ = run("lock", "--check", "--model", "config.json")
    assert status == 1
    assert out.startswith("config.json: sliding: there are no such layers any more, and kernelry.lock.json has 3 ")
    assert "run kernelry lock --model config.json again" in out
    assert "not checked" not in out
    data = json.loads(run("lock", "--check", "--model", "config.json", "--json")[1])
    assert (len(data["differences"]), data["checked"], data["not_checked"]) == (1, 3, [])


def test_lock_leaves_out_a_kind_that_a_model_no_longer_has(run, folder):
    run(*LOCK, "--model", ".")
    run(*LOCK, "--model", "llama-3-8b")
    (folder / "config.json").write_text(json.dumps(FULL_ALONE))
    run(*LOCK, "--model", ".", "--layer-kind", "full")
    assert len(Lock.read("kernelry.lock.json").entries) == 9  # one kind alone says nothing of the others
    out = run(*LOCK, "--model", ".")[1]
    assert "3 other resolutions of kernelry.lock.json were kept." in out
    assert run("lock", "--check", "--model", ".")[0] == run("lock", "--check", "--model", "llama-3-8b")[0] == 0
    assert len(Lock.read("kernelry.lock.json").entries) == 6


def test_a_target_is_one_column_however_often_it_is_named(run):
    data = json.loads(run("explain", "--model", "config.json", *TARGETS, "--target", "cpu", "--json")[1])
    assert [list(row["targets"]) for row in data["rows"]] == [["cpu", "gpu:h100"]] * 6
    out = run("explain", "--model", "config.json", *TARGETS, *TARGETS)[1]
    assert next(line for line in out.splitlines() if "┃" in line).count("┃") == 5


def test_slots_that_do_not_hold_the_prompt_are_named_as_the_option_is(run):
    status, _, err = run("explain", "--model", "config.json", "--q-len", 64, "--kv-len", 32)
    assert status == 2
    assert "--kv-len 32 with --model: a cache of 32 slots cannot hold the prompt, --q-len 64 tokens" in err


MAXTEXT = "decoder_block: gemma2\nbase_num_decoder_layers: 2\nsliding_window_size: 128\nfoo: 1\nscan_layers: false\n"


def test_messages_about_a_models_file_of_maxtext_are_the_commands(run, folder):
    (folder / "base.yml").write_text("attention: autoselected\n")
    (folder / "gemma.yml").write_text(MAXTEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, out, err = run("explain", "--model", "gemma.yml", "--maxtext", "base.yml", "--target", "cpu")
    assert status == 0
    assert out.startswith("base.yml + gemma.yml: gemma2, 4 layers;")
    assert "base.yml + gemma.yml: Unknown MaxText options that are not read: 'foo'. Pass --ignore foo if" in err
    assert run("explain", "--model", "gemma.yml", "--target", "cpu", "--ignore", "foo")[1].startswith(
        "gemma.yml: gemma2"
    )


def test_options_of_a_layer_in_a_config_for_a_models_file_of_maxtext_are_a_warning(run, folder):
    (folder / "gemma.yml").write_text(MAXTEXT.replace("foo: 1\n", ""))
    (folder / "capped.toml").write_text("[attention]\nsoft_cap = 30.0\n")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        err = run("explain", "--model", "gemma.yml", "--config", "capped.toml", "--target", "cpu")[2]
    assert err == "warning: capped.toml: not read, because the model says what its layers are: soft_cap.\n"


@pytest.mark.parametrize("verb", [("explain",), LOCK, ("check", "--target", "gpu:h100")])
@pytest.mark.parametrize("files", [("--model", "m.yml"), ("--maxtext", "m.yml")])
def test_axes_without_sizes_name_the_option_that_says_them(run, folder, verb, files):
    (folder / "m.yml").write_text("mesh_axes: [data, tensor]\nici_data_parallelism: -1\n")
    status, _, err = run(*verb, *files)
    assert status == 2
    assert (
        "the size of axis 'data' is not said; write e.g. data:8. Pass such a text as --sharding; --sharding ''" in err
    )
    if verb == ("explain",):
        assert run(*verb, *files, "--target", "cpu", "--sharding", "")[0] == 0
        assert run(*verb, *files, "--target", "cpu", "--sharding", "batch=data:2", "--batch", 2)[0] == 0


def test_the_length_of_an_encoder_is_for_models(run, folder):
    (folder / "whisper.json").write_text('{"model_type": "whisper", "encoder_layers": 1, "decoder_layers": 1}')
    status, out, _ = run("explain", "--model", "whisper.json", "--q-len", 448, "--encoder-len", 1500, "--target", "cpu")
    assert status == 0
    assert "S=1500 in cross attention" in out
    status, _, err = run("explain", "--encoder-len", 1500)
    assert (status, "--encoder-len is for a model, named with --model" in err) == (2, True)
    status, _, err = run("lock", "c.toml", "--encoder-len", 1500)
    assert (status, "--encoder-len is for a model, named with --model" in err) == (2, True)
