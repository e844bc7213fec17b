"""The verb `check`: compiles the layers of a config for hardware that is not present."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Annotated

import jax
import typer
from rich.console import RenderableType
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kernelry.aot import LayerReport, NoCompilerError, Outcome, check_layers, topology_of
from kernelry.aot.dumps import dumps_for
from kernelry.cli import answer, completion, options
from kernelry.cli.output import Json, Paragraph, Rows, progress, show
from kernelry.cli.speeds import speed_parts, three_digits
from kernelry.models.model import LayerKind
from kernelry.phases.model_shape import ModelShape
from kernelry.phases.resolving import naming, resolve_phases
from kernelry.request.target import Target

_MIB = 2**20


@options.takes(options.ModelOptions)
def check(
    model: options.ModelOptions,
    *,
    target: Annotated[
        list[str],
        typer.Option(help="e.g. tpu:v5e:2x2 or gpu:h100; may be repeated.", autocompletion=completion.targets),
    ],
    as_json: Json = False,
) -> None:
    """Whether train, prefill and decode compile for a TPU or GPU, with its real compiler and without it.

    Of a model, each kind of its layers is compiled, and rows begin with its name. A second table says what the
    compilers schedule: cycles and predicted times on TPUs, registers and spills on GPUs, static and not measured.

    Status 1: not all of them do; 2: all that could be compiled do, and a compiler is not installed. Calls of cuDNN are
    not checked, which is not a failure.
    """
    run_nothing()
    layers = [(layer, model.shapes(layer)) for layer in model.files.read()]
    for name in target:  # wrong names are found before anything is compiled
        with contextlib.suppress(NoCompilerError), dumps_for(Target.parse(name)):  # its rows will say so
            topology_of(name)
        for layer, shapes in layers:
            for each in shapes:
                answer.check_names(resolve_phases(layer, each, target=name, changes=False).all)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    reports: dict[str, tuple[LayerReport, ...]] = {}
    with progress(*columns) as bar:
        task = bar.add_task("compiling", total=None)
        for name in target:

            def tell(phase: str, target: str = name) -> None:
                bar.update(task, description=f"{target}: {phase}")

            reports[name] = tuple(report for layer, shapes in layers for report in _reports(layer, shapes, name, tell))
    outcomes = {report.outcome for found in reports.values() for report in found}
    ok = not outcomes & {Outcome.FAILED, Outcome.NO_COMPILER}
    plain = {name: [report.to_json() for report in found] for name, found in reports.items()}
    show(as_json, {"ok": ok, "targets": plain}, _parts(reports))
    raise typer.Exit(0 if ok else 1 if Outcome.FAILED in outcomes else 2)


def _reports(
    layer: options.Layer, shapes: tuple[ModelShape, ...], target: str, tell: Callable[[str], object]
) -> Iterator[LayerReport]:
    """The reports of a layer; those of a model's kind are named after it."""
    kind = f"{layer.name}: " if isinstance(layer, LayerKind) else ""
    with naming(layer):
        found = check_layers(layer, shapes, target, tell=lambda phase: tell(f"{kind}{phase}"), speed=True)
    for report in found:
        yield dataclasses.replace(report, name=f"{kind}{report.name}")


def run_nothing() -> None:
    """Keeps JAX off accelerators, unless JAX_PLATFORMS names some: to use a GPU its CUDA plugin needs all of CUDA."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]


def _parts(reports: dict[str, tuple[LayerReport, ...]]) -> Iterator[RenderableType]:
    assumed: dict[str, set[str]] = {}
    for name, found in reports.items():
        yield _table(name, found)
        verdicts: dict[str, list[str]] = {}
        for report in found:
            if report.work.assumed:
                assumed.setdefault(report.name, set()).update(report.work.assumed)
            if not report.ok:
                verdicts.setdefault(report.verdict, []).append(report.name)
        yield from (Paragraph(f"{', '.join(phases)}: {verdict}", 2) for verdict, phases in verdicts.items())
    yield from map(Paragraph, answer.advice_of(report.resolution for found in reports.values() for report in found))
    yield Paragraph(
        f"MiB: arguments, outputs and temporaries of one device. FLOPs, bytes and roofline: {_bound(assumed)}; a "
        "decode step reads a full cache. Compiled, not run: this proves no numbers.",
        hang=0,
    )
    yield from speed_parts(reports)


def _bound(assumed: dict[str, set[str]]) -> str:
    """Says what is a lower bound, and in which rows a part of the mask was left out, which may take less, or more."""
    rows: dict[str, list[str]] = {}
    for name, parts in assumed.items():
        rows.setdefault(" and ".join(sorted(parts)), []).append(name)
    without = [f"without the {parts} of the mask in {', '.join(names)}" for parts, names in rows.items()]
    return ", but ".join(["at least", "; ".join(without)] if without else ["at least"])


def _table(name: str, reports: tuple[LayerReport, ...]) -> Rows:
    table = Table(title=name, title_justify="left")
    for column in ("phase", "kernel"):
        table.add_column(column, overflow="fold")
    table.add_column("compiles", no_wrap=True)
    for column in ("seconds", "MiB", "FLOPs/byte"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("roofline ms", justify="right")
    return Rows(table, [_row(report) for report in reports])


def _row(report: LayerReport) -> tuple[str, ...]:
    compilation, work = report.compilation, report.work
    memory = {} if compilation is None else compilation.memory
    return (
        report.name,
        " and ".join(report.resolution.kernels) or "–",
        str(report.outcome),
        "–" if compilation is None else f"{compilation.seconds:.1f}",
        f"{sum(memory.values()) / _MIB:.1f}" if memory else "–",
        f"{work.intensity:.0f}",
        "–" if work.seconds is None else three_digits(work.seconds * 1e3),
    )
