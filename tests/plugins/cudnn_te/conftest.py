"""The tests in this folder run beside a real transformer_engine, whose folder TRANSFORMER_ENGINE names.

`make test-te` runs them beside each version; without the variable nothing here is collected, so what needs no
transformer_engine belongs in the folder above. Fused attention computes on CPU, on four devices; a test marked
`te(since="2.20")` or `te(before="2.14")` is left out beside other versions, `te(served=True)` beside those that
cudnn_te refuses.
"""

import os
import warnings

import jax
import pytest
import transformer_engine_on_cpu
import transformer_engine_stand_in as stand_in

FOLDER = os.environ.get("TRANSFORMER_ENGINE")
DEVICES = 4

collect_ignore_glob = [] if FOLDER else ["test_*.py"]

if FOLDER:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    stand_in.install(FOLDER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jax.interpreters.pxla.thread_resources", DeprecationWarning)
        transformer_engine_on_cpu.register()


def _version(text):
    return tuple(int(part) for part in text.split("."))


_REFUSED = ((2, 12), (2, 13))


def _is_wanted(item):
    marks = [mark.kwargs for mark in item.iter_markers("te")]
    in_range = all(
        _version(mark.get("since", "0")) <= stand_in.version() < _version(mark.get("before", "9999")) for mark in marks
    )
    return in_range and not (stand_in.version()[:2] in _REFUSED and any(mark.get("served") for mark in marks))


def pytest_collection_modifyitems(config, items):
    if not FOLDER:
        return
    unwanted = [item for item in items if not _is_wanted(item)]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in unwanted]


def pytest_report_header():
    return f"transformer_engine {'.'.join(map(str, stand_in.version()))} from {FOLDER}" if FOLDER else None


@pytest.fixture
def mesh():
    """Four CPU devices along "context", set as the mesh; programs over it are not kept, since a partitioner's address
    is part of what they are found by."""
    kept = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    made = jax.make_mesh((DEVICES,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(made):
        yield made
    jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)
