"""The kit for kernels that are installed, by name."""

from __future__ import annotations

import dataclasses
from typing import final

from kernelry.errors import ArgumentError, nearest
from kernelry.kernel.spec import KernelSpec
from kernelry.registry import installed
from kernelry.testing.conformance.cases import Case
from kernelry.testing.conformance.generate import cases_of
from kernelry.testing.conformance.report import CaseResult
from kernelry.testing.conformance.run import run_case


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """A kernel's case, with the author's reason where it is known to fail."""

    kernel: str
    case: Case
    known_failure: str | None = None

    def run(self) -> CaseResult:
        """Runs it."""
        return run_case(self.case, self.known_failure)

    def __str__(self) -> str:
        return f"{self.kernel}: {self.case.name}"


def installed_spec(name: str) -> KernelSpec:
    """Finds an installed kernel.

    Raises:
      ArgumentError: none has that name.
    """
    found = installed.registry().kernels
    if name not in found:
        raise ArgumentError(f"no installed kernel is named {name!r}{nearest(name, found)}")
    return found[name].spec


def assignments(name: str, *, quick: bool = False) -> tuple[Assignment, ...]:
    """The cases of an installed kernel.

    Raises:
      ArgumentError: no installed kernel has that name.
    """
    spec = installed_spec(name)
    known = dict(spec.known_failures)
    return tuple(Assignment(name, case, known.get(case.name)) for case in cases_of(spec, quick))
