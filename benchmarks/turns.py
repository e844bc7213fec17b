"""Programs of one process that take turns on a CPU, so that other work on the machine meets all of them alike."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPEATS = 9
WARM_MS = 3.0
"""Untimed calls at the start of a turn take this long, or one call where a call takes up to as long as a sample:
OpenMP's threads, which torch uses, spin for about a millisecond after a call and slow down the next program."""
SAMPLE_MS = 10.0
"""Calls are timed together until a sample takes about this long."""


@dataclasses.dataclass
class Program:
    """Something to call, which blocks until it is done, and the milliseconds per call of each of its turns.

    `temporary` are the bytes that it needs on top of its arguments and results, where they are known.
    """

    name: str
    call: Callable[[], Any]
    temporary: int | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    once: float = 0.0

    def warm_up(self) -> None:
        """The first call, which compiles, and one more; of short calls three."""
        self._calls(1)
        self.once = self._calls(1)
        if self.once < SAMPLE_MS:
            self.once = min(self.once, self._calls(1), self._calls(1))

    def take_turn(self) -> None:
        if self.once < SAMPLE_MS:
            self._calls(max(1, round(WARM_MS / self.once)))
        count = max(1, round(SAMPLE_MS / self.once))
        self.times.append(self._calls(count) / count)
        self.once = min(self.once, self.times[-1])

    def _calls(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self.call()
        return (time.perf_counter() - start) * 1e3

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def take_turns(programs: Sequence[Program], repeats: int = REPEATS) -> None:
    """Each program has [repeats] turns; who goes first changes every time."""
    for repeat in range(repeats):
        for program in programs[:: -1 if repeat % 2 else 1]:
            program.take_turn()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return low, median, high


def ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of times that were taken in the same turns."""
    return quartiles([one / other for one, other in zip(over, under, strict=False)])


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    """As many significant digits, for JSON."""
    return [float(f"{value:.{digits}g}") for value in values]


def facts(*distributions: str) -> dict[str, Any]:
    """The day, the CPU with what it can do, and the versions of these distributions."""
    versions = {"python": platform.python_version()}
    for name in distributions:
        versions[name] = importlib.metadata.version(name)
    return {"date": datetime.date.today().isoformat(), "cpu": _cpu(), "cores": os.cpu_count(), "versions": versions}


def _cpu() -> dict[str, Any]:
    """Its model and the vector extensions that matter here, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"model": platform.processor() or platform.machine(), "features": []}
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", told.get("Features", "")).split()
    wanted = ("avx", "fma", "amx", "asimd", "sve", "bf16")
    return {
        "model": told.get("model name", platform.machine()),
        "features": sorted(flag for flag in flags if flag.startswith(wanted)),
    }
