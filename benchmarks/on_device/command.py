"""The command: the kit, then the shapes in their order, then the sums."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

import jax

from on_device import kernels, peers, picture, truth
from on_device.calls import Contender, one_line
from on_device.cells import Cell
from on_device.clock import Clock
from on_device.conformance import SHARE, conformance
from on_device.report import Report, cell_lines, machine
from on_device.shapes import ACCELERATOR, CPU, SHAPES
from on_device.targets import lines

RESULTS = Path(__file__).parents[1] / "results"


def main(about: str) -> None:
    asked = _parsed(about)
    clock, wanted = Clock(asked.minutes), asked.kernels or kernels.installed()
    kit = [] if asked.no_conformance else wanted
    steps = {f"conformance {name}": name for name in kit}
    cells = {f"{name} {which}": (name, which) for name in asked.shapes for which in SHAPES[name].passes}
    command = shlex.join(["python", "benchmarks/device.py", *_told(sys.argv[1:])])
    report = Report(asked.out, machine() | {"command": command}, [*steps, *cells])
    clock.guard(lambda: _end(report), lambda: _status(report))
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax warns of every shape that it was not tuned for
    _run_kit(report, steps, clock, quick=asked.quick)
    _run_cells(report, [*map(kernels.contender, (*wanted, kernels.AUTO)), *peers.contenders()], asked, clock)
    _end(report)
    if asked.minutes is not None:
        os._exit(_status(report))  # a compilation that was given up on would be waited for
    raise SystemExit(_status(report))


def _parsed(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    shapes = CPU if jax.default_backend() == "cpu" else ACCELERATOR
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(shapes), metavar="NAME", help=" ".join(SHAPES)
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="NAME", help="these alone, besides auto; default: all installed"
    )
    parser.add_argument("--quick", action="store_true", help="the quick conformance cases, and 7 samples, not 25")
    parser.add_argument("--no-conformance", action="store_true", help="time only")
    parser.add_argument(
        "--minutes", type=float, help="end within them, compiling included, and list what was not reached"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON and the PNG")
    asked = parser.parse_args()
    for name in asked.kernels or ():
        if name not in kernels.installed():
            parser.error(f"no kernel is named {name!r}; installed: {', '.join(kernels.installed())}")
    return asked


def _told(arguments: list[str]) -> list[str]:
    """The arguments without the folder, which says nothing to others."""
    kept = [each for each in arguments if not each.startswith("--out=")]
    at = kept.index("--out") if "--out" in kept else len(kept)
    return kept[:at] + kept[at + 2 :]


def _run_kit(report: Report, steps: dict[str, str], clock: Clock, *, quick: bool) -> None:
    ends = clock.left * (1 - SHARE)
    for place, (step, kernel) in enumerate(steps.items()):
        seconds = (clock.left - ends) / (len(steps) - place) if clock.minutes is not None else clock.left
        if clock.is_over or seconds <= 0:
            return
        found = conformance(kernel, quick=quick, seconds=seconds, clock=clock)
        report.add_conformance(kernel, found)
        report.tick(step)
        cut = f", {len(found['not_reached'])} cases not reached" if found["not_reached"] else ""
        _say(f"conformance {kernel}: {'ok' if found['ok'] else 'FAILED'} {found['counts']}{cut}")


def _run_cells(report: Report, contenders: list[Contender], asked: argparse.Namespace, clock: Clock) -> None:
    for name in asked.shapes:
        if clock.is_over:
            return
        try:
            _run_shape(report, name, contenders, 7 if asked.quick else 25, clock)
        except Exception as error:  # its arrays do not fit, say; the other shapes still count
            report.add_failure(name, one_line(error))


def _run_shape(report: Report, name: str, contenders: list[Contender], repeats: int, clock: Clock) -> None:
    shape = SHAPES[name]
    arrays = shape.arrays()
    expected = truth.expected(shape, arrays)
    for which in shape.passes:
        if clock.is_over:
            return
        found = Cell(shape, which, arrays, expected, clock).run(contenders, repeats)
        report.add_cell(name, which, found)
        report.tick(f"{name} {which}")
        for line in cell_lines(name, which, found):
            _say(line)


def _end(report: Report) -> None:
    """Writes the sums, and last the picture, which may be left out when the time is up."""
    with report.lock:
        report.close()
        for line in lines(report.data["targets"]):
            _say(line)
        for each in report.data["not_reached"]:
            _say(f"not reached: {each}")
        for each in report.wrong:
            _say(f"WRONG: {each}")
        _say(str(report.path))
        drawn = report.path.with_suffix(".png")
        _say(picture.draw(report.data, drawn) or str(drawn))


def _status(report: Report) -> int:
    """The exit status: 1 where something was wrong."""
    return 1 if report.wrong else 0


def _say(line: str) -> None:
    print(line, flush=True)
