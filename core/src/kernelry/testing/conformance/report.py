"""The cases of the conformance kit, and what a run of them found."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from typing import Any, final

DECLARATIONS = "declarations"
"""The claim of cases that read what a kernel declares, and run nothing."""


@final
class Outcome(enum.Enum):
    """How a case ended.

    PASSED: the kernel was right. REFUSED: it refused, as it should, what it does not declare.
    SKIPPED: this machine cannot tell; `detail` says why. FAILED: it was wrong. KNOWN_FAILURE: it was wrong where
    its author said so. UNEXPECTED_PASS: it was right where its author said that it is wrong: the list is out of date.
    """

    PASSED = "passed"
    REFUSED = "refused"
    SKIPPED = "skipped"
    FAILED = "failed"
    KNOWN_FAILURE = "known failure"
    UNEXPECTED_PASS = "unexpected pass"

    @property
    def is_bad(self) -> bool:
        """True for what fails a run."""
        return self in (Outcome.FAILED, Outcome.UNEXPECTED_PASS)


Verdict = tuple[Outcome, str]
"""How a case ended, and why."""


class Skip(Exception):  # noqa: N818  # no error: this machine cannot decide
    """Raised by a check that cannot be made here; the message says why."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A named check of one claim.

    Args:
      name: unique within a kernel; known failures are listed by it.
      claim: the group it is reported under.
      check: makes the check, and returns nothing where the kernel is right; raises AssertionError or any other
        exception where it is wrong, and Skip where this machine cannot tell.
    """

    name: str
    claim: str
    check: Callable[[], Verdict | None]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CaseResult:
    """A case that ran: its name, the claim that it tests, how it ended, why, and how many seconds it took."""

    name: str
    claim: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**dataclasses.asdict(self), "outcome": self.outcome.value, "seconds": round(self.seconds, 3)}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The results of all cases of one kernel.

    Args:
      kernel: its name.
      cases: in the order in which they ran.
      runs_here: whether this machine can run the kernel; where it cannot, only refusals were tested.
    """

    kernel: str
    cases: tuple[CaseResult, ...]
    runs_here: bool = True

    @property
    def passed(self) -> int:
        """Cases that were right."""
        return self._count(Outcome.PASSED)

    @property
    def served(self) -> int:
        """Cases in which the kernel computed something that was right; this number must never decrease."""
        return sum(case.outcome is Outcome.PASSED and case.claim != DECLARATIONS for case in self.cases)

    @property
    def failed(self) -> int:
        """Cases that fail the run, unexpected passes included."""
        return sum(case.outcome.is_bad for case in self.cases)

    @property
    def refused(self) -> int:
        """Cases that were refused as they should be."""
        return self._count(Outcome.REFUSED)

    @property
    def skipped(self) -> int:
        """Cases that this machine cannot decide."""
        return self._count(Outcome.SKIPPED)

    @property
    def known_failures(self) -> int:
        """Cases that fail as the author said."""
        return self._count(Outcome.KNOWN_FAILURE)

    @property
    def ok(self) -> bool:
        """Nothing failed, and a kernel that can run here served something: refusing everything does not pass."""
        return not self.failed and (self.served > 0 or not self.runs_here)

    @property
    def seconds(self) -> float:
        """The time of all cases."""
        return sum(case.seconds for case in self.cases)

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        """The cases that fail the run."""
        return tuple(case for case in self.cases if case.outcome.is_bad)

    def by_claim(self) -> dict[str, tuple[CaseResult, ...]]:
        """The cases of each claim, in the order in which the claims first appear."""
        claims = dict.fromkeys(case.claim for case in self.cases)
        return {claim: tuple(case for case in self.cases if case.claim == claim) for claim in claims}

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: kernel, ok, runs_here, counts, cases."""
        return {
            "kernel": self.kernel,
            "ok": self.ok,
            "runs_here": self.runs_here,
            "counts": counts_of(self.cases),
            "cases": [case.to_json() for case in self.cases],
        }

    def _count(self, outcome: Outcome) -> int:
        return sum(case.outcome is outcome for case in self.cases)


def counts_of(cases: Iterable[CaseResult]) -> dict[str, int]:
    """How many cases ended in each way, by the outcome's name."""
    outcomes = [case.outcome for case in cases]
    return {outcome.value: outcomes.count(outcome) for outcome in Outcome}
