"""The main example: examples/train_lm.py."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernelry.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_lm  # noqa: E402
from lm.choices import choices  # noqa: E402
from lm.data import batches, load_text  # noqa: E402
from lm.generate import decode, generate, prefill  # noqa: E402
from lm.mesh import MeshSettings, of_parameter, placed  # noqa: E402
from lm.model import Decoder  # noqa: E402
from lm.settings import ModelSettings, Settings  # noqa: E402

CONFIG = """
name = "test"
[model]
layers = ["local", "global"]
window = 8
width = 32
heads = 4
kv_heads = 2
head_dim = 8
hidden = 48
[training]
seq_len = 128
batch = 4
steps = 12
learning_rate = 1e-2
warmup = 2
evaluate_every = 6
evaluation_windows = 6
[generation]
prompt = "The for statement"
length = 24
temperature = 0.5
[attention]
kernel = "auto"
[attention.thresholds]
cpu_blockwise_min_train_kv_len = 128
"""
RULE = """
[[attention.rules]]
when = { mode = "train", mask = ["causal"] }
use = ["dot_product"]
"""


def written(tmp_path, old="", new=""):
    assert old in CONFIG
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace(old, new, 1) if old else CONFIG + new)
    return path


def run(tmp_path, path, *options):
    return train_lm.main(["--config", str(path), "--runs", str(tmp_path / "runs"), *options])


def chosen(path):
    settings = Settings.load(path)
    model = nnx.eval_shape(lambda: Decoder(settings.model, settings.attention, seed=0))
    made = choices(model, settings)
    return {f"{choice.kind} {choice.phase}": choice.resolution.kernel for choice in made}


AS_SHIPPED = {
    "local train": "blockwise",
    "global train": "blockwise",
    "local prefill": "dot_product",
    "global prefill": "dot_product",
    "local decode": "dot_product",
    "global decode": "dot_product",
}


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("", "", {}),
        ('kernel = "auto"', 'kernel = "dot_product"', {"local train": "dot_product", "global train": "dot_product"}),
        (
            "min_train_kv_len = 128",
            "min_train_kv_len = 129",
            {"local train": "dot_product", "global train": "dot_product"},
        ),
        ("", RULE, {"global train": "dot_product"}),
    ],
    ids=["auto", "kernel", "threshold", "rule"],
)
def test_one_line_of_the_config_changes_the_choice(tmp_path, old, new, changed):
    assert chosen(written(tmp_path, old, new)) == {**AS_SHIPPED, **changed}


def test_the_shipped_config_trains_on_one_kernel_and_decodes_on_another():
    made = chosen(EXAMPLES / "configs" / "tiny.toml")
    assert {made["local train"], made["global train"]} == {"blockwise"}
    assert {made["local decode"], made["global decode"]} == {"dot_product"}


def test_a_kernel_that_refuses_stops_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lm, "train", lambda *_: pytest.fail("training has begun"))
    assert run(tmp_path, written(tmp_path, '"auto"', '"splash"')) == 2
    message = capsys.readouterr().err
    assert "No kernel for platform=cpu mode=train" in message
    assert "splash: " in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.sweep
def test_a_run_trains_generates_and_writes(tmp_path, capsys):
    assert run(tmp_path, written(tmp_path), "--name", "mine", "--steps", "30") == 0
    printed = capsys.readouterr().out
    assert printed.index("passed over") < printed.index("held-out loss") < printed.index("The for statement")

    folder = tmp_path / "runs" / "mine"
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == list(range(31))
    held_out = [line["held_out"] for line in history if line["held_out"] is not None]
    assert held_out[0] == pytest.approx(math.log(256), abs=0.1)
    assert held_out[-1] < held_out[0] - 1

    resolutions = json.loads((folder / "resolutions.json").read_text())
    assert {f"{made['kind']} {made['phase']}": made["plan"]["kernel"] for made in resolutions} == AS_SHIPPED
    assert all(made["rule"] and made["candidates"] for made in resolutions)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.sweep), False])
def test_greedy_decoding_with_the_cache_equals_full_forward_passes(tied):
    length, prompt = 40, jnp.asarray([list(b"The for"), list(b"A while")])  # far beyond the window
    settings = ModelSettings(("local", "global"), window=8, width=32, kv_heads=2, head_dim=8, hidden=48, tied=tied)
    model = Decoder(settings, Settings().attention, seed=3)
    got = generate(model, prompt, jax.random.key(0), length=length, temperature=0)

    forward = nnx.jit(lambda model, tokens: model(tokens)[0])
    tokens = jnp.pad(prompt, ((0, 0), (0, length)))  # causal: what follows is not seen
    for place in range(prompt.shape[1], tokens.shape[1]):
        tokens = tokens.at[:, place].set(forward(model, tokens)[:, place - 1].argmax(-1))
    np.testing.assert_array_equal(got, tokens[:, prompt.shape[1] :])
    assert len(np.unique(got)) > 4


def test_decode_logits_equal_those_of_a_full_forward_pass():
    tokens = jnp.asarray([list(b"The for statement is used to iterate")])
    model = Decoder(ModelSettings(window=8, width=32, head_dim=8, hidden=48), Settings().attention, seed=1)
    whole = nnx.jit(lambda model: model(tokens)[0])(model)
    logits, caches = nnx.jit(lambda model: prefill(model, tokens[:, :20], 40))(model)
    step = nnx.jit(decode)
    for place in range(20, tokens.shape[1]):
        np.testing.assert_allclose(logits, whole[:, place - 1], rtol=1e-4, atol=1e-5)
        logits, caches = step(model, tokens[:, place], caches)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("window = 8", "windw = 8", r"\[model\]: unknown key 'windw'; did you mean 'window'\?"),
        ("[model]", "[modle]", r"unknown key 'modle'; did you mean 'model'\?"),
        ("min_train_kv_len", "min_train_kv", "did you mean 'cpu_blockwise_min_train_kv_len'"),
        ('"global"', '"globl"', "did you mean 'global'"),
        ("steps = 12", 'steps = "12"', "steps must be like 300, got '12'"),
        ("steps = 12", "steps = 0", "training.steps must be at least 1"),
        ('"The for statement"', '""', "prompt must not be empty"),
    ],
)
def test_a_wrong_config_names_the_mistake(tmp_path, capsys, old, new, message):
    path = written(tmp_path, old, new)
    with pytest.raises(ConfigError, match=message):
        Settings.load(path)
    assert run(tmp_path, path) == 2


def test_no_paragraph_is_both_trained_on_and_held_out():
    text = load_text()
    training, held_out = (bytes(part).split(b"\n\n") for part in (text.training, text.held_out))
    # The cut may go through a paragraph: the first one held out is the end of the last one trained on.
    assert not set(training) & set(held_out[1:])
    assert len(text.held_out) / (len(text.training) + len(text.held_out)) == pytest.approx(0.1, abs=0.001)


def test_targets_are_the_inputs_one_byte_on():
    text = np.arange(200, dtype=np.uint8)
    windows = next(batches(text, 3, 10, 0))
    assert windows.shape == (3, 11)
    np.testing.assert_array_equal(windows[:, 1:], windows[:, :-1] + 1)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("context:3", "training.seq_len=128 does not divide over context: 128 % 3 = 2"),
        ("data:3", "training.batch=4 does not divide over data: 4 % 3 = 1"),
        ("tensor:8", "model.heads=4 does not divide over tensor: 4 % 8 = 4"),
        ("contxt:2", "did you mean 'context'?"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(tmp_path, capsys, mesh, message):
    assert run(tmp_path, written(tmp_path), "--mesh", mesh) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def losses_of(folder):
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in history[1:]])


def on_mesh(tmp_path, mesh):
    command = [sys.executable, "-W", "error", str(EXAMPLES / "train_lm.py"), "--config", str(written(tmp_path))]
    environ = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # most of the time is compiling
    environ |= {key: value for key, value in os.environ.items() if not key.startswith("KERNELRY_")}
    environ |= {"KERNELRY_MEASUREMENTS": ""}
    command += ["--runs", str(tmp_path / "runs"), "--name", mesh, "--mesh", mesh, "--steps", "3"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, losses_of(tmp_path / "runs" / mesh)


def alone(tmp_path):
    assert run(tmp_path, written(tmp_path), "--name", "alone", "--steps", "3") == 0
    return losses_of(tmp_path / "runs" / "alone")


def test_a_run_on_a_mesh_trains_as_one_device_does(tmp_path):
    printed, losses = on_mesh(tmp_path, "data:2,context:4")
    np.testing.assert_allclose(losses, alone(tmp_path), rtol=2e-6)
    for shown in ("batch=data:2", "sequence=context:4 ring", "kv_sequence=context:4", "6 full", "4 causal", "skipped"):
        assert shown in printed, shown
    assert printed.count("The for statement") == 2  # one for each device along data


def test_a_decode_step_on_a_mesh_gathers_results_and_no_cache():
    prompt = jnp.asarray([list(b"The for statement is"), list(b"A while statement is")])
    settings = ModelSettings(window=8, width=32, head_dim=8, hidden=48)
    step = nnx.jit(decode)

    def decoded(model):
        logits, caches = nnx.jit(lambda model: prefill(model, prompt, 50))(model)
        lowered = step.lower(model, logits.argmax(-1), caches)
        return step(model, logits.argmax(-1), caches), lowered

    (logits, _), _ = decoded(Decoder(settings, Settings().attention, seed=1))
    mesh = MeshSettings.parse("data:2,context:4").make()
    with jax.set_mesh(mesh):
        model = Decoder(settings, Settings().attention, seed=1)
        nnx.update(model, placed(nnx.state(model, nnx.Param), mesh, of_parameter(mesh)))
        (on_mesh, caches), lowered = decoded(model)
    np.testing.assert_allclose(on_mesh, logits, rtol=1e-4, atol=1e-5)
    for cache in caches:
        assert cache.key.shape == (2, 52, 2, 8)  # 50 slots do not divide over four devices
        assert cache.key.addressable_shards[0].data.shape == (1, 13, 2, 8)
    gathers = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", lowered.compile().as_text())
    assert gathers == ["4,1,1,4,10"] * 2  # for each layer, of each device: eight numbers of a head, and its lse


@pytest.mark.sweep
def test_heads_are_cut_over_tensor(tmp_path):
    expected = alone(tmp_path)
    for mesh in ("tensor:2,context:2", "data:2,tensor:4"):  # two key/value heads: repeated for four devices
        printed, losses = on_mesh(tmp_path, mesh)
        np.testing.assert_allclose(losses, expected, rtol=2e-6)
        assert "heads=tensor:" in printed
