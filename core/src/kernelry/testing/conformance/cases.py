"""One case of the kit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import final

from kernelry.testing.conformance.report import Outcome

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
      check: makes the check; raises AssertionError or any other exception where the kernel is wrong, and Skip
        where this machine cannot tell.
    """

    name: str
    claim: str
    check: Callable[[], Verdict]
