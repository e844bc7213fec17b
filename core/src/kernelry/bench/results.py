"""What came out of a run, for programs and for people."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
import os
import platform
from collections.abc import Iterable, Sequence
from typing import Any, final

import jax

from kernelry.aot.work import Work
from kernelry.bench.cases import Case
from kernelry.bench.rulers import COPY, PRODUCT, Ruler
from kernelry.bench.turns import Program, quartiles
from kernelry.policy.store import versions_here, versions_of
from kernelry.resolution.explanation import Resolution

SCHEMA = 1
"""The version of the JSON."""


@final
class Kind(enum.Enum):
    """Whose attention it is."""

    KERNEL = "kernel"
    AUTO = "auto"
    PEER = "peer"


@final
class Outcome(enum.Enum):
    """What became of one that could have been timed."""

    TIMED = "timed"
    SAME = "same program"
    WRONG = "wrong"
    REFUSED = "refused"
    FAILED = "failed"
    TOO_LARGE = "too large"
    NOT_REACHED = "not reached"


@final
@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """One kernel, `auto` or a peer, of a case.

    Args:
      name: its name.
      kind: whose attention it is.
      outcome: what became of it.
      reason: why it was not timed, or is wrong; else a remark, or empty.
      resolution: of kernels and `auto`.
      same_as: the name of the row whose program it shares.
      program: its times.
      errors: relative errors, by the name of the array.
      compile_s: seconds of its compilation, while others may have been compiled.
    """

    name: str
    kind: Kind
    outcome: Outcome
    reason: str = ""
    resolution: Resolution | None = None
    same_as: str | None = None
    program: Program | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_s: float | None = None

    @property
    def is_timed(self) -> bool:
        """Whether it has times, and a right result."""
        return self.outcome is Outcome.TIMED and self.program is not None and bool(self.program.times)

    @property
    def median(self) -> float:
        """Milliseconds of a call; of one that has a program."""
        assert self.program is not None
        return self.program.median

    @property
    def plan(self) -> str:
        """The kernel, with the adapters around it."""
        if self.resolution is None or self.resolution.plan is None:
            return self.name
        steps = "".join(f" through {step.adapter.name}" for step in self.resolution.plan.steps)
        return f"{self.resolution.kernel}{steps}"


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What came out of a case.

    Args:
      case: the case.
      work: what it takes at least.
      rows: kernels, `auto` and peers.
      rulers: what they are compared with, by name.
    """

    case: Case
    work: Work
    rows: tuple[Row, ...]
    rulers: dict[str, Ruler]

    @property
    def timed(self) -> list[Row]:
        """Rows with times, the fastest first."""
        return sorted((row for row in self.rows if row.is_timed), key=lambda row: row.median)

    @property
    def fastest(self) -> Row | None:
        """The fastest kernel whose result is right."""
        return next((row for row in self.timed if row.kind is Kind.KERNEL), None)

    def program_of(self, row: Row) -> Row:
        """The row whose times are those of a row: itself, or the one whose program it shares."""
        return next((each for each in self.rows if each.name == row.same_as), row)

    @property
    def auto_share(self) -> float | None:
        """The speed of `auto` over that of the fastest kernel; None where one of them has no time."""
        auto = next((self.program_of(row) for row in self.rows if row.kind is Kind.AUTO), None)
        best = self.fastest
        if auto is None or best is None or not auto.is_timed:
            return None
        return best.median / auto.median

    @property
    def faults(self) -> list[str]:
        """Kernels, and `auto`, whose result is wrong or that failed, one line each; not peers."""
        found = [
            row for row in self.rows if row.outcome in (Outcome.WRONG, Outcome.FAILED) and row.kind is not Kind.PEER
        ]
        return [f"{self.case}: {row.name}: {row.outcome.value}: {row.reason}" for row in found]

    @property
    def not_reached(self) -> list[str]:
        """What the budget was too short for."""
        return [f"{self.case}: {row.name}" for row in self.rows if row.outcome is Outcome.NOT_REACHED]

    def rates(self, row: Row) -> dict[str, float]:
        """FLOP/s and bytes/s of a row with times, and their shares of what the device does."""
        seconds = row.median / 1e3
        found = {"flops_per_second": self.work.flops / seconds, "bytes_per_second": self.work.bytes / seconds}
        found["of_matrix_product"] = found["flops_per_second"] / self.rulers[PRODUCT].flops_per_second
        found["of_copy"] = found["bytes_per_second"] / self.rulers[COPY].bytes_per_second
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        rulers = {
            name: dict(ruler.facts) | _times(ruler.program)
            for name, ruler in self.rulers.items()
            if ruler.program.times
        }
        return {
            "name": self.case.name,
            "pass": self.case.which.value,
            "length": self.case.length,
            "request": self.case.request.to_json(),
            "flops": self.work.flops,
            "bytes": self.work.bytes,
            "assumed": list(self.work.assumed),
            "programs": [self._row(row) for row in self.rows],
            "rulers": rulers,
            "fastest": None if self.fastest is None else self.fastest.name,
            "auto_share": _digits(self.auto_share),
        }

    def _row(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {"name": row.name, "kind": row.kind.value, "outcome": row.outcome.value}
        found |= {"reason": row.reason} if row.reason else {}
        found |= {"same_as": row.same_as} if row.same_as else {}
        if row.resolution is not None and row.resolution.plan is not None:
            plan = row.resolution.plan
            found |= {"kernel": row.resolution.kernel, "adapters": [step.adapter.name for step in plan.steps]}
            found |= {"tiling": dict(plan.tiling.values)}
        if row.kind is Kind.AUTO and row.resolution is not None:
            found["rule"] = row.resolution.rule
        found |= {} if row.compile_s is None else {"compile_s": round(row.compile_s, 2)}
        if row.errors:
            found["relative_error"] = {
                name: float(f"{error:.3g}") if math.isfinite(error) else None for name, error in row.errors.items()
            }
        if row.program is not None and row.program.times:
            found |= _times(row.program)
            found |= {name: _digits(value) for name, value in self.rates(row).items()}
        return found


def _times(program: Program) -> dict[str, Any]:
    low, median, high = quartiles(program.times)
    named = {"lower_quartile_ms": low, "median_ms": median, "upper_quartile_ms": high}
    return {name: _digits(value) for name, value in named.items()} | {
        "turns": len(program.times),
        "temporary_bytes": program.temporary,
    }


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def machine(results: Iterable[Result] = ()) -> dict[str, Any]:
    """The device, the day, and the versions that times depend on: of JAX, the compiler, and the kernels' plugins.

    Args:
      results: whose kernels' distributions are named.
    """
    here = jax.devices()[0]
    versions = dict(versions_here())
    processor = versions.pop("processor")
    for result in results:
        for row in result.rows:
            winner = None if row.resolution is None else row.resolution.winner
            if winner is not None:
                versions |= dict(versions_of(here.platform, winner.distribution))
    versions.pop("processor", None)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": here.platform,
        "device_kind": here.device_kind,
        "devices": jax.device_count(),
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
    }


def to_json(results: Sequence[Result], not_reached: Sequence[str], crossings: Sequence[Any]) -> dict[str, Any]:
    """Returns a run as plain data; docs/bench.md describes it."""
    return {
        "schema": SCHEMA,
        "machine": machine(results),
        "cases": [result.to_json() for result in results],
        "crossings": [crossing.to_json() for crossing in crossings],
        "faults": [fault for result in results for fault in result.faults],
        "not_reached": [*not_reached, *(name for result in results for name in result.not_reached)],
    }
