"""What `check` says of speed: the text of its table and the keys of its JSON, of figures that were compiled once."""

import dataclasses
import io

import pytest
from rich.console import Console

from kernelry import ModelShape, aot, explain
from kernelry.aot.compilation import Compilation, CompileFailure
from kernelry.aot.gpu_code import GpuCode
from kernelry.aot.layers import LayerReport
from kernelry.aot.speed import Grid, tpu_speed
from kernelry.aot.tpu_schedule import Region, Schedule
from kernelry.aot.work import Work
from kernelry.cli.speeds import speed_parts
from kernelry.config.layer import AttentionConfig
from kernelry.phases.calls import calls
from kernelry.request.target import Target

SHAPE = ModelShape(q_len=2048, max_len=2048, q_heads=8, kv_heads=2, head_dim=128)

LIBTPU, PTXAS = "libtpu 0.0.42.1", "ptxas 13.5.37"
FORWARD = tpu_speed(
    "splash_mha_fwd_residuals",
    Schedule((Region(1167, 1024, 1150, ("VSTORE", 0.66)),), 75, 696, (8, 4, 4)),
    Grid(128, 80, 32, cut=32, shape=(8, 4, 4)),
    46923808.0,
    "v5e",
    LIBTPU,
)
BACKWARD = tpu_speed(
    "splash_mha_dkv_no_residuals",
    Schedule((Region(1892, 2048, 1276, ("VSTORE", 0.4)),), 112, 332, (4, 8, 4)),
    Grid(128, 80, 32, cut=32, shape=(4, 8, 4)),
    42205216.0,
    "v5e",
    LIBTPU,
)
"""As libtpu schedules splash with blocks of 512 for a v5e."""
UNREAD = aot.KernelSpeed("looped", LIBTPU, Grid(4, 4, 1), None, None, 2119700.0, None, "", "its turns are not known")
FLASH = aot.KernelSpeed(
    "pallas_flash_backward_kv",
    PTXAS,
    Grid(16, 16, 8, shape=(8, 2, 1)),
    None,
    GpuCode(255, 420, 288, 57856, 128, 2, (("mma.sync", 128), ("wgmma", 16)), False, PTXAS),
    29622528.0,
    None,
    "",
)
"""As ptxas assembled it for an H100, head dim 64, before its tile was computed the other way round."""


def _reports(target, speeds):
    """A report for each phase, whose programs have these kernels."""
    where, found = Target.parse(target), []
    for call, kernels in zip(calls(AttentionConfig(), SHAPE, where), speeds, strict=True):
        failed = None if kernels is not None else CompileFailure("vmem is too small")
        compiled = None if failed else object()
        compilation = Compilation(where, 1.0, {}, compiled, failed)
        work = Work.of(call.request, call.mask)
        found.append(LayerReport(call.name, explain(call.request), compilation, work, speeds=kernels or ()))
    return tuple(found)


def _printed(reports, width):
    console = Console(file=io.StringIO(), width=width)
    for part in speed_parts(reports):
        console.print(part)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


TPU_TABLE = """\
tpu:v5e, static, not measured
phase: kernel            cycles  visited   MXU  spills   MiB      ms  bound by
train:                                                         0.211
 splash_mha_fwd_        1167+75   80/128   88%    1150  44.8  0.0843  schedule
 residuals
 splash_mha_dkv_no_    1892+112   80/128  100%    1276  40.3   0.127  MXU
 residuals
prefill:
 tokamax_splash               –        –     –       –     –       –  –
decode:
 looped                       –      4/4     –       –  2.02       –  –
  –: its turns are not known
Static, not measured, by libtpu 0.0.42.1. –: of what XLA compiles itself nothing
is said.
"""

GPU_TABLE = """\
gpu:h100, static, not measured
phase: kernel              registers  spill B  shared KiB  blocks/SM  products
train:
 pallas_flash_backward_kv        255  420/288          56          2  mma.sync=128 wgmma=16
decode:
 pallas_decode                     –        –           –          –  –
Static, not measured, by ptxas 13.5.37. –: of what XLA compiles itself nothing is said.
GPU: registers of a thread, and the bytes that it spills and loads again;"""


