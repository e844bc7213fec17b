"""The verb `conformance`: tests kernels against what they declare."""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Table

from kernelry.cli import completion
from kernelry.cli.output import Json, Paragraph, Rows, console, print_json, progress
from kernelry.errors import ConfigError
from kernelry.kernel.spec import KernelSpec
from kernelry.registry import installed
from kernelry.testing.conformance import Outcome, Report, installed_spec, run, run_in_processes

_MOST_WORKERS = 8
_COLUMNS = {
    "passed": Outcome.PASSED,
    "refused": Outcome.REFUSED,
    "skipped": Outcome.SKIPPED,
    "known": Outcome.KNOWN_FAILURE,
}


def check(
    kernels: Annotated[
        list[str] | None, typer.Argument(help="names of installed kernels.", autocompletion=completion.kernel_names)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="all installed kernels.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="a thinned subset that still has every claim.")] = False,
    known_failures: Annotated[
        Path | None, typer.Option(help="TOML: a table per kernel, 'case name' = 'reason'; strict.")
    ] = None,
    at_least: Annotated[
        Path | None, typer.Option(help="JSON: kernel → {quick, full}, cases that must be served.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes; by default one per core where several kernels run on CPU, else 1."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Whether kernels do what they declare and refuse the rest. Status 1: some case failed."""
    specs = _specs(kernels or [], every)
    known = _known(known_failures) if known_failures else {}
    least = _least(at_least, "quick" if quick else "full") if at_least else {}
    start = time.perf_counter()
    reports = _run(specs, quick, known, workers or _workers(specs))
    seconds = time.perf_counter() - start
    short = [message for report in reports for message in _shortfalls(report, least)]
    ok = all(report.ok for report in reports) and not short
    if as_json:
        print_json({"ok": ok, "kernels": [report.to_json() for report in reports], "too_few": short})
    else:
        for part in _parts(reports, short, seconds):
            console.print(part, crop=False)
    raise typer.Exit(0 if ok else 1)


def _specs(names: list[str], every: bool) -> list[KernelSpec]:
    if bool(names) == every:
        raise typer.BadParameter("either name kernels or pass --all")
    return [installed_spec(name) for name in (sorted(installed.registry().kernels) if every else names)]


def _workers(specs: list[KernelSpec]) -> int:
    """An accelerator serves one process at a time."""
    return min(os.cpu_count() or 1, _MOST_WORKERS) if len(specs) > 1 and jax.default_backend() == "cpu" else 1


def _run(specs: list[KernelSpec], quick: bool, known: Mapping[str, Mapping[str, str]], workers: int) -> list[Report]:
    """Runs all, with a progress bar on a terminal's stderr."""
    reports = []
    with progress(*Progress.get_default_columns()) as bar:
        if workers > 1:
            task = bar.add_task(f"{len(specs)} kernels in {workers} processes", total=None)
            names = [spec.name for spec in specs]
            count = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
            return run_in_processes(names, workers=workers, quick=quick, known_failures=known, progress=count)
        for spec in specs:
            task = bar.add_task(spec.name, total=None)

            def tell(index: int, total: int, name: str, task: Any = task, kernel: str = spec.name) -> None:
                bar.update(task, completed=index, total=total, description=f"{kernel}: {name}")

            reports.append(run(spec, quick=quick, known_failures=known.get(spec.name, {}), progress=tell))
            bar.remove_task(task)
    return reports


def _known(path: Path) -> dict[str, dict[str, str]]:
    try:
        read: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no TOML, or no UTF-8
        reason = error.strerror if isinstance(error, OSError) else f"not valid TOML: {error}"
        raise ConfigError(f"--known-failures {path}: {reason}.") from error
    for kernel, cases in read.items():
        if not isinstance(cases, dict) or not all(isinstance(reason, str) and reason for reason in cases.values()):
            raise ConfigError(f"--known-failures {path}: write [{kernel}] and below it 'case name' = 'reason'.")
    return read


def _least(path: Path, form: str) -> dict[str, int]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {kernel: int(counts[form]) for kernel, counts in read.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        example = '{"dot_product": {"quick": 70, "full": 150}}'
        raise ConfigError(f"--at-least {path}: {error!r}; expected e.g. {example}.") from error


def _shortfalls(report: Report, least: Mapping[str, int]) -> Iterator[str]:
    wanted = least.get(report.kernel, 0)
    if report.runs_here and report.served < wanted:
        yield f"{report.kernel} served {report.served} cases; at least {wanted} are wanted"


def _parts(reports: list[Report], short: list[str], seconds: float) -> Iterator[RenderableType]:
    for report in reports:
        yield _table(report)
        for case in report.failures:
            yield Paragraph(f"{case.outcome.value}: {case.name} ({case.claim})", 2, style="bold")
            yield Paragraph(case.detail, 4)
        yield from _reasons(report)
    yield _summary(reports, seconds)
    for message in short:
        yield Paragraph(message, style="bold")


def _table(report: Report) -> Rows:
    table = Table(title=f"{report.kernel}: {_verdict(report)}", title_justify="left")
    table.add_column("claim")
    for name in (*_COLUMNS, "failed", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = []
    for claim, cases in report.by_claim().items():
        counts = [sum(case.outcome is outcome for case in cases) for outcome in _COLUMNS.values()]
        bad, seconds = sum(case.outcome.is_bad for case in cases), sum(case.seconds for case in cases)
        rows.append((claim, *(str(count or "·") for count in (*counts, bad)), f"{seconds:.1f}"))
    return Rows(table, rows)


def _verdict(report: Report) -> str:
    if not report.runs_here:
        return "cannot run here; refusals looked at" if report.ok else "failed"
    if not report.served:
        return "served nothing"
    return "ok" if report.ok else "failed"


def _reasons(report: Report) -> Iterator[RenderableType]:
    """Why cases were skipped, each reason once."""
    reasons: dict[str, list[str]] = {}
    for case in report.cases:
        if case.outcome is Outcome.SKIPPED:
            reasons.setdefault(case.detail, []).append(case.name)
    for reason, names in reasons.items():
        listed = names[0] if len(names) == 1 else f"{len(names)} cases"
        yield Paragraph(f"skipped {listed}: {reason}", 2)


def _summary(reports: list[Report], seconds: float) -> Paragraph:
    total = sum(len(report.cases) for report in reports)
    served, refused = sum(report.served for report in reports), sum(report.refused for report in reports)
    skipped, failed = sum(report.skipped for report in reports), sum(report.failed for report in reports)
    text = f"{total} cases in {seconds:.0f} s: {served} served, {refused} refused, {skipped} skipped, {failed} failed"
    return Paragraph(text, style="bold")
