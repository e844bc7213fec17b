"""The kit for kernels that are installed, by name."""

from __future__ import annotations

import dataclasses
import functools
import gc
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import final

from kernelry.errors import ArgumentError, PluginError, nearest
from kernelry.kernel.spec import KernelSpec
from kernelry.registry import installed
from kernelry.testing.conformance.generate import cases_of
from kernelry.testing.conformance.host import KernelHost
from kernelry.testing.conformance.report import Case, CaseResult, Outcome, Report
from kernelry.testing.conformance.run import known_names, run_case

_SHARE = 16
"""Cases that a worker process takes at a time: few, so that all end together; many, so that they share programs."""


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

    def test(self) -> None:
        """Runs it as a test of pytest.

        Raises:
          AssertionError: the kernel was wrong, or right where its author says that it is wrong. Where this machine
            cannot tell the test is skipped, and where the kernel fails as its author says it is an expected failure.
        """
        import pytest  # for those who test with it

        result = self.run()
        if result.outcome is Outcome.SKIPPED:
            pytest.skip(result.detail)
        if result.outcome is Outcome.KNOWN_FAILURE:
            pytest.xfail(result.detail)
        assert not result.outcome.is_bad, f"{result.outcome.value}: {result.detail}"

    def __str__(self) -> str:
        return f"{self.kernel}: {self.case.name}"


def installed_spec(name: str) -> KernelSpec:
    """Finds an installed kernel.

    Raises:
      PluginError: plugins claim that name twice, or the kernel was left out.
      ArgumentError: none has that name; names what is wrong with the installed plugins, which may be the reason.
    """
    found = installed.registry()
    if name not in found.kernels:
        found.check_name(name)
        faults = "".join(f"\n  plugin {fault}" for fault in found.faults)
        why = f"\nWhat is wrong with the installed plugins:{faults}" if faults else ""
        raise ArgumentError(f"no installed kernel is named {name!r}{nearest(name, found.kernels)}{why}")
    return found.kernels[name].spec


def assignments(name: str, *, quick: bool = False) -> tuple[Assignment, ...]:
    """The cases of an installed kernel.

    Raises:
      ArgumentError: no installed kernel has that name.
    """
    spec = installed_spec(name)
    known = dict(spec.known_failures)
    return tuple(Assignment(name, case, known.get(case.name)) for case in cases_of(spec, quick))


def run_in_processes(
    names: Iterable[str],
    *,
    workers: int,
    quick: bool = False,
    known_failures: Mapping[str, Mapping[str, str]],
    progress: Callable[[int, int], None],
) -> list[Report]:
    """Runs the kits of installed kernels in several processes; the reports are those of `run`, in the names' order.

    Args:
      names: of the kernels.
      workers: processes.
      quick: as in `run`.
      known_failures: by kernel, as in `run`.
      progress: told how many of how many shares of the cases have run.

    Raises:
      ArgumentError: no installed kernel has one of the names, or a known failure names no case of its kernel.
      PluginError: a process died.
    """
    specs = [installed_spec(name) for name in names]
    shares: list[tuple[str, Future[tuple[CaseResult, ...]]]] = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _collect_rarely) as pool:
        for spec in specs:
            known = known_names(spec, known_failures.get(spec.name, {}), quick=quick)
            for start in range(0, len(cases_of(spec, quick)), _SHARE):
                shares.append((spec.name, pool.submit(_share, spec.name, quick, start, known)))
        total, done = len(shares), as_completed(future for _, future in shares)
        for count, _ in enumerate(done, 1):
            progress(count, total)
    found: dict[str, tuple[CaseResult, ...]] = {spec.name: () for spec in specs}
    for name, future in shares:
        found[name] += _result(name, future)
    return [Report(spec.name, found[spec.name], KernelHost.of(spec).why_not is None) for spec in specs]


def _collect_rarely() -> None:
    """Jaxprs are many small objects that live on: looking for garbage among them takes a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def _result(name: str, future: Future[tuple[CaseResult, ...]]) -> tuple[CaseResult, ...]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise PluginError(
            f"a process died in or after the cases of {name!r}; `--workers 1` runs all of them in one, so that the "
            "last one named is the one that died."
        ) from error


@functools.cache
def _cases(name: str, quick: bool) -> tuple[Case, ...]:
    return cases_of(installed_spec(name), quick)


def _share(name: str, quick: bool, start: int, known: Mapping[str, str]) -> tuple[CaseResult, ...]:
    return tuple(run_case(case, known.get(case.name)) for case in _cases(name, quick)[start : start + _SHARE])