def test_the_table_of_a_tpu_as_it_is_printed():
    text = _printed({"tpu:v5e": _reports("tpu:v5e", [(FORWARD, BACKWARD), (), (UNREAD,)])}, 80)
    assert text.startswith(TPU_TABLE + "TPU: cycles of the body"), text


def test_the_table_of_a_gpu_as_it_is_printed():
    text = _printed({"gpu:h100": _reports("gpu:h100", [(FLASH,), None, ()])}, 100)
    assert text.startswith(GPU_TABLE), text


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_no_figure_is_cut_whatever_the_width(width):
    reports = {
        "tpu:v5e": _reports("tpu:v5e", [(FORWARD, BACKWARD), (), (UNREAD,)]),
        "gpu:h100": _reports("gpu:h100", [(FLASH,), None, ()]),
    }
    text = _printed(reports, width)
    assert max(map(len, text.splitlines())) <= width
    words = {word.rstrip(",") for word in text.split()}
    assert words >= {"1167+75", "80/128", "88%", "1150", "44.8", "0.0843", "0.211", "schedule", "1892+112", "MXU"}
    assert words >= {"255", "420/288", "mma.sync=128", "wgmma=16"}
    assert ("splash_mha_dkv_no_residuals" in words) == (width == 140)
    assert ("splash_mha_dkv_no_residuals:" in words) == (width < 80)


NARROW = """\
tpu:v5e, static, not measured
 train: ms 0.211
  splash_mha_fwd_residuals: cycles 1167+75, visited 80/128,
    MXU 88%, spills 1150, MiB 44.8, ms 0.0843, bound by
    schedule
"""


def test_a_narrow_terminal_gets_a_paragraph_for_each_row():
    text = _printed({"tpu:v5e": _reports("tpu:v5e", [(FORWARD, BACKWARD), (), (UNREAD,)])}, 60)
    assert text.startswith(NARROW), text


def test_assumptions_are_said_once():
    reports = {target: _reports(target, [(FORWARD,), (), ()]) for target in ("tpu:v5e", "tpu:v6e")}
    assert " ".join(_printed(reports, 80).split()).count("clocks are not published") == 1


def test_nothing_is_said_where_nothing_was_compiled():
    assert _printed({"tpu:v5e": _reports("tpu:v5e", [None, None, None])}, 80) == ""


KEYS = {"name", "compiler", "grid", "schedule", "code", "bytes", "seconds", "bound", "missing", "kind"}


def test_json_has_every_figure_and_says_that_it_is_static():
    tpu, gpu = (_reports(target, [(speed,), None, ()])[0].to_json() for target, speed in _ONE_OF_EACH)
    [speed] = tpu["speeds"]
    assert set(speed) == KEYS
    assert speed["kind"] == "static, not measured"
    assert speed["schedule"]["bodies"][0]["cycles"] == 1167
    assert speed["grid"]["visited"] == 80
    assert tpu["predicted_seconds"] == speed["seconds"] == pytest.approx(8.434e-5, rel=1e-3)
    [speed] = gpu["speeds"]
    assert set(speed) == KEYS
    assert (speed["code"]["registers"], speed["code"]["products"]) == (255, {"mma.sync": 128, "wgmma": 16})
    assert gpu["predicted_seconds"] is None


_ONE_OF_EACH = (("tpu:v5e", FORWARD), ("gpu:h100", FLASH))


def test_a_call_is_predicted_where_all_its_kernels_are():
    def predicted(*speeds):
        return _reports("tpu:v5e", [speeds, None, None])[0].predicted_seconds

    assert predicted(FORWARD, BACKWARD) == FORWARD.seconds + BACKWARD.seconds
    assert predicted(FORWARD, UNREAD) is None
    assert predicted() is None
    assert predicted(dataclasses.replace(FORWARD, seconds=None)) is None
