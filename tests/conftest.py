"""Settings for every test: a silent broadcast between ranks is an error; in CI the examples are the same each time."""

import os

import jax
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile(
    "gate", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
if os.environ.get("CI"):
    settings.load_profile("gate")


def pytest_terminal_summary(terminalreporter):
    """Prints how many lying kernels the conformance kit caught."""
    tried = {
        outcome: sum("test_mutant_is_caught" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed")
    }
    if sum(tried.values()):
        terminalreporter.write_line(f"mutants caught: {tried['passed']} of {sum(tried.values())}")
