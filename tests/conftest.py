"""Settings for every test: a silent broadcast between ranks is an error; in CI the examples are the same each time.

What was compiled once is kept in .jax_cache: most of a test's time goes into compiling what other tests compile, too. A
file's tests go to one worker, for they compile the same programs; files that share programs share a group.
"""

import collections
import gc
import os
from pathlib import Path

os.environ["KERNELRY_MEASUREMENTS"] = ""  # before kernelry reads it: what a user has measured decides nothing here

import jax
import platformdirs
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # what tests of meshes simulate; the others use the first
# The interpreter of TPUs calls back into Python, and waits for ever where that waits for what was dispatched before.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# Of all workers: a seventh of what one compiles, another has. A file that is read while it is written is no valid
# archive: then JAX warns and compiles.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _of_the_user(*_, **__):
    raise AssertionError("this test would read or write the cache directory of the user who runs it")


platformdirs.user_cache_path = _of_the_user

settings.register_profile(
    "gate", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
if os.environ.get("CI"):
    settings.load_profile("gate")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keeps the tests of a file on one worker, unless they name a group; marks those of plugins `versions`.

    A file of plugins that marks some itself has the others left out: what they ask is no matter of a version.
    """
    chosen = {item.path for item in items if item.get_closest_marker("versions")}
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if Path(__file__).parent / "plugins" in item.path.parents and item.path not in chosen:
            item.add_marker("versions")
    for repeated in _repeats(items):
        repeated.add_marker("repeats")


_CASES = 6
"""Of a test with more, so many run on the second Python: what depends on a version shows in some, or in all."""


def _repeats(items):
    """Yields the cases that the second Python leaves out: the others are spread evenly. Flywheel's run on no other."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("versions") and not item.path.stem.startswith("test_flywheel"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for found in cases.values():
        found.sort(key=lambda item: item.nodeid)
        if len(found) > _CASES:
            kept = {round(place * (len(found) - 1) / (_CASES - 1)) for place in range(_CASES)}
            yield from (item for place, item in enumerate(found) if place not in kept)


def pytest_collection_finish():
    """Looks for garbage less often: tracing makes many objects that live on, and the search took 7 % of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


_ENOUGH = 2**30
"""Bytes of memory above which a worker clears JAX's caches between files: each file compiles its own programs."""


def pytest_runtest_teardown(item, nextitem):
    """Keeps a worker below 2 GiB: JAX keeps each program, with the MLIR context it was lowered in."""
    if nextitem is not None and nextitem.path != item.path and _resident() > _ENOUGH:
        jax.clear_caches()


def _resident():
    """This process's memory in bytes; 0 where there is no /proc to ask."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def pytest_terminal_summary(terminalreporter):
    """Prints how many lying kernels the conformance kit caught."""
    tried = {
        outcome: sum("test_mutant_is_caught" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed")
    }
    if sum(tried.values()):
        terminalreporter.write_line(f"mutants caught: {tried['passed']} of {sum(tried.values())}")
