"""What the plugins' kernels serve of the conformance kit: the counts of served.json may only grow."""

import json
from pathlib import Path

import pytest

import kernelry
from kernelry.testing.conformance import run

LEAST = json.loads((Path(__file__).parent / "served.json").read_text(encoding="utf-8"))
INSTALLED = {kernel.name: kernel.spec for kernel in kernelry.kernels()}


def test_every_kernel_has_a_count():
    assert set(LEAST) == set(INSTALLED)


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", sorted(LEAST))
def test_quick_run_is_clean_and_serves_no_less_than_before(kernel):
    report = run(INSTALLED[kernel], quick=True)
    assert report.ok, [(case.name, case.detail) for case in report.failures]
    assert report.served >= LEAST[kernel]["quick"] or not report.runs_here
