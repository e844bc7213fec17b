"""The conformance kit as tests: `pytest --pyargs kernelry.testing --kernelry-kernel NAME [--kernelry-quick]`."""

from __future__ import annotations

import pytest

from kernelry.testing.conformance import Assignment


def test_conformance(kernelry_case: Assignment | None) -> None:
    """The kernel does what it declares, and refuses the rest."""
    if kernelry_case is None:
        pytest.skip("name a kernel: pytest --pyargs kernelry.testing --kernelry-kernel NAME")
    kernelry_case.test()
