"""The registry in a process of its own, among the plugins that are really installed."""

import re

BEGIN = """
import jax
import jax.numpy as jnp
import kernelry
array = jnp.ones((1, 4, 2, 8))
"""
ATTEND = (
    BEGIN
    + """
out = kernelry.attention(array, array, array, kernel="dot_product")
assert (abs(out - 1) < 1e-6).all()
"""
)


def test_process_with_broken_plugins_warns_once_for_each_and_attends(shelf):
    shelf.put("broken", "1 / 0")
    shelf.put("outdated", "contract = (0, 0)")
    done = shelf.run(ATTEND + "kernelry.kernels()\nkernelry.plugins()")
    warned = re.findall(r"kernelry plugin (\w+) \[(\w+ 1\.0)\]: ([\w ]+):", done.stderr)
    ours = [fault for fault in warned if fault[0] in shelf.projects]
    assert ours == [("broken", "broken 1.0", "import error"), ("outdated", "outdated 1.0", "unsupported contract")]


COUNT = """
import importlib_metadata
calls, scan = [], importlib_metadata.entry_points
importlib_metadata.entry_points = lambda **how: calls.append(how) or scan(**how)
"""


def test_process_scans_the_entry_points_once(shelf):
    rest = "kernelry.attention(array, array, array)\nkernelry.kernels()\nkernelry.plugins()\nprint(len(calls))"
    assert shelf.run(COUNT + ATTEND + rest).stdout == "1\n"


def test_process_without_plugins_lists_no_kernels(shelf):
    done = shelf.run("import kernelry; print(kernelry.kernels())", KERNELRY_PLUGINS="")
    assert done.stdout == "()\n"


def test_process_with_unknown_name_in_allow_list_raises(shelf):
    code = """
try:
    kernelry.attention(array, array, array)
except kernelry.errors.PluginError as error:
    print(error)
"""
    done = shelf.run(BEGIN + code, KERNELRY_PLUGINS="dot_produkt")
    assert "names 'dot_produkt', which is not installed; did you mean 'dot_product'?" in done.stdout


def test_process_with_unknown_variable_warns(shelf):
    done = shelf.run("import kernelry; kernelry.kernels()", KERNELRY_KERNAL="dot_product")
    assert "unknown environment variable KERNELRY_KERNAL is ignored; did you mean 'KERNELRY_KERNEL'" in done.stderr


def test_process_loads_plugins_under_a_trace_without_leaking_it(shelf):
    shelf.put("constant", "import jax.numpy as jnp\nCONSTANT = jnp.ones(3) + 1\ncontract = (1, 1)")
    code = """
jax.jit(lambda x: kernelry.attention(x, x, x))(array)
import constant
print(constant.CONSTANT.sum())
"""
    assert shelf.run(BEGIN + code).stdout == "6.0\n"
