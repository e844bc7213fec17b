"""Programs and their milliseconds."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from typing import Any, final

import jax

from on_device.calls import AbsentError

_WARM_UP = 2
_ENOUGH_MS = 10.0
"""Accelerator calls are queued until a sample takes about this long, so that launching them hides behind the work."""
_MOST_CALLS = 200
_ROOM = 0.9
"""Share of the free memory that a program may need: what else is loaded takes some."""


@final
@dataclasses.dataclass(slots=True)
class Program:
    """A compiled program, its work per call, what is known of it, and the milliseconds per call measured so far."""

    name: str
    run: Any
    arguments: tuple[Any, ...]
    flops: float = 0.0
    bytes: float = 0.0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: int = 1
    times: list[float] = dataclasses.field(default_factory=list)

    def sample(self) -> float:
        """Milliseconds per call. CPU calls wait for one another; an accelerator runs its queue in order."""
        start = time.perf_counter()
        for _ in range(self.calls):
            result = self.run(*self.arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) * 1e3 / self.calls

    def warm_up(self) -> None:
        for _ in range(_WARM_UP):
            once = self.sample()
        queued = math.ceil(_ENOUGH_MS / max(once, 1e-3))
        self.calls = 1 if jax.default_backend() == "cpu" else min(_MOST_CALLS, queued)

    def to_json(self) -> dict[str, Any]:
        low, median, high = statistics.quantiles(self.times, n=4) if len(self.times) > 1 else self.times * 3
        found = {"median_ms": median, "lower_quartile_ms": low, "upper_quartile_ms": high}
        if self.flops:
            found["tflop_per_s"] = self.flops / median / 1e9
        if self.bytes:
            found["gb_per_s"] = self.bytes / median / 1e6
        counts = {"samples": len(self.times), "calls_per_sample": self.calls}
        return self.facts | {name: float(f"{value:.5g}") for name, value in found.items()} | counts


def take_turns(programs: list[Program], repeats: int, clock: Any) -> None:
    """Samples all programs in turn, back and forth, so that none has the cool machine to itself."""
    for repeat in range(repeats):
        if repeat and clock.is_over:
            return
        for program in programs[:: -1 if repeat % 2 else 1]:
            program.times.append(program.sample())


def check_room(compiled: Any) -> None:
    """Raises AbsentError where a program needs more memory than there is: on a CPU the system would end the run."""
    wanted = compiled.memory_analysis()
    needs, free = wanted.temp_size_in_bytes + wanted.output_size_in_bytes, _free_bytes()
    if needs > _ROOM * free:
        raise AbsentError("too large", f"needs {needs / 2**30:.1f} GiB besides its inputs; {free / 2**30:.1f} are free")


def _free_bytes() -> float:
    found = jax.devices()[0].memory_stats()
    if found and "bytes_limit" in found:
        return float(found["bytes_limit"] - found["bytes_in_use"])
    if jax.default_backend() != "cpu":
        return math.inf
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
