"""The conformance kit as tests: `pytest --pyargs kernelry.testing --kernelry-kernel NAME [--kernelry-quick]`."""

from __future__ import annotations

import pytest

from kernelry.testing.conformance import Assignment, Outcome


def test_conformance(kernelry_case: Assignment | None) -> None:
    """The kernel does what it declares, and refuses the rest."""
    if kernelry_case is None:
        pytest.skip("name a kernel: pytest --pyargs kernelry.testing --kernelry-kernel NAME")
    result = kernelry_case.run()
    if result.outcome is Outcome.SKIPPED:
        pytest.skip(result.detail)
    if result.outcome is Outcome.KNOWN_FAILURE:
        pytest.xfail(result.detail)
    assert not result.outcome.is_bad, f"{result.outcome.value}: {result.detail}"
