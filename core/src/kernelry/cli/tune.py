"""The verb `tune`: finds the fastest kernels and tilings of a config's calls, and stores them for later calls."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, final

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kernelry.cli import completion, options
from kernelry.cli.check import run_nothing
from kernelry.cli.output import Json, Paragraph, Rows, progress, show
from kernelry.errors import ConfigError
from kernelry.models.model import LayerKind, config_of
from kernelry.phases.calls import calls
from kernelry.phases.resolving import naming
from kernelry.policy.measurements import Entry, Measurements, in_ms
from kernelry.policy.policy import Switches
from kernelry.policy.store import Store, versions_here
from kernelry.request.request import Mode, Request
from kernelry.request.target import Target, home_target
from kernelry.resolution.explanation import Resolution
from kernelry.tuning.choices import Choice, Job, choices_of, refusals_of
from kernelry.tuning.run import Result, Tuner


@options.takes(options.ModelOptions)
def tune(
    model: options.ModelOptions,
    *,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="a TPU for which times are predicted, e.g. tpu:v5e; default: this device, by timing.",
            autocompletion=completion.targets,
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="train, prefill or decode; default all; may be repeated.", autocompletion=completion.modes),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            help="a kernel to try; default: all that serve the call; may be repeated.",
            autocompletion=completion.kernel_names,
        ),
    ] = None,
    max_tilings: Annotated[
        int | None, typer.Option(min=1, help="how many tilings of each kernel are tried; default all.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="seconds after which nothing more is begun; run again to go on.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Try also what is stored already.")] = False,
    imported: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FILE", help="adds the times in a file that --export wrote; may be repeated."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="writes all stored times to a file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The fastest kernels and tilings of train, prefill and decode, timed on this device and stored for later calls.

    With --target they are predicted for a device that need not be present. What is stored already for the same versions
    is not tried again, so a run that was interrupted goes on. With --import or --export a config may be left out.
    Status 1: a call has no kernel with a time.
    """
    store = Store.of_process()
    moved = _moved(store, imported or [], export) if imported or export else None
    if moved is not None and not (model.files.files or model.files.model):
        show(as_json, {"store": str(store.path), "entries": len(moved)}, [Paragraph(_told_of(store, moved))])
        return
    if Switches.of_process().strict:
        raise ConfigError("KERNELRY_STRICT is on, so that nothing but the locked kernels can be tried; unset it.")
    tuner = Tuner(store, again=again, ends=math.inf if budget is None else time.perf_counter() + budget)
    modes = {Mode.parse(text) for text in mode or ()} or set(Mode)
    names = tuple(dict.fromkeys(kernel or ()))
    found: list[Tuned] = []
    left_out = 0
    for where in map(_predicted_for, target) if target else (None,):
        jobs = list(_jobs(model, where or home_target(), modes))
        if not jobs:
            asked = ", ".join(sorted(mode.value for mode in modes))
            raise ConfigError(f"nothing to tune: no layer has a call of mode {asked}; leave --mode out.")
        choices = [choice for job in jobs for choice in choices_of(job, names, max_tilings)]
        for name in set(names) - {choice.kernel for choice in choices}:
            raise ConfigError("; ".join(text for job in jobs for text in refusals_of(job, [name])))
        results = _run(tuner, choices, where)
        left_out += len(choices) - len(results)
        found += _tuned(jobs, results, store)
    if export is not None:
        _moved(store, [], export)
    data = {"store": str(store.path), "left_out": left_out, "calls": [each.to_json() for each in found]}
    show(as_json, data, _parts(found, left_out, store))
    raise typer.Exit(0 if all(each.fastest for each in found) else 1)


def _moved(store: Store, imported: Sequence[Path], export: Path | None) -> tuple[Entry, ...]:
    """Adds the entries of files to the store, writes all to another one, and returns them."""
    for path in imported:
        if not path.exists():
            raise ConfigError(f"--import {path}: there is no such file.")
    if export is not None:
        Store(export).add((), set_aside=False)  # before anything else is written
    entries = store.add(entry for path in imported for entry in Store(path).read())
    return entries if export is None else Store(export).add(entries, set_aside=False)


