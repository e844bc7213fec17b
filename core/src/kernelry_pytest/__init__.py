"""The pytest plugin of the conformance kit: `pytest --pyargs kernelry.testing --kernelry-kernel NAME`.

It is outside the package kernelry because pytest imports it in every run of an environment, and kernelry imports
JAX, which a conftest.py must be able to set up first. What the options need is imported by the hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

FIXTURE = "kernelry_case"
"""The argument of the test that is given each case: a `kernelry.testing.conformance.Assignment`, or None."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("kernelry")
    group.addoption(
        "--kernelry-kernel",
        action="append",
        default=[],
        metavar="NAME",
        help="run the conformance kit on this installed kernel (repeatable); with --pyargs kernelry.testing",
    )
    group.addoption("--kernelry-quick", action="store_true", help="a thinned subset of the conformance cases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test of each case of the kernels named; without a name, one that says how to name some."""
    if FIXTURE not in metafunc.fixturenames:
        return
    assigned = _assigned(metafunc.config)
    metafunc.parametrize(FIXTURE, assigned or [None], ids=[str(each) for each in assigned] or ["no kernel"])


def _assigned(config: pytest.Config) -> list[Any]:
    names = config.getoption("--kernelry-kernel")
    if not names:
        return []
    import pytest

    from kernelry.errors import KernelryError
    from kernelry.testing.conformance import assignments

    try:
        return [each for name in names for each in assignments(name, quick=config.getoption("--kernelry-quick"))]
    except KernelryError as error:
        raise pytest.UsageError(str(error)) from error
