"""Which vendor libraries and drivers are present: facts a kernel may ask for while refusing."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Iterator
from typing import final

from kernelry.kernel.refusal import Refusal, RefusalCode

_RELEASE = re.compile(r"(\d+(\.\d+)*)?")
"""The numbers that a version begins with; it always matches."""


@final
class Knowledge(enum.Enum):
    """How an Environment answers: by looking, by assuming, or not at all."""

    PROBED = "probed"
    ASSUMED = "assumed"
    NOT_PROBED = "not probed"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Vendor:
    """An answer about one distribution: `version` is None when it is known to be absent."""

    distribution: str
    version: str | None
    knowledge: Knowledge

    @property
    def missing(self) -> bool:
        """True only when the distribution was looked for and not found."""
        return self.knowledge is Knowledge.PROBED and self.version is None

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers of the version, (2, 21) for `2.21rc1`, to compare with those of a release; () without one."""
        return tuple(map(int, re.findall(r"\d+", _RELEASE.match(self.version or "")[0])))  # type: ignore[index]

    def refusals(self, remedy: str) -> Iterator[Refusal]:
        """Refuses a request where the distribution is missing; `remedy` is the pip command that brings it."""
        if self.missing:
            detail = f"{self.distribution.replace('_', '-')} is not installed"
            yield Refusal(RefusalCode.VENDOR_MISSING, detail, remedy)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """The vendor facts of the machine where a request would run.

    On this machine, questions are answered by looking; for the Target of another one the answers are assumed in the
    kernel's favour, and for a candidate that is not about to win nothing is asked. `versions` are facts stated
    beforehand, e.g. by a test or of a recorded machine; they override what is found here.
    """

    knowledge: Knowledge = Knowledge.PROBED
    versions: tuple[tuple[str, str | None], ...] = ()
    _unanswered: list[str] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    def vendor(self, distribution: str) -> Vendor:
        """Returns what is known of an installed distribution. Imports nothing."""
        stated = dict(self.versions)
        if distribution in stated:
            return Vendor(distribution, stated[distribution], Knowledge.PROBED)
        if self.knowledge is not Knowledge.PROBED:
            self._unanswered.append(distribution)
            return Vendor(distribution, None, self.knowledge)
        return Vendor(distribution, _installed_version(distribution), Knowledge.PROBED)

    def probe(self, question: Callable[[], str | None]) -> str | None:
        """Asks a question that may import a vendor or touch a driver.

        Args:
          question: returns None when all is well, else the reason why not: a module-level function, or an object
            that is called and compares by value where the question has facts of its own. Each is asked once per
            process, and only when looking is allowed.
        """
        if self.knowledge is not Knowledge.PROBED:
            self._unanswered.append(question.__name__)
            return None
        return _answer(question)

    @property
    def left_open(self) -> bool:
        """Whether this Environment was asked something that it did not look up."""
        return bool(self._unanswered)

    def fresh(self) -> Environment:
        """Returns an equal Environment that was asked nothing so far."""
        return dataclasses.replace(self)

    def without_probing(self) -> Environment:
        """Returns the same Environment for candidates that are not about to win."""
        if self.knowledge is Knowledge.PROBED:
            return dataclasses.replace(self, knowledge=Knowledge.NOT_PROBED)
        return self


@functools.lru_cache(maxsize=256)
def _installed_version(distribution: str) -> str | None:
    import importlib_metadata  # not needed to import kernelry

    try:
        return importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=256)
def _answer(question: Callable[[], str | None]) -> str | None:
    return question()
