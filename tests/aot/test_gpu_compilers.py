"""What XLA's and Triton's compilers for GPUs say, and what they cannot: GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import aot, cli, masks
from kernelry.aot.devices import GPUS
from kernelry.config import AttentionConfig
from kernelry.errors import ConfigError
from kernelry.phases.model_shape import ModelShape

pytestmark = pytest.mark.aot

TARGETS = ("gpu:a100", "gpu:h100", "gpu:b200")
BLOCKS = ("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
SMALL = ModelShape(q_len=256, max_len=256, q_heads=4, kv_heads=4, head_dim=64)
TOO_LARGE = f"""
[attention]
kernel = "pallas_mha"
[attention.tilings]
pallas_mha = {{ {", ".join(f"{block} = 256" for block in BLOCKS)} }}
"""


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    def run(config, *arguments):
        path = tmp_path / "config.toml"
        path.write_text(config)
        monkeypatch.setattr(sys, "argv", ["kernelry", "check", str(path), *arguments])
        status = cli.main()
        return status, capsys.readouterr().out

    return run


def decoded(query, key, value):
    return kernelry.attention(query, key, value, mode="decode", kernel="dot_product")


@pytest.mark.parametrize("kind", GPUS)
def test_every_described_gpu_is_known_to_the_compilers(kind):
    (device,) = aot.topology_of(f"gpu:{kind}")
    assert kernelry.Target.of_device(device.platform, device.device_kind) == kernelry.Target("gpu", kind)
    assert device.core_count == GPUS[kind].cores


@pytest.mark.parametrize("target", TARGETS)
def test_dot_product_compiles(target, shapes, training, compile_for):
    found = compile_for(target, training("dot_product"), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
def test_a_decode_step_compiles(target, shapes, compile_for):
    _, key, value = shapes(2048)
    found = compile_for(target, decoded, (shapes(1)[0], key, value))
    assert found.ok, found.reason


@pytest.mark.parametrize("over", ["heads", "queries"])
def test_dot_product_compiles_for_four_gpus(over, over_four_chips):
    found = over_four_chips("dot_product", over, "gpu:h100:4")
    assert found.ok, found.reason
    assert "all-gather" not in found.compiled.as_text()


def test_a_mesh_over_more_gpus_than_named_is_an_error(shapes, training):
    wanted = r"'gpu:h100' has 1 of the 4 devices that a mesh of {'x': 4} needs; name more, e.g. .*gpu:h100:8"
    with pytest.raises(ConfigError, match=wanted):
        aot.compile_for("gpu:h100", training("dot_product"), *shapes(), mesh_shape={"x": 4})


@pytest.mark.parametrize(("target", "available"), [("gpu:a100", 166912), ("gpu:h100", 232448), ("gpu:b200", 232448)])
def test_blocks_that_are_too_large_are_said_to_be(target, available, shapes, training, compile_for):
    with kernelry.use(tiling=dict.fromkeys(BLOCKS, 256)):
        found = compile_for(target, training("pallas_mha"), shapes())
    assert found.outcome is aot.Outcome.FAILED
    wanted = rf"Shared memory size limit exceeded: requested \d+, available: {available}; set smaller blocks"
    assert re.fullmatch(wanted, str(found.reason))


def test_logits_that_fit_no_gpu_are_said_to_be(shapes, compile_for):
    def prefill(query, key, value):
        return kernelry.attention(query, key, value, mask=masks.Causal(), mode="prefill", kernel="dot_product")

    found = compile_for("gpu:h100", prefill, shapes(131072, heads=8, kv_heads=8))
    assert found.outcome is aot.Outcome.FAILED
    assert "GiB for arguments, outputs and temporaries, of 79.1 GiB; shorten the sequence" in str(found.reason)


def test_what_calls_cudnn_is_not_checked(shapes, training):
    found = aot.compile_for("gpu:h100", training("cudnn_jax"), *shapes())
    assert (found.outcome, found.reason) == (aot.Outcome.UNCHECKED, None)
    assert "cuDNN" in found.unchecked


@pytest.mark.parametrize("target", TARGETS)
def test_check_shows_every_phase(target, check):
    sizes = ("--q-len", "256", "--heads", "4", "--head-dim", "64")
    status, out = check('[attention]\nkernel = "dot_product"\n', "--target", target, *sizes)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "dot_product" in line]
    assert status == 0
    assert [row[:3] for row in rows] == [[mode, "dot_product", "ok"] for mode in ("train", "prefill", "decode")]
    assert all(float(row[4]) > 0 and float(row[6]) >= 0 for row in rows)


@pytest.mark.parametrize("target", ["gpu:h100", "tpu:v5e"])
def test_check_leaves_accelerators_alone(target, tmp_path):
    """JAX's CUDA plugin does not load without a GPU where it is to run there, too."""
    path = tmp_path / "config.toml"
    path.write_text('[attention]\nkernel = "dot_product"\n')
    command = [Path(sys.executable).with_name("kernelry"), "check", path, "--target", target, "--q-len", "256"]
    environ = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.count(" ok ")) == (0, 3), done.stderr


def test_check_says_what_is_not_checked_and_does_not_fail(check):
    rules = '[[attention.rules]]\nwhen = { mode = "decode" }\nuse = ["dot_product"]\n'
    config = f'{rules}[[attention.rules]]\nuse = ["cudnn_jax"]\n'
    status, out = check(config, "--target", "gpu:h100", "--q-len", "256", "--json")
    (phases,) = json.loads(out)["targets"].values()
    assert status == 0
    assert [phase["outcome"] for phase in phases] == ["unchecked", "unchecked", "ok"]
    assert phases[0]["verdict"].startswith("not checked without a device: the program calls cuDNN")
    _, table = check(config, "--target", "gpu:h100", "--q-len", "256")
    assert "train: not checked without a device" in table


def test_check_halves_the_blocks_that_are_too_large(check):
    status, out = check(TOO_LARGE, "--target", "gpu:h100", "--q-len", "512", "--json")
    phases = {phase["mode"]: phase for phase in json.loads(out)["targets"]["gpu:h100"]}
    assert status == 1
    assert "available: 232448; set smaller blocks, e.g. [attention.tilings] pallas_mha" in phases["train"]["verdict"]
    assert "block_q = 128" in phases["train"]["verdict"]


def test_vendor_facts_are_assumed():
    resolution = aot.check_layers(AttentionConfig(), SMALL, "gpu:h100")[0].resolution
    notes = {candidate.name: candidate.notes for candidate in resolution.candidates}
    assert any("assumed" in note for note in notes["cudnn_jax"])


def test_a_function_without_attention_compiles():
    found = aot.compile_for("gpu:h200", jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert found.ok, found.reason
    assert found.memory["arguments"] == 32
