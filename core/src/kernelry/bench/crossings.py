"""Where one kernel becomes faster than another, as the length grows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from kernelry.bench.cases import Case
from kernelry.bench.results import Kind, Result

Times = Mapping[int, float]
"""Milliseconds by length."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Crossing:
    """A length at which another kernel becomes the fastest.

    Args:
      before, after: the fastest kernels on either side.
      length: where both take as long, by lines between the lengths that were timed; both axes logarithmic.
      milliseconds: what they take there.
    """

    before: str
    after: str
    length: float
    milliseconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {"before": self.before, "after": self.after, "length": round(self.length, 1)}

    def __str__(self) -> str:
        return f"{self.after} is faster than {self.before} from {round(self.length)} on"


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Cases that differ by their length alone.

    Args:
      results: in order of length.
    """

    results: tuple[Result, ...]

    @property
    def case(self) -> Case:
        """The first."""
        return self.results[0].case

    @property
    def times(self) -> dict[str, dict[int, float]]:
        """Milliseconds of right kernels, by name and length."""
        found: dict[str, dict[int, float]] = {}
        for result in self.results:
            for row in result.rows:
                program = result.program_of(row).program
                if row.kind is Kind.KERNEL and program is not None and result.program_of(row).is_timed:
                    found.setdefault(row.name, {})[result.case.length] = program.median
        return found

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """Where the fastest kernel changes."""
        return tuple(crossings_of(self.times))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        which = {"name": self.case.name, "pass": self.case.which.value, "batch": self.case.request.batch}
        return {**which, "crossings": [crossing.to_json() for crossing in self.crossings]}


def series_of(results: Sequence[Result]) -> list[Series]:
    """Groups results, in the order of their first."""
    found: dict[Any, list[Result]] = {}
    for result in results:
        found.setdefault(result.case.series, []).append(result)
    return [Series(tuple(sorted(group, key=lambda each: each.case.length))) for group in found.values()]


def crossings_of(times: Mapping[str, Times]) -> Iterator[Crossing]:
    """Where the fastest of several kernels changes, from the shortest length on.

    Between two neighbouring lengths the logarithm of a kernel's time is a line over the logarithm of the length. A
    kernel that was not timed at one of them takes part in neither.
    """
    lengths = sorted({length for of_kernel in times.values() for length in of_kernel})
    for low, high in itertools.pairwise(lengths):
        both = {name: (each[low], each[high]) for name, each in times.items() if low in each and high in each}
        yield from _between(low, high, both)


def _between(low: int, high: int, ends: Mapping[str, tuple[float, float]]) -> Iterator[Crossing]:
    """Follows the least of several lines from one end to the other."""
    if not ends:
        return
    lines = {name: (math.log(first), math.log(last) - math.log(first)) for name, (first, last) in ends.items()}
    here, fastest = 0.0, min(lines, key=lambda name: lines[name])
    while True:
        start, slope = lines[fastest]
        meets = {name: (other - start) / (slope - rise) for name, (other, rise) in lines.items() if rise < slope}
        later = {name: at for name, at in meets.items() if here <= at < 1}
        if not later:
            return
        here = min(later.values())
        after = min((name for name, at in later.items() if at == here), key=lambda name: lines[name][1])
        ratio = math.log(high / low)
        yield Crossing(fastest, after, low * math.exp(here * ratio), math.exp(start + here * slope))
        fastest = after
