"""What the compiler says of each kernel of a compiled call: static, not measured."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence

import numpy as np

from kernelry.aot.compilation import Compilation
from kernelry.aot.dumps import Written
from kernelry.aot.gpu_code import assemble
from kernelry.aot.pallas_calls import PallasCall, pallas_calls
from kernelry.aot.speed import Grid, KernelSpeed, tpu_speed
from kernelry.aot.tpu_schedule import ScheduleError, read_schedule
from kernelry.errors import KernelryError
from kernelry.masks.run_time import BlockKind
from kernelry.phases.calls import PhaseCall


def speeds_of(call: PhaseCall, tiling: Mapping[str, int], compilation: Compilation) -> tuple[KernelSpeed, ...]:
    """Returns what is known of each kernel that a program calls through Pallas, in the order in which they run.

    Of other kernels, those that XLA makes of ordinary operations, nothing is said.

    Args:
      call: what was compiled. Its mask says which blocks a kernel visits.
      tiling: the tunables that it was compiled with.
      compilation: of the call; with what the compiler wrote, if it was asked to.
    """
    if compilation.traced is None or compilation.compiled is None:
        return ()
    found = pallas_calls(compilation.traced.jaxpr)
    places: collections.Counter[str] = collections.Counter()
    speeds = []
    for kernel in found:
        speeds.append(_speed(call, tiling, kernel, compilation.written, places[kernel.name]))
        places[kernel.name] += 1
    return tuple(speeds)


def total_seconds(speeds: Sequence[KernelSpeed]) -> float | None:
    """The time of all kernels together; None where there are none, or one of them cannot be predicted."""
    known = [speed.seconds for speed in speeds if speed.seconds is not None]
    return sum(known) if speeds and len(known) == len(speeds) else None


def _speed(call: PhaseCall, tiling: Mapping[str, int], kernel: PallasCall, written: Written, place: int) -> KernelSpeed:
    if call.request.target.platform != "tpu":
        return _gpu_speed(call, kernel, written)
    grid, share = grid_of(kernel, call, tiling)
    moved = kernel.bytes(share) * kernel.runs
    compiler = f"libtpu {_version('libtpu')}"
    texts = written.schedules.get(kernel.name, ())
    if not texts:
        missing = written.missing or f"libtpu wrote no schedule of {kernel.name}"
        return KernelSpeed(kernel.name, compiler, grid, None, None, moved, None, "", missing)
    try:
        schedule = read_schedule(*texts[min(place, len(texts) - 1)])
    except ScheduleError as error:
        return KernelSpeed(kernel.name, compiler, grid, None, None, moved, None, "", str(error))
    if schedule.looped and not kernel.grid and _blocks_of(kernel, tiling) is None:
        missing = f"{kernel.name} has no grid: it loops over blocks itself, and how often is not written down"
        return KernelSpeed(kernel.name, compiler, grid, schedule, None, moved, None, "", missing)
    kind = call.request.target.kind
    speed = tpu_speed(kernel.name, schedule, grid, moved, kind, compiler)
    unknown = "" if speed.seconds is not None else f"no time is predicted for {kind}, whose clock is not known"
    return dataclasses.replace(speed, missing=unknown)


def _gpu_speed(call: PhaseCall, kernel: PallasCall, written: Written) -> KernelSpeed:
    steps, moved = kernel.steps * kernel.runs, float(kernel.arrays * kernel.runs)
    grid = Grid(steps, steps, kernel.rows * kernel.runs, shape=kernel.grid)
    listed = next((found for found in written.listed if found.launch.kernel == kernel.name), None)
    code, missing = None, f"XLA launches no kernel of the name {kernel.name}"
    if listed is not None and listed.ptx is not None:
        try:
            code = assemble(listed.ptx, str(call.request.target.kind), listed.launch.shared_memory)
            missing = ""
        except KernelryError as error:  # the assembler is missing, or does not accept it
            missing = str(error)
    elif listed is not None:
        missing = listed.unseen
    compiler = "ptxas" if code is None else code.assembler
    return KernelSpeed(kernel.name, compiler, grid, None, code, moved, None, "", written.missing or missing)


def grid_of(kernel: PallasCall, call: PhaseCall, tiling: Mapping[str, int]) -> tuple[Grid, float]:
    """Returns the steps of a kernel in all its runs, and the share of them that visits a block.

    The mask says which blocks hold anything, where two dimensions of the grid go over blocks of queries and keys, or
    one over those that are not empty. Kernels of the backward pass have tunables with an ending, `block_q_dkv`, that
    their names repeat. Where no such blocks are found every step counts as visited. A kernel without a grid is taken to
    loop over its heads and the blocks that are not empty itself, and to run its longest body for each: which of several
    is for blocks that the mask cuts is not known.

    Args:
      kernel: of the program.
      call: says the mask and the lengths.
      tiling: the tunables by name.
    """
    steps, rows = kernel.steps * kernel.runs, kernel.rows * kernel.runs
    shape = tuple(size if known else 0 for size, known in zip(kernel.grid, kernel.known, strict=True))
    blocks = _blocks_of(kernel, tiling)
    if blocks is None:
        return Grid(steps, steps, rows, shape=shape), 1.0
    kinds = call.mask.block_map(call.request.q_len, call.request.kv_len, *blocks)
    some, cut = (float(np.mean(kinds == kind)) for kind in (BlockKind.EMPTY, BlockKind.PARTIAL))
    visited = 1.0 - some
    if not kernel.grid:
        heads = call.request.batch * call.request.q_heads * kernel.runs
        turns = heads * int((kinds != BlockKind.EMPTY).sum())
        return Grid(turns, turns, heads * len(kinds), cut=turns), 1.0
    if _is_compact(kernel, blocks):  # its steps are the visited ones
        return Grid(steps, steps, rows, cut=round(steps * cut / visited) if visited else 0, shape=shape), 1.0
    found = round(steps * visited)
    return Grid(steps, found, rows, cut=min(found, round(steps * cut)), shape=shape), visited


def _blocks_of(kernel: PallasCall, tiling: Mapping[str, int]) -> tuple[int, int] | None:
    """The blocks of queries and keys that a kernel's grid goes over, or a kernel without a grid itself."""
    endings = sorted((name.removeprefix("block_q") for name in tiling if name.startswith("block_q")), reverse=True)
    words = kernel.name.split("_")
    for ending in (*(found for found in endings if found and found.strip("_") in words), ""):
        blocks = tiling.get(f"block_q{ending}"), tiling.get(f"block_kv{ending}")
        if None not in blocks and (not kernel.grid or all(kernel.along(size) for size in blocks if size is not None)):
            return blocks  # type: ignore[return-value]
    return None


def _is_compact(kernel: PallasCall, blocks: tuple[int, int]) -> bool:
    """Whether one dimension of the grid goes over both, and so over a list of blocks."""
    return len(frozenset[int]().union(*map(kernel.along, blocks))) == 1


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
