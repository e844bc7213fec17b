"""The verb `check`: compiles the layers of a config for hardware that is not here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kernelry.aot import LayerReport, Outcome, check_layers
from kernelry.cli import shape
from kernelry.cli.output import Json, Text, print_json
from kernelry.config import load_config

_console = Console(highlight=False, soft_wrap=False)
_MIB = 2**20


def check(
    config: Annotated[Path, typer.Argument(help="a config whose [attention] table decides.")],
    target: Annotated[list[str], typer.Option(help="e.g. tpu:v5e:2x2 or gpu:h100; may be repeated.")],
    q_len: shape.QueryLength = 1024,
    max_len: shape.MaxLength = None,
    batch: shape.Batch = 1,
    heads: shape.Heads = 8,
    kv_heads: shape.KVHeads = None,
    head_dim: shape.HeadDim = 128,
    value_dim: shape.ValueDim = None,
    dtype: shape.DType = "bfloat16",
    two_part: shape.TwoPart = False,
    as_json: Json = False,
) -> None:
    """Whether train, prefill and decode compile for a TPU or GPU, with its real compiler and without it.

    Status 1: not all do. What calls cuDNN is not checked, which is no failure.
    """
    _run_nothing()
    read = load_config(config)
    sizes = shape.model_shape(q_len, max_len, batch, heads, kv_heads, head_dim, value_dim, dtype, two_part)
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    reports: dict[str, tuple[LayerReport, ...]] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=None)
        for name in target:

            def tell(phase: str, target: str = name) -> None:
                progress.update(task, description=f"{target}: {phase}")

            reports[name] = check_layers(read, sizes, name, tell=tell)
    ok = all(report.outcome is not Outcome.FAILED for found in reports.values() for report in found)
    if as_json:
        plain = {name: [report.to_json() for report in found] for name, found in reports.items()}
        print_json({"ok": ok, "targets": plain})
    else:
        for part in _parts(reports):
            _console.print(part)
    raise typer.Exit(0 if ok else 1)


def _run_nothing() -> None:
    """Leaves accelerators alone, unless JAX_PLATFORMS names some: JAX's CUDA plugin wants all of CUDA to run there."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]


def _parts(reports: dict[str, tuple[LayerReport, ...]]) -> Iterator[RenderableType]:
    for name, found in reports.items():
        yield _table(name, found)
        for report in found:
            if not report.ok:
                yield Text(f"  {report.resolution.request.mode.value}: {report.verdict}")
    yield Text(
        "MiB: arguments, outputs and temporaries of one device. Compiled, not run: this proves no numbers and no speed."
    )


def _table(name: str, reports: tuple[LayerReport, ...]) -> Table:
    table = Table(title=name, title_justify="left")
    for column in ("phase", "kernel", "compiles"):
        table.add_column(column)
    for column in ("seconds", "MiB", "FLOPs/byte", "roofline ms"):
        table.add_column(column, justify="right")
    for report in reports:
        compilation, work = report.compilation, report.work
        memory = {} if compilation is None else compilation.memory
        table.add_row(
            report.resolution.request.mode.value,
            report.resolution.kernel or "–",
            str(report.outcome),
            "–" if compilation is None else f"{compilation.seconds:.1f}",
            f"{sum(memory.values()) / _MIB:.1f}" if memory else "–",
            f"{work.intensity:.0f}",
            "–" if work.seconds is None else f"{work.seconds * 1e3:.3f}",
        )
    return table
