"""The conformance kit catches every lie, and passes honest kernels."""

import importlib.util
from pathlib import Path

import pytest
from honest_kernels import HONEST, HONEST_BACKWARD

from kernelry.testing.conformance import Outcome, cases_of, run, run_case

pytestmark = pytest.mark.sweep

_FOUND = importlib.util.spec_from_file_location("mutants", Path(__file__).parent / "mutants.py")
mutants = importlib.util.module_from_spec(_FOUND)
_FOUND.loader.exec_module(mutants)


def test_there_are_many_mutants_of_different_names():
    names = {mutant.spec.name for mutant in mutants.MUTANTS}
    assert len(names) == len(mutants.MUTANTS)


def _about(mutant, *, quick):
    return [case for case in cases_of(mutant.spec, quick=quick) if mutant.case in case.name]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.spec.name)
def test_mutant_is_caught(mutant):
    cases = _about(mutant, quick=True) or _about(mutant, quick=False)
    assert cases, f"the kit has no case about {mutant.case!r}"
    assert any(run_case(case).outcome is Outcome.FAILED for case in cases)


@pytest.mark.parametrize("honest", [HONEST, HONEST_BACKWARD], ids=lambda spec: spec.name)
def test_honest_kernel_passes_everything(honest):
    """The quick kit, and what of the full one catches a mutant that the quick one lets through."""
    report = run(honest, quick=True)
    assert report.ok, [(case.name, case.detail) for case in report.failures]
    ran = {case.name for case in report.cases}
    full_only = {mutant.case for mutant in mutants.MUTANTS if not any(mutant.case in name for name in ran)}
    more = [case for case in cases_of(honest) if any(name in case.name for name in full_only)]
    results = [run_case(case) for case in more]
    assert len(results) > 5
    assert all(result.outcome is Outcome.PASSED for result in results), [(r.name, r.detail) for r in results]
