"""The verb `bench`: times the kernels that serve a config, a model, or named shapes, on this device."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kernelry.bench import picture
from kernelry.bench.cases import Case, Pass, cases_of
from kernelry.bench.crossings import Series, series_of
from kernelry.bench.peers import PEERS
from kernelry.bench.programs import missing_kernel, words_of
from kernelry.bench.results import Kind, Outcome, Result, Row, to_json
from kernelry.bench.run import Bench
from kernelry.bench.shapes import ACCELERATOR, CPU, named_cases
from kernelry.bench.turns import REPEATS, quartiles
from kernelry.cli import answer, completion, options
from kernelry.cli.output import Json, Paragraph, Rows, Text, progress, show
from kernelry.cli.speeds import three_digits
from kernelry.errors import ConfigError
from kernelry.kernel.spec import AUTO
from kernelry.policy.policy import Switches
from kernelry.request.target import Target, home_target

_OWN_SIZES = ("q_len", "dtype")
"""The options that `bench` takes in another way than other verbs."""
_OF_SHAPES = ("batch",)
"""The shared options that change named shapes, too."""


@options.takes(options.ModelOptions, *_OWN_SIZES)
def bench(
    model: options.ModelOptions,
    *,
    q_len: Annotated[
        list[int] | None,
        typer.Option(
            "--q-len",
            min=1,
            help="T, and the slots S that a decode step reads; default 1024, or that of the shape; may be repeated: "
            "time against length is what --plot draws.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="of query, key and value; default bfloat16, or that of the shape.",
            autocompletion=completion.dtypes,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="a named shape in place of a config; --list shows them; may be repeated.",
            autocompletion=completion.shapes,
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the named shapes, and time nothing.")] = False,
    which: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            help="forward, forward+backward or decode; default all; may be repeated.",
            autocompletion=completion.passes,
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            help="a kernel to time; default: all that serve the call; may be repeated.",
            autocompletion=completion.kernel_names,
        ),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Time jax.nn.dot_product_attention, too.")] = False,
    turns: Annotated[int, typer.Option(min=1, help="how often each kernel is timed, in turn with the others.")] = (
        REPEATS
    ),
    budget: Annotated[
        float | None, typer.Option(min=0, help="seconds after which nothing more is begun; what is left is listed.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Say why each kernel that is not timed refuses.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="writes the JSON to a file as well.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="draws time against length as a PNG; needs 'kernelry[plot]'."),
    ] = None,
    as_json: Json = False,
) -> None:
    """How fast the kernels are here that serve a config, a model, or named shapes, next to a matrix product and a copy.

    With neither a config, a model nor a shape, the named shapes for this platform are timed. Results are compared with
    float32 first. Status 1: a kernel is wrong, or failed, or one that was asked for serves no case.
    """
    if listed:
        show(as_json, _shapes_json(), [_shapes_table()])
        return
    begun = time.perf_counter()
    picture.check(plot)
    _check_folder(out)
    passes = tuple(dict.fromkeys(map(Pass.parse, which or ())))
    cases = _cases(model, shape or [], q_len or [], dtype, passes)
    names = tuple(dict.fromkeys(kernel or ()))
    _check_names(cases, names)
    ends = math.inf if budget is None else begun + budget
    runner = Bench(names, PEERS if peers else (), turns, ends)
    results, not_reached, failures = _run(runner, cases)
    groups = series_of(results)
    data = to_json(results, [*map(str, not_reached)], groups)
    data["faults"] += [*failures, *_unserved(results, names or (AUTO,))]
    if out is not None:
        out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    drawn = "" if plot is None else picture.draw(groups, data["machine"], plot)
    show(as_json, data, _parts(results, groups, data, every=every, drawn=drawn))
    raise typer.Exit(1 if data["faults"] else 0)


def _check_folder(out: Path | None) -> None:
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.absolute().parent}; make it first.")


def _cases(
    model: options.ModelOptions,
    shapes: Sequence[str],
    lengths: Sequence[int],
    dtype: str | None,
    passes: Sequence[Pass],
) -> list[Case]:
    target = home_target()
    has_files = bool(model.files.files or model.files.model)
    if shapes and has_files:
        raise typer.BadParameter("--shape names a layer and its sizes: leave the config and the model out")
    if has_files:
        return _of_layers(model, target, lengths or [1024], dtype or "bfloat16", passes or tuple(Pass))
    given = [
        field.name
        for field in dataclasses.fields(model)
        if field.name not in _OF_SHAPES and getattr(model, field.name) != field.default
    ]
    if given:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{words}: named shapes have their own; name a config or a model")
    return named_cases(shapes, target, lengths=lengths, batches=model.batch or [], dtype=dtype, passes=passes)


def _of_layers(
    model: options.ModelOptions, target: Target, lengths: Sequence[int], dtype: str, passes: Sequence[Pass]
) -> list[Case]:
    if model.max_len is not None and len(lengths) > 1:
        raise typer.BadParameter("--max-len goes with one --q-len; without it the cache has T slots")
    found = []
    for layer in model.files.read():
        for length in lengths:
            sized = dataclasses.replace(model, q_len=length, dtype=dtype)
            for each in sized.shapes(layer):
                found += list(cases_of(layer, each, target, passes))
    if not found:
        asked = " or ".join(which.value for which in passes)
        raise ConfigError(f"nothing to time: no layer has a {asked} pass; leave --pass out.")
    unique = {(case.name, case.which, case.request): case for case in found}
    return list(unique.values())


def _check_names(cases: Sequence[Case], names: Sequence[str]) -> None:
    if cases and names:
        missing = missing_kernel(cases[0], names)
        if missing is not None:
            answer.check_names([missing])
    Switches.of_process()  # a switch that is not valid is an error before anything is timed


def _run(runner: Bench, cases: Sequence[Case]) -> tuple[list[Result], list[Case], list[str]]:
    """Runs the cases, under a progress bar where standard error is a terminal."""
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    results, failures = list[Result](), list[str]()
    with progress(*columns) as bar:
        task = bar.add_task("", total=len(cases))

        def tell(words: str) -> None:
            bar.update(task, description=words)

        runner = dataclasses.replace(runner, tell=tell)
        for number, case in enumerate(cases):
            if runner.is_over:
                return results, list(cases[number:]), failures
            try:
                results.append(runner.run(case))
            except Exception as error:  # its arrays do not fit into the memory, say; the other cases still count
                failures.append(f"{case}: {words_of(error)}")
            bar.advance(task)
    return results, [], failures


def _unserved(results: Sequence[Result], names: Sequence[str]) -> Iterator[str]:
    """A line for each kernel that was asked for and refuses every case: there is nothing to time."""
    for name in names:
        rows = [row for result in results for row in result.rows if row.name == name]
        if rows and all(row.outcome is Outcome.REFUSED for row in rows):
            yield f"{name} serves no case: {rows[0].reason}"


def _parts(
    results: Sequence[Result], groups: Sequence[Series], data: dict[str, Any], *, every: bool, drawn: str
) -> Iterator[RenderableType]:
    about = data["machine"]
    versions = about["versions"]
    said = ", ".join(f"{name} {versions[name]}" for name in ("kernelry", "jax", "python") if name in versions)
    device = about["processor"] if about["platform"] == "cpu" else about["device_kind"]
    yield Text(f"{about['platform']}, {device}, {about['date'][:10]}, {said}")
    always = _refused_everywhere(results)
    for result in (result for group in groups for result in group.results):
        yield Text("")
        yield from _case_parts(result, always, every=every)
    crossings = [f"{group.case.name} {group.case.which.value}: {each}" for group in groups for each in group.crossings]
    if crossings:
        yield Text("")
        yield from map(Text, crossings)
    yield Text("")
    if always and not every:
        yield Paragraph(f"refused everywhere (--all says why): {', '.join(always)}")
    yield Text(
        "ms: median, and quartiles of its turns. product, copy: share of the rate of a matrix product and of the bytes "
        "of a copy, timed in the same turns; work is counted from the request."
    )
    for fault in data["faults"]:
        yield Text(f"WRONG: {fault}")
    if data["not_reached"]:
        yield Text("not reached within the budget:")
        yield from (Text(f"  {name}") for name in data["not_reached"])
    if drawn:
        yield Text(drawn)


def _refused_everywhere(results: Sequence[Result]) -> list[str]:
    """Kernels and peers that no case can be timed with."""
    refused = [{row.name for row in result.rows if row.outcome is Outcome.REFUSED} for result in results]
    return sorted(set.intersection(*refused)) if len(refused) > 1 else []


def _case_parts(result: Result, always: Sequence[str], *, every: bool) -> Iterator[RenderableType]:
    work = result.work
    left_out = f", without the {' and '.join(work.assumed)} of the mask" if work.assumed else ""
    shown = [row for row in result.rows if row.program is not None and row.program.times]
    title = str(result.case)
    about = f"{_sizes(result)}; {_amount(work.flops, 1000)}FLOP, {_amount(work.bytes, 1024)}B at least{left_out}"
    if shown:
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
        table.add_column("kernel", overflow="fold")
        for name in ("ms", "quartiles", "product", "copy"):
            table.add_column(name, justify="right", no_wrap=True)
        yield Rows(table, [_cells(result, row) for row in sorted(shown, key=lambda row: row.median)])
    else:
        yield Text(title)
    for line in (about, *_remarks(result), *_untimed(result, always, every=every)):
        yield Paragraph(line, indent=2, hang=0)


def _sizes(result: Result) -> str:
    request = result.case.request
    heads = f"N={request.q_heads} K={request.kv_heads} H={request.head_dim} D={request.value_dim}"
    more = [f"soft_cap={request.soft_cap:g}"] if request.soft_cap else []
    more += ["sinks"] if request.sinks else []
    return " ".join([heads, request.dtype, str(request.mask), *more])


def _cells(result: Result, row: Row) -> list[str]:
    assert row.program is not None
    low, median, high = quartiles(row.program.times)
    rates = result.rates(row)
    wrong = " WRONG" if row.outcome is Outcome.WRONG else ""
    return [
        f"{row.name}{wrong}",
        three_digits(median),
        f"{three_digits(low)}–{three_digits(high)}",
        f"{rates['of_matrix_product']:.1%}",
        f"{rates['of_copy']:.1%}",
    ]


def _remarks(result: Result) -> Iterator[str]:
    """What `auto` takes, which programs are the same, and which kernels need adapters."""
    for row in result.rows:
        if row.kind is Kind.AUTO and row.outcome in (Outcome.SAME, Outcome.TIMED):
            yield f"auto takes {row.plan}{_speed_of_auto(result)}"
        elif row.outcome is Outcome.SAME:
            yield f"{row.name} has the same program as {row.same_as}"
        elif row.is_timed and row.plan != row.name:
            yield row.plan
        if row.is_timed and row.reason:
            yield f"{row.name}: {row.reason}"


def _speed_of_auto(result: Result) -> str:
    share, best = result.auto_share, result.fastest
    if share is None or best is None:
        return ""
    return ", the fastest" if share == 1 else f": {share:.0%} of the speed of {best.name}, the fastest"


def _untimed(result: Result, always: Sequence[str], *, every: bool) -> Iterator[str]:
    for outcome in (Outcome.WRONG, Outcome.FAILED, Outcome.TOO_LARGE):
        yield from (f"{row.name} {outcome.value}: {row.reason}" for row in result.rows if row.outcome is outcome)
    refused = [row for row in result.rows if row.outcome is Outcome.REFUSED]
    if every:
        yield from (f"{row.name} refused: {row.reason}" for row in refused)
        return
    others = [row.name for row in refused if row.name not in always]
    if others:
        yield f"refused (--all says why): {', '.join(others)}"


def _amount(number: float, step: int) -> str:
    """Three digits and a prefix: 1.07 G."""
    prefixes = ("", "k", "M", "G", "T", "P") if step == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    for prefix in prefixes[:-1]:
        if number < step:
            return f"{three_digits(number)} {prefix}"
        number /= step
    return f"{three_digits(number)} {prefixes[-1]}"


def _shapes_json() -> dict[str, Any]:
    return {
        name: {
            "about": shape.about,
            "platform": platform,
            "length": shape.length,
            "batch": shape.batch,
            "dtype": shape.dtype,
            "passes": [which.value for which in shape.passes],
        }
        for platform, shapes in (("accelerator", ACCELERATOR), ("cpu", CPU))
        for name, shape in shapes.items()
    }


def _shapes_table() -> Rows:
    table = Table(title="Named shapes; those of a CPU begin with small", title_justify="left", box=None)
    table.add_column("shape", no_wrap=True)
    table.add_column("what", overflow="fold")
    for name in ("length", "batch"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [
        [f"  {name}", shape.about, str(shape.length), str(shape.batch)]
        for shapes in (ACCELERATOR, CPU)
        for name, shape in shapes.items()
    ]
    return Rows(table, rows)
