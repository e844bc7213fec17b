"""Settings for every test: a silent broadcast between ranks is an error; in CI the examples are the same each time.

What was compiled once is kept in .jax_cache: most of a test's time goes into compiling what other tests compile, too.
"""

import collections
import os
import random
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
# The interpreter of TPUs calls back into Python, and waits for ever where that waits for what was dispatched before.
jax.config.update("jax_cpu_enable_async_dispatch", False)
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")  # one folder each: a file may be read while it is written
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache" / _WORKER))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

settings.register_profile(
    "gate", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
if os.environ.get("CI"):
    settings.load_profile("gate")


def pytest_addoption(parser):
    parser.addoption(
        "--cases", type=int, metavar="N", help="of each parametrized test N cases, drawn once and for all; default: all"
    )


@pytest.hookimpl(trylast=True)  # after what marks deselect
def pytest_collection_modifyitems(config, items):
    """Keeps the cases that `--cases` asks for."""
    most = config.getoption("cases")
    if most is None:
        return
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for function, found in cases.items():
        kept.update(found if len(found) <= most else random.Random(function).sample(found, most))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_terminal_summary(terminalreporter):
    """Prints how many lying kernels the conformance kit caught."""
    tried = {
        outcome: sum("test_mutant_is_caught" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed")
    }
    if sum(tried.values()):
        terminalreporter.write_line(f"mutants caught: {tried['passed']} of {sum(tried.values())}")
