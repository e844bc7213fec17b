"""Kernels of a program matched with what compilers wrote of them; the writings are recorded, nothing is compiled."""

import dataclasses

import jax
import pytest
from jax.experimental import pallas as pl

import kernelry
from kernelry import ModelShape
from kernelry.aot import kernel_speeds
from kernelry.aot.compilation import Compilation
from kernelry.aot.dumps import Written
from kernelry.aot.gpu_code import AssemblerError, Launch, Listed, Ptx
from kernelry.aot.kernel_speeds import speeds_of
from kernelry.aot.layers import arguments_of, program_of
from kernelry.aot.tpu_schedule import Region, Schedule, ScheduleError
from kernelry.config.layer import AttentionConfig
from kernelry.phases.calls import calls
from kernelry.request.target import Target

SHAPE = ModelShape(q_len=1024, max_len=1024, q_heads=4, kv_heads=2, head_dim=128)
TILING = {
    "block_q": 512,
    "block_kv": 512,
    "block_q_dkv": 512,
    "block_kv_dkv": 512,
    "block_q_dq": 512,
    "block_kv_dq": 512,
    "backward_kernels": 2,
}
NAMES = ("splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals")


def _compiled(target, kernel, written, phase=0):
    call = calls(AttentionConfig(), SHAPE, Target.parse(target))[phase]
    with kernelry.use(kernel, target=target, tiling={"backward_kernels": 2} if kernel == "splash" else None):
        traced = jax.jit(program_of(call)).trace(*arguments_of(call))
    return call, Compilation(call.request.target, 0.0, {}, object(), traced=traced, written=written)


@pytest.fixture
def schedules(monkeypatch):
    """Reads the text `n` as a schedule whose body has n cycles."""

    def read(bundles, utilization=None):
        if not bundles.isdecimal():
            raise ScheduleError(bundles)
        return Schedule((Region(int(bundles), 0, 0),), 100, 0)

    monkeypatch.setattr(kernel_speeds, "read_schedule", read)


def test_each_kernel_has_its_own_schedule(schedules):
    texts = {name: ((str(1000 * (place + 1)), None),) for place, name in enumerate(NAMES)}
    call, compilation = _compiled("tpu:v5e", "splash", Written(texts))
    found = speeds_of(call, TILING, compilation)
    assert tuple(speed.name for speed in found) == NAMES
    for place, speed in enumerate(found):
        assert speed.schedule.body.cycles == 1000 * (place + 1)
        assert (speed.grid.steps, speed.grid.visited) == (4 * 4, 4 * 3)
        cycles = 16 * 110 + 12 * 1000 * (place + 1)
        assert speed.seconds == pytest.approx(max(cycles / 1.5e9, speed.bytes / 819e9))


def test_what_is_missing_is_said_of_each_kernel(schedules):
    call, compilation = _compiled("tpu:v5e", "splash", Written({NAMES[0]: (("a loop", None),)}))
    forward, backward, _ = speeds_of(call, TILING, compilation)
    assert (forward.seconds, forward.schedule, forward.missing) == (None, None, "a loop")
    assert backward.missing == f"libtpu wrote no schedule of {NAMES[1]}"
    assert backward.grid.steps == 16


def _loops_by_itself(refs_in, ref_out):
    ref_out[...] = refs_in[...]


@pytest.fixture
def looping(monkeypatch):
    """The speed of a kernel without a grid, with a schedule and a tiling."""

    def program(array):
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
        return pl.pallas_call(_loops_by_itself, out_shape=shape, name="looping_bwd")(array)

    def speed(schedule, tiling):
        call = calls(AttentionConfig(), SHAPE, Target.parse("tpu:v5e"))[0]
        monkeypatch.setattr(kernel_speeds, "read_schedule", lambda *_: schedule)
        traced = jax.jit(program).trace(jax.ShapeDtypeStruct((8, 128), "float32"))
        written = Written({"looping_bwd": (("", None),)})
        compilation = Compilation(call.request.target, 0.0, {}, object(), traced=traced, written=written)
        [found] = speeds_of(call, tiling, compilation)
        return found

    return speed


def test_a_kernel_that_loops_over_unknown_blocks_has_no_time(looping):
    schedule = Schedule((Region(1000, 0, 0),), 100, 0, looped=True)
    found = looping(schedule, {})
    assert (found.schedule, found.seconds) == (schedule, None)
    assert found.missing == "looping_bwd has no grid: it loops over blocks itself, and how often is not written down"
    assert looping(dataclasses.replace(schedule, looped=False), {}).seconds == pytest.approx(1110 / 1.5e9)


def test_a_kernel_that_loops_over_the_blocks_of_its_tiling_visits_those_that_are_not_empty(looping):
    schedule = Schedule((Region(1000, 0, 0), Region(700, 0, 0)), 100, 0, looped=True)
    tiling = {"block_q": 1024, "block_kv": 1024, "block_q_bwd": 256, "block_kv_bwd": 256}
    found = looping(schedule, tiling)
    assert (found.grid.steps, found.grid.visited, found.grid.cut) == (4 * 10,) * 3
    assert found.seconds == pytest.approx(4 * 10 * (1000 + 110) / 1.5e9)
    assert found.missing == ""


def test_a_device_without_a_clock_has_schedules_and_no_time(schedules):
    call, compilation = _compiled("tpu:v4", "splash", Written(dict.fromkeys(NAMES, (("1", None),))))
    for speed in speeds_of(call, TILING, compilation):
        assert (speed.schedule.body.cycles, speed.seconds) == (1, None)
        assert speed.missing == "no time is predicted for v4, whose clock is not known"


def test_kernels_of_xla_have_no_figures():
    call, compilation = _compiled("tpu:v5e", "dot_product", Written())
    assert speeds_of(call, {}, compilation) == ()


def _launched(name, ptx=None):
    return Listed("module_0001.jit_f", Launch(name, (8, 2, 1), 128, 1024), ptx)


def test_gpu_kernels_without_code_say_why(monkeypatch):
    def refuses(*_):
        raise AssemblerError("ptxas does not accept it")

    monkeypatch.setattr(kernel_speeds, "assemble", refuses)
    text = Ptx("pallas_flash_forward", "sm_90a", 128, (), "")
    for listed, missing in (
        ((), "XLA launches no kernel of the name pallas_flash_forward"),
        ((_launched("pallas_flash_forward"),), "no PTX of pallas_flash_forward was written"),
        ((_launched("pallas_flash_forward", text),), "ptxas does not accept it"),
    ):
        call, compilation = _compiled("gpu:h100", "pallas_flash", Written(listed=listed), phase=1)
        [speed] = speeds_of(call, {}, compilation)
        assert (speed.code, speed.seconds, speed.bound) == (None, None, "")
        assert speed.missing.startswith(missing)
        operands = 2 * (2 * 4 + 2 * 2) * 1024 * 128
        assert operands <= speed.bytes <= 1.001 * operands  # and a table of the mask