def _told_of(store: Store, entries: Sequence[Entry]) -> str:
    return f"{len(entries)} times; {store.path} is what calls read."


def _predicted_for(text: str) -> Target:
    target = Target.parse(text)
    if target.platform != "tpu":
        raise ConfigError(
            f"--target {text}: times are predicted for TPUs alone, e.g. tpu:v5e; leave --target out for this device."
        )
    run_nothing()
    return target


def _jobs(model: options.ModelOptions, where: Target, modes: set[Mode]) -> Iterator[Job]:
    """The calls of every layer, each request once."""
    seen = set[Request]()
    for layer in model.files.read():
        kind = f"{layer.name}: " if isinstance(layer, LayerKind) else ""
        policy = config_of(layer).policy
        for shape in model.shapes(layer):
            with naming(layer):
                asked = calls(layer, shape, where)
            for call in asked:
                if call.request.sharding is not None:
                    raise ConfigError(
                        f"{kind}{call.name} is on a mesh, and tune tries calls on one device: pass --sharding '', with "
                        "the lengths and the heads that one device has."
                    )
                if call.request.mode in modes and call.request not in seen:
                    seen.add(call.request)
                    yield Job(f"{kind}{call.name}", call, policy)


def _run(tuner: Tuner, choices: Sequence[Choice], target: Target | None) -> list[Result]:
    """Tries the choices, under a progress bar where standard error is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with progress(*columns) as bar:
        task = bar.add_task("looking", total=len(choices))

        def tell(choice: Choice) -> None:
            bar.update(task, description=f"{choice.job.name}: {choice.kernel}")

        told = dataclasses.replace(tuner, tell=tell)
        results = []
        for result in told.measure(choices) if target is None else told.predict(choices, target):
            results.append(result)
            bar.advance(task)
    return results


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """A call, what was tried for it, and what it gets.

    Args:
      job: the call.
      results: what was tried.
      before: what it gets without any times.
      now: what it gets with those that are stored.
    """

    job: Job
    results: tuple[Result, ...]
    before: Resolution
    now: Resolution

    @property
    def fastest(self) -> Result | None:
        """The result with the shortest time."""
        timed = [result for result in self.results if result.entry.seconds is not None]
        return min(timed, key=lambda result: result.entry.seconds or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "name": self.job.name,
            "request": self.job.call.request.to_json(),
            "before": None if self.before.plan is None else self.before.plan.to_json(),
            "now": None if self.now.plan is None else self.now.plan.to_json(),
            "rule": self.now.rule,
            "results": [
                {**result.entry.to_json(), "new": result.is_new, "winner": result is self.fastest}
                for result in self.results
            ],
        }


def _tuned(jobs: Sequence[Job], results: Sequence[Result], store: Store) -> Iterator[Tuned]:
    entries = store.read()
    measurements = Measurements(entries, versions_here(entries))
    for job in jobs:
        mine = tuple(result for result in results if result.choice.job is job)
        yield Tuned(job, mine, job.resolved(), job.resolved(measurements))


def _parts(found: Sequence[Tuned], left_out: int, store: Store) -> Iterator[RenderableType]:
    for each in found:
        yield Paragraph(f"{each.job.name}: {each.job.call.request}")
        yield _table(each)
        yield Paragraph(f"without times {_plan(each.before)}; now {_plan(each.now)} ({each.now.rule})", 2)
    if left_out:
        yield Paragraph(f"{left_out} were not tried within the budget; run again to go on.")
    yield Paragraph(f"Stored in {store.path}.")


def _table(each: Tuned) -> Rows:
    table = Table()
    for column in ("", "kernel", "tiling"):
        table.add_column(column)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("")
    rows = []
    for result in each.results:
        entry = result.entry
        kind = entry.kind.value + ("" if result.is_new else ", stored before")
        time = in_ms(entry.seconds).removesuffix(" ms")
        mark = "→" if result is each.fastest else ""
        rows.append((mark, entry.kernel, str(result.choice.tiling), time, entry.failure or kind))
    return Rows(table, rows)


def _plan(resolution: Resolution) -> str:
    if resolution.plan is None:
        return "no kernel"
    tiling = resolution.plan.tiling
    return f"{resolution.kernel}{f' with {tiling}' if tiling.values else ''}"
