"""The table of what compilers say of the kernels in a program: static, not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from kernelry.aot import LayerReport
from kernelry.aot.gpu_code import GpuCode
from kernelry.aot.kernel_speeds import total_seconds
from kernelry.aot.speed import ASSUMPTIONS, KernelSpeed
from kernelry.cli.output import Paragraph, Rows

_MIB = 2**20
_KIB = 2**10

_TPU_COLUMNS = ("cycles", "visited", "MXU", "spills", "MiB", "ms", "bound by")
_GPU_COLUMNS = ("registers", "spill B", "shared KiB", "blocks/SM", "products")

_LEGENDS = {
    "tpu": (
        "TPU: cycles of the body that a visible block runs, and of what every step runs besides; visited of all steps; "
        "MXU: the share of the body's cycles for which the busiest matrix unit is occupied; spills: vector registers "
        "stored and loaded again; MiB: blocks copied; ms: predicted, of one device, and what bounds it. Assumed: "
        f"{'; '.join(ASSUMPTIONS)}."
    ),
    "gpu": (
        "GPU: registers of a thread, and the bytes that it spills and loads again; shared memory of a block of "
        "threads; blocks/SM: that a multiprocessor holds at once; products: matrix instructions by path. No time is "
        "predicted."
    ),
}


def speed_parts(reports: dict[str, tuple[LayerReport, ...]]) -> Iterator[RenderableType]:
    """A table for each target of which something was compiled, then once what the columns mean and what is assumed.

    Args:
      reports: by target.
    """
    tables = {name: _table(name, found) for name, found in reports.items() if _compiled(found)}
    yield from tables.values()
    shown = [report for name in tables for report in _compiled(reports[name])]
    missing: dict[str, None] = {speed.missing: None for report in shown for speed in report.speeds if speed.missing}
    yield from (Paragraph(f"–: {why}", 2) for why in missing)
    if not shown:
        return
    compilers = sorted({speed.compiler for report in shown for speed in report.speeds})
    by = f", by {' and '.join(compilers)}" if compilers else ""
    yield Paragraph(f"Static, not measured{by}. –: of what XLA compiles itself nothing is said.", hang=0)
    platforms = {report.resolution.request.target.platform for report in shown}
    yield from (Paragraph(legend, hang=0) for platform, legend in _LEGENDS.items() if platform in platforms)


def _compiled(reports: Sequence[LayerReport]) -> list[LayerReport]:
    return [report for report in reports if report.compilation is not None and report.compilation.compiled is not None]


def _table(name: str, reports: Sequence[LayerReport]) -> Rows:
    is_tpu = reports[0].resolution.request.target.platform == "tpu"
    columns = _TPU_COLUMNS if is_tpu else _GPU_COLUMNS
    table = Table(title=f"{name}, static, not measured", title_justify="left", pad_edge=False, box=None, padding=(0, 1))
    table.add_column("phase: kernel", overflow="fold", min_width=14)
    for column in columns:
        is_text = column in ("bound by", "products")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text and " " not in column)
    rows: list[tuple[str, ...]] = []
    for report in _compiled(reports):
        speeds = report.speeds
        rows.append((f"{report.name}:", *(_total(column, speeds) for column in columns)))
        rows += [(f" {speed.name}", *(_of_tpu(speed) if is_tpu else _of_gpu(speed.code))) for speed in speeds]
        if not speeds:
            rows.append((f" {' and '.join(report.resolution.kernels)}", *("–" for _ in columns)))
    return Rows(table, rows)


def _total(column: str, speeds: Sequence[KernelSpeed]) -> str:
    """Of a call with more than one kernel, the time of all."""
    seconds = total_seconds(speeds)
    return three_digits(seconds * 1e3) if column == "ms" and len(speeds) > 1 and seconds is not None else ""


def _of_tpu(speed: KernelSpeed) -> tuple[str, ...]:
    schedule, grid = speed.schedule, speed.grid
    visited = "–" if grid is None else f"{grid.visited}/{grid.steps}"
    moved = three_digits(speed.bytes / _MIB)
    if schedule is None:
        return "–", visited, "–", "–", moved, "–", "–"
    body = schedule.body
    return (
        f"{body.cycles}+{schedule.overhead}",
        visited,
        f"{min(1.0, body.mxu / body.cycles):.0%}",
        str(schedule.spills),
        moved,
        "–" if speed.seconds is None else three_digits(speed.seconds * 1e3),
        speed.bound or "–",
    )


def _of_gpu(code: GpuCode | None) -> tuple[str, ...]:
    if code is None:
        return ("–",) * len(_GPU_COLUMNS)
    return (
        str(code.registers),
        f"{code.spill_stores}/{code.spill_loads}",
        f"{code.shared_memory / _KIB:.0f}",
        str(code.blocks_per_sm),
        " ".join(f"{path}={count}" for path, count in code.products) or "none",
    )


def three_digits(number: float) -> str:
    """A number, 0 or more, to three significant digits and without an exponent."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number else "0"
