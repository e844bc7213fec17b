"""The conformance kit on the device, kernel by kernel, as far as the time goes."""

from __future__ import annotations

from typing import Any

from kernelry.testing.conformance import Outcome, Report, assignments, installed_spec
from kernelry.testing.conformance.host import KernelHost
from on_device.clock import Clock

SHARE = 0.3
"""Of the time that is left, what the kit may take when the minutes are limited."""


def conformance(kernel: str, *, quick: bool, seconds: float, clock: Clock) -> dict[str, Any]:
    """Counts, the cases that failed, and those that `seconds` were too few for."""
    spec, cases, results = installed_spec(kernel), assignments(kernel, quick=quick), []
    least = clock.left - seconds
    for each in cases:
        if clock.left <= least or clock.is_over:
            break
        results.append(each.run())
    report = Report(kernel, tuple(results), runs_here=KernelHost.of(spec).why_not is None)
    missed = [each.case.name for each in cases[len(results) :]]
    ok = not report.failed if missed else report.ok  # a kernel that was cut short need not have served anything yet
    found = {key: value for key, value in report.to_json().items() if key != "cases"} | {"ok": ok, "cases": len(cases)}
    odd = [case.to_json() for case in results if case.outcome.is_bad or case.outcome is Outcome.KNOWN_FAILURE]
    return found | {"interpreted": KernelHost.of(spec).interpreted, "failures": odd, "not_reached": missed}
