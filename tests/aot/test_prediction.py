"""Predictions by the vendors' compilers: candidates by a process of their own, and the table of `kernelry check`."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import kernelry
from kernelry import ModelShape
from kernelry.aot.prediction import Candidate, predict
from kernelry.config.layer import AttentionConfig
from kernelry.phases.calls import calls
from kernelry.request.target import Target
from kernelry_tpu_splash.plugin import SPLASH

pytestmark = pytest.mark.aot

SHAPE = ModelShape(q_len=1024, max_len=1024, q_heads=4, kv_heads=2, head_dim=128)
KINDS = ("v5e", "v5p", "v6e", "tpu7x")


def _call(phase, target="tpu:v5e", shape=SHAPE, **config):
    return next(call for call in calls(AttentionConfig(**config), shape, Target.parse(target)) if call.name == phase)


def _blocks(size, **more):
    return tuple({"block_q": size, "block_kv": size, "block_kv_compute": size, **more}.items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_candidate_has_its_kernels_and_their_sum(kind):
    candidates = [
        Candidate(_call("prefill"), "splash", _blocks(512)),
        Candidate(_call("train"), "splash", _blocks(512)),
        Candidate(_call("decode"), "ragged", (("block_kv", 512),)),
    ]
    forward, training, decode = predict(candidates, f"tpu:{kind}")
    assert [speed.name for speed in forward.kernels] == ["splash_mha_fwd_no_residuals"]
    assert len(training.kernels) == 3
    for found in (forward, training, decode):
        assert found.failure == ""
        assert found.seconds == sum(speed.seconds for speed in found.kernels)
    [speed] = forward.kernels
    assert (speed.grid.steps, speed.grid.visited, speed.grid.cut) == (4 * 4, 4 * 3, 4 * 2)
    assert speed.compiler.startswith("libtpu ")
    assert training.seconds > 2 * forward.seconds > 0


def test_larger_blocks_move_less_and_smaller_ones_visit_fewer_pairs():
    small, large = predict([Candidate(_call("prefill"), "splash", _blocks(size)) for size in (256, 1024)], "tpu:v6e")
    [few], [many] = small.kernels, large.kernels
    assert few.bytes > many.bytes
    assert few.grid.visited * 256**2 < many.grid.visited * 1024**2


def test_candidates_that_do_not_compile_are_failures_and_the_rest_goes_on():
    wide = ModelShape(q_len=2048, max_len=2048, q_heads=1, head_dim=128)
    candidates = [
        Candidate(_call("prefill", shape=wide), "splash", _blocks(2048)),
        Candidate(_call("prefill"), "no_such_kernel"),
        Candidate(_call("prefill"), "splash", (("block_x", 128),)),
        Candidate(_call("prefill"), "dot_product"),
        Candidate(_call("prefill"), "splash", _blocks(256)),
    ]
    large, unknown, misspelt, plain, last = predict(candidates, "tpu:v5e")
    assert "set smaller blocks, e.g. [attention.tilings] splash" in large.failure
    assert "no installed plugin brings a kernel of that name" in unknown.failure
    assert "splash has no tunable 'block_x'" in misspelt.failure
    assert (plain.seconds, plain.kernels, plain.failure) == (None, (), "")
    assert last.seconds > 0


def test_a_kernel_that_no_plugin_brings_is_known_to_the_other_process():
    with kernelry.use(kernels=[dataclasses.replace(SPLASH, name="mine")]):
        mine, ours = predict(
            [Candidate(_call("prefill"), name, _blocks(256)) for name in ("mine", "splash")], "tpu:v5e"
        )
    assert mine == ours
    assert mine.seconds > 0


@pytest.mark.parametrize("kind", ["a100", "h100"])
def test_gpu_candidates_have_code_and_no_seconds(kind):
    [found] = predict([Candidate(_call("prefill", f"gpu:{kind}"), "pallas_flash")], f"gpu:{kind}")
    [speed] = found.kernels
    assert (found.seconds, found.failure, speed.name, speed.missing) == (None, "", "pallas_flash_forward", "")
    assert speed.code.registers > 0
    assert speed.code.blocks_per_sm > 0
    assert speed.code.tensor == {"a100": "mma.sync", "h100": "wgmma"}[kind]


CONFIG = """
[attention]
q_heads = 4
kv_heads = 2
head_dim = 128
rules = [
  { when = { platform = "gpu", mode = "decode" }, use = ["pallas_decode"] },
  { when = { platform = "gpu" }, use = ["pallas_flash"] },
  { when = { mode = "prefill" }, use = ["dot_product"] },
]
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Runs `kernelry check` with a temporary folder of its own."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "config.toml").write_text(CONFIG)
    (folder / "temporary").mkdir()
    command = [sys.executable, "-c", "from kernelry.cli import main; raise SystemExit(main())", "check"]
    command += [str(folder / "config.toml"), "--q-len", "1024", "--target", "tpu:v5e", "--target", "gpu:h100"]
    theirs = {"JAX_PLATFORMS": "cpu", "COLUMNS": "80", "TMPDIR": str(folder / "temporary")}

    def run(*more):
        environment = {**os.environ, **theirs}
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert list((folder / "temporary").iterdir()) == []
        return done.stdout

    return run


def test_check_prints_a_table_of_speed(checked):
    text = checked()
    words = " ".join(text.split())
    assert "tpu:v5e, static, not measured" in words
    assert "gpu:h100, static, not measured" in words
    assert words.count("clocks are not published") == 1
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(" ")}
    assert rows["dot_product"][1:] == ["–"] * 7
    assert rows["kernelry_ragged"][2] == "2/2"
    assert rows["pallas_decode"][-1].startswith("mma.sync=")
    assert max(map(len, text.splitlines())) <= 80


def test_check_has_the_same_in_json(checked):
    targets = json.loads(checked("--json"))["targets"]
    phases = {name: {phase["name"]: phase for phase in found} for name, found in targets.items()}
    train = phases["tpu:v5e"]["train"]
    assert [speed["name"].split("_")[2] for speed in train["speeds"]] == ["fwd", "dkv", "dq"]
    assert train["predicted_seconds"] == sum(speed["seconds"] for speed in train["speeds"])
    assert phases["tpu:v5e"]["prefill"]["speeds"] == []
    flash = {speed["name"]: speed["code"] for speed in phases["gpu:h100"]["train"]["speeds"]}
    assert set(flash) == {"pallas_flash_forward", "pallas_flash_backward_q", "pallas_flash_backward_kv"}
    assert all(code["registers"] <= 255 for code in flash.values())


LOADED_BEFORE = """
from kernelry import ModelShape, aot
from kernelry.config import AttentionConfig
aot.topology_of("tpu:v5e")
shape = ModelShape(q_len=512, max_len=512, head_dim=128)
for report in aot.check_layers(AttentionConfig(), shape, "tpu:v5e", speed=True):
    assert report.ok and report.predicted_seconds is None
    assert all(speed.seconds is None and "in a new process" in speed.missing for speed in report.speeds)
assert report.speeds
"""


def test_a_process_that_has_loaded_libtpu_says_why_there_is_no_speed():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", LOADED_BEFORE], env=environment, check=True)
