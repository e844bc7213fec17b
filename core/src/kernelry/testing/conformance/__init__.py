"""The conformance kit: checks that a kernel does everything it declares, and refuses everything else.

`run(spec)` returns a `Report`; `kernelry conformance NAME` and
`pytest --pyargs kernelry.testing --kernelry-kernel NAME` are the same kit at the command line.
"""

from kernelry.testing.conformance.generate import cases_of
from kernelry.testing.conformance.installed import Assignment, assignments, installed_spec, run_in_processes
from kernelry.testing.conformance.report import Case, CaseResult, Outcome, Report
from kernelry.testing.conformance.run import Progress, run, run_case

__all__ = [
    "Assignment",
    "Case",
    "CaseResult",
    "Outcome",
    "Progress",
    "Report",
    "assignments",
    "cases_of",
    "installed_spec",
    "run",
    "run_case",
    "run_in_processes",
]
