"""The registry in processes of its own, among the plugins that are really installed."""

import re

import pytest

pytestmark = pytest.mark.versions

ATTENDS = """
import importlib_metadata
calls, scan = [], importlib_metadata.entry_points
importlib_metadata.entry_points = lambda **how: calls.append(how) or scan(**how)
import jax
import jax.numpy as jnp
import kernelry
array = jnp.ones((1, 4, 2, 8))
jax.jit(lambda x: kernelry.attention(x, x, x))(array)
import constant
out = kernelry.attention(array, array, array, kernel="dot_product")
assert (abs(out - 1) < 1e-6).all()
kernelry.kernels()
kernelry.plugins()
print(len(calls), constant.CONSTANT.sum())
"""


@pytest.fixture(scope="module")
def done(make_shelf):
    """A process that lists and attends, jitted and not, among broken plugins and under a misspelt variable."""
    shelf = make_shelf()
    shelf.put("broken", "1 / 0")
    shelf.put("outdated", "contract = (0, 0)")
    shelf.put("constant", "import jax.numpy as jnp\nCONSTANT = jnp.ones(3) + 1\ncontract = (1, 1)")
    return shelf.run(ATTENDS, KERNELRY_KERNAL="dot_product")


def test_process_with_broken_plugins_warns_once_for_each_and_attends(done):
    warned = re.findall(r"kernelry plugin (\w+) \[(\w+ 1\.0)\]: ([\w ]+):", done.stderr)
    ours = [fault for fault in warned if fault[0] in ("broken", "outdated", "constant", "healthy")]
    assert ours == [("broken", "broken 1.0", "import error"), ("outdated", "outdated 1.0", "unsupported contract")]


def test_process_scans_the_entry_points_once(done):
    assert done.stdout.split()[0] == "1"


def test_process_loads_plugins_under_a_trace_without_leaking_it(done):
    assert done.stdout.split()[1] == "6.0"


def test_process_with_unknown_variable_warns(done):
    words = "unknown environment variable KERNELRY_KERNAL is ignored; did you mean 'KERNELRY_KERNEL'"
    assert done.stderr.count(words) == 1


def test_process_without_plugins_lists_no_kernels(shelf):
    done = shelf.run("import kernelry; print(kernelry.kernels())", KERNELRY_PLUGINS="")
    assert done.stdout == "()\n"


def test_process_with_unknown_name_in_allow_list_raises(shelf):
    code = """
import jax.numpy as jnp
import kernelry
array = jnp.ones((1, 4, 2, 8))
try:
    kernelry.attention(array, array, array)
except kernelry.errors.PluginError as error:
    print(error)
"""
    done = shelf.run(code, KERNELRY_PLUGINS="dot_produkt")
    assert "names 'dot_produkt', which is not installed; did you mean 'dot_product'?" in done.stdout
