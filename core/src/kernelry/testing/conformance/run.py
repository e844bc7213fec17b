"""Runs the cases of a kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from kernelry.errors import ArgumentError, nearest
from kernelry.kernel.spec import KernelSpec
from kernelry.testing.conformance.generate import cases_of
from kernelry.testing.conformance.host import KernelHost
from kernelry.testing.conformance.report import Case, CaseResult, Outcome, Report, Skip, Verdict

Progress = Callable[[int, int, str], None]
"""Called before each case with its number from 0, the number of all cases, and its name."""

_NONE: Mapping[str, str] = MappingProxyType({})
_LONGEST_DETAIL = 1200
"""Characters of an exception that a report keeps."""


def run(
    spec: KernelSpec,
    *,
    quick: bool = False,
    known_failures: Mapping[str, str] = _NONE,
    progress: Progress | None = None,
) -> Report:
    """Tests a kernel against what it declares.

    Args:
      spec: the kernel; it need not be installed.
      quick: a thinned, deterministic subset of the cases.
      known_failures: case names with reasons, besides those of `spec.known_failures`; strict: such a case
        that passes fails the run.
      progress: told of each case before it runs.

    Raises:
      ArgumentError: a known failure names no case of this kernel.
    """
    cases, known = cases_of(spec, quick), known_names(spec, known_failures, quick=quick)
    results = []
    for index, case in enumerate(cases):
        if progress is not None:
            progress(index, len(cases), case.name)
        results.append(run_case(case, known.get(case.name)))
    return Report(spec.name, tuple(results), runs_here=KernelHost.of(spec).why_not is None)


def run_case(case: Case, known_failure: str | None = None) -> CaseResult:
    """Runs one case.

    Args:
      case: what to run.
      known_failure: the author's reason why it fails; None where it should pass.
    """
    start = time.perf_counter()
    outcome, detail = _verdict(case)
    if known_failure is not None and outcome is Outcome.FAILED:
        outcome, detail = Outcome.KNOWN_FAILURE, f"{known_failure}: {detail}"
    elif known_failure is not None and outcome in (Outcome.PASSED, Outcome.REFUSED):
        outcome = Outcome.UNEXPECTED_PASS
        detail = f"listed as a known failure ({known_failure}), but it is right: strike it from the list"
    return CaseResult(case.name, case.claim, outcome, detail, time.perf_counter() - start)


def _verdict(case: Case) -> Verdict:
    try:
        return case.check() or (Outcome.PASSED, "")
    except Skip as reason:
        return Outcome.SKIPPED, str(reason)
    except AssertionError as error:
        return Outcome.FAILED, str(error)[:_LONGEST_DETAIL]
    except Exception as error:  # whatever a kernel raises on a call that it accepted is its failure
        return Outcome.FAILED, f"{type(error).__name__}: {error}"[:_LONGEST_DETAIL]


def known_names(spec: KernelSpec, more: Mapping[str, str], *, quick: bool) -> dict[str, str]:
    """The kernel's own known failures and more of them, by case.

    Raises:
      ArgumentError: one names no case of this kernel.
    """
    known = {**dict(spec.known_failures), **more}
    names = (
        {case.name for case in cases_of(spec)} if known and not quick else known.keys()
    )  # a quick run has fewer names
    for name in known:
        if name not in names:
            raise ArgumentError(f"known failures: {spec.name} has no case {name!r}{nearest(name, names)}")
    return known
