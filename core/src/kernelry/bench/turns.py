"""Programs of one process that take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, final

import jax

REPEATS = 9
"""Turns of each program, where nothing else is said."""
WARM_MS = 3.0
"""Untimed calls at the start of a turn take about this long, or one call where a call takes up to as long as a sample:
threads of the program before it may still spin, and its arrays are in the processor's cache."""
SAMPLE_MS = 10.0
"""Calls are timed together until a sample takes about this long."""
_MOST_CALLS = 1000
_LEAST_MS = 1e-3


@final
@dataclasses.dataclass(slots=True, eq=False)
class Program:
    """Something to call, and the milliseconds per call of each of its turns.

    Args:
      name: what it is, for display.
      call: runs it once; its arrays may not be there yet when it returns.
      queued: whether calls are started one after another and awaited together, as an accelerator runs them, so that
        starting them is hidden. A CPU may run several calls at a time, so each is awaited.
      temporary: the bytes that it needs in addition to its arguments and results, where they are known.
      times: milliseconds per call, one for each turn.
      once: the shortest time of a call so far.
    """

    name: str
    call: Callable[[], Any]
    queued: bool = False
    temporary: int | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    once: float = 0.0

    def warm_up(self) -> None:
        """The first call, which may compile, and one more; of short calls three."""
        self._calls(1)
        self.once = self._calls(1)
        if self.once < SAMPLE_MS:
            self.once = min(self.once, self._calls(1), self._calls(1))

    def take_turn(self) -> None:
        """Times as many calls as a sample takes, after some that are not timed."""
        if self.once < SAMPLE_MS:
            self._calls(self.calls_in(WARM_MS))
        count = self.calls_in(SAMPLE_MS)
        self.times.append(self._calls(count) / count)
        self.once = min(self.once, self.times[-1])

    def calls_in(self, milliseconds: float) -> int:
        """How many calls take so long; at least one."""
        return max(1, min(_MOST_CALLS, round(milliseconds / max(self.once, _LEAST_MS))))

    def _calls(self, count: int) -> float:
        """Milliseconds of so many calls."""
        start = time.perf_counter()
        for _ in range(count):
            result = self.call()
            if not self.queued:
                jax.block_until_ready(result)  # type: ignore[no-untyped-call]
        jax.block_until_ready(result)  # type: ignore[no-untyped-call]
        return (time.perf_counter() - start) * 1e3

    @property
    def median(self) -> float:
        """Milliseconds per call."""
        return statistics.median(self.times)


def take_turns(programs: Sequence[Program], repeats: int = REPEATS, ends: float = math.inf) -> None:
    """Gives each program as many turns; which is first changes every time.

    Args:
      programs: warmed up.
      repeats: how many turns each has.
      ends: the time by `time.perf_counter` after which no other round is begun; there is always one.
    """
    for repeat in range(repeats):
        if repeat and time.perf_counter() >= ends:
            return
        for program in programs[:: -1 if repeat % 2 else 1]:
            program.take_turn()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of at least one value.

    The median is between the others, and all are between the least and the greatest value.
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
