"""How long a kernel takes, predicted from what its compiler wrote: static, not measured.

tests/aot/test_published_timings.py has the published times that predictions are compared with. With the bytes of the
copies around the kernel, predictions are 0.8 to 1.0 of those of v5p, 0.7 to 0.9 of v6e and 0.7 to 0.8 of tpu7x, of
which some short ones are below 0.7. For other devices none are published, so that predictions rank tilings; they do not
promise times.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, final

from kernelry.aot.tpu_schedule import Schedule
from kernelry.errors import ArgumentError
from kernelry.resolution.published import DEVICE_RATES

if TYPE_CHECKING:
    from kernelry.aot.gpu_code import GpuCode

CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
"""Hz. Not published: with the matrix units that libtpu's schedules use, they give the published FLOP/s."""

CORES = {"v5p": 2}
"""That share the memory of what is published as one device; one elsewhere (TPU7x has two devices a chip)."""

STEP_CYCLES = 10
"""Of every step of a grid besides its bundles: branches taken, and loads of scalars that are waited for."""

ASSUMPTIONS = (
    "clocks are not published; they are those that give the published FLOP/s",
    "copies of blocks overlap with computation: nothing waits, and memory delivers its published bandwidth",
    "matrix units never make a schedule wait, except where their occupancy is longer than the schedule",
    "a visible block that the mask does not cut runs the shortest body of the kernel, a cut one the longest, as all "
    "of a kernel without a grid do",
    "copies that change a layout before or after the kernel are not counted",
)
"""What the prediction for TPUs takes for granted."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The steps of a kernel on one device.

    Args:
      steps: all steps.
      visited: steps whose block is not empty.
      rows: of the grid: each starts and finishes an accumulator.
      cut: the visited steps whose block the mask cuts; the others are visible as a whole.
      shape: of the grid, 0 for a size that only the running program knows; empty where it is not known.
    """

    steps: int
    visited: int
    rows: int
    cut: int = 0
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.cut <= self.visited <= self.steps or not 0 <= self.rows <= self.steps:
            raise ArgumentError(
                f"Grid: cut={self.cut} <= visited={self.visited} <= steps={self.steps} and rows={self.rows} <= steps "
                "must hold, and none may be negative."
            )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class KernelSpeed:
    """What a compiler says of one kernel of a program: static, not measured.

    Args:
      name: of the kernel in the program, e.g. `splash_mha_fwd`.
      compiler: e.g. `libtpu 0.0.42.1`, `ptxas 13.0`.
      grid: its steps; None where they are not known.
      schedule: of a TPU's kernel.
      code: of a GPU's kernel.
      bytes: that it moves.
      seconds: predicted; None where there is no model.
      bound: what the prediction is bound by: `MXU`, `schedule`, `memory` or `grid` (what every step and row cost
        besides their blocks); empty without a prediction.
      missing: why there is no schedule, or no code; else empty.
    """

    name: str
    compiler: str
    grid: Grid | None
    schedule: Schedule | None
    code: GpuCode | None
    bytes: float
    seconds: float | None
    bound: str
    missing: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        code = None if self.code is None else self.code.to_json()
        return {**dataclasses.asdict(self), "code": code, "kind": "static, not measured"}


def tpu_speed(name: str, schedule: Schedule, grid: Grid, moved: float, kind: str | None, compiler: str) -> KernelSpeed:
    """Predicts how long a kernel takes on a TPU.

    cycles = steps · (overhead + 10) + Σ over visited steps of max(cycles, MXU occupancy) of their body + rows · row
    seconds = max(cycles / clock / cores, bytes / bandwidth), under `ASSUMPTIONS`

    Args:
      name: of the kernel in the program.
      schedule: of one core.
      grid: the steps of one device.
      moved: bytes between main memory and the cores.
      kind: of the device, e.g. `v5e`; without a clock in `CLOCKS` there is no prediction.
      compiler: its name and version.
    """
    rates, clock = DEVICE_RATES.get(kind or ""), CLOCKS.get(kind or "")
    if rates is None or clock is None:
        return KernelSpeed(name, compiler, grid, schedule, None, moved, None, "")
    costs = [max(body.cycles, body.mxu) for body in schedule.bodies]
    blocks = (grid.visited - grid.cut) * min(costs) + grid.cut * max(costs)
    around = grid.steps * (schedule.overhead + STEP_CYCLES) + grid.rows * schedule.row
    computing = (blocks + around) / clock / _cores(schedule, grid, CORES.get(kind or "", 1))
    moving = moved / rates.bandwidth
    bound = "memory" if moving > computing else "grid" if around > blocks else _slower(schedule)
    return KernelSpeed(name, compiler, grid, schedule, None, moved, max(computing, moving), bound)


def _slower(schedule: Schedule) -> str:
    return "MXU" if schedule.body.mxu >= schedule.body.cycles else "schedule"


def _cores(schedule: Schedule, grid: Grid, available: int) -> int:
    """The cores that share a grid: each has its part of a dimension, unless no dimension is parallel."""
    shape = grid.shape or (grid.steps,)
    bounds = schedule.bounds if grid.shape else (math.prod(schedule.bounds),)
    if len(shape) != len(bounds):
        return available
    parts = [-(-size // part) for size, part in zip(shape, bounds, strict=True) if size and part]
    return min(available, math.prod(parts)) if parts else available
