"""Importing kernelry and listing kernels imports no vendor and no optional library."""

import json
import os
import subprocess
import sys

import pytest

import kernelry
from kernelry import _compat

pytestmark = pytest.mark.versions

VENDORS = ("jax.experimental.pallas", "tokamax", "transformer_engine")
OPTIONAL = ("flax", "typer", "rich", "pydantic")

ONE_AFTER_ANOTHER = """
import importlib, inspect, io, json, sys
out, loaded = sys.stdout, []
import kernelry
assert kernelry.kernels() and kernelry.plugins()
loaded.append(list(sys.modules))
submodules = ("aot", "cache", "config", "errors", "flax", "masks", "moba", "models", "parallel", "plugin", "testing")
assert set(submodules) <= set(dir(kernelry))
sys.modules["flax"] = None
assert set(submodules) - set(dir(kernelry)) == {"flax"} and dict(inspect.getmembers(kernelry))
try:
    kernelry.flax
except ImportError as error:
    loaded.append(str(error))
del sys.modules["flax"]
for name in [name for name in sys.modules if name.startswith("kernelry.flax")]:
    del sys.modules[name]
assert all(getattr(kernelry, name).__name__ == f"kernelry.{name}" for name in submodules)
loaded.append(list(sys.modules))
from kernelry.cli import main
sys.stdout, sys.argv = io.StringIO(), ["kernelry", "list", "--json"]
assert main() == 0 and "dot_product" in sys.stdout.getvalue()
loaded.append(list(sys.modules))
for name in json.loads(sys.stdin.read()):
    importlib.import_module(name)
loaded.append(list(sys.modules))
print(json.dumps(loaded), file=out)
"""

FIRST_USED_IN_A_TRACE = """
import json, sys
import jax, jax.numpy as jnp
before = set(sys.modules)
import kernelry
loaded = sorted(set(sys.modules) - before)

@jax.jit
def call(array):
    return kernelry.attention(array, array, array)

array = jnp.ones((1, 4, 1, 8))
call(array)
with kernelry.use(kernel="blockwise"), kernelry.record() as seen:
    call(array)
call(array)
print(json.dumps([loaded, [resolution.kernel for resolution in seen]]))
"""


def run(program, folder, given=""):
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("KERNELRY_", "PYTHON"))} | {
        "KERNELRY_MEASUREMENTS": ""
    }
    environ |= {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environ, cwd=folder, input=given, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """What one process has loaded step by step: by listing, without flax (a message), by submodules, by the command."""
    folder = tmp_path_factory.mktemp("vendors")
    for name in ("tokamax", "transformer_engine"):
        (folder / f"{name}.py").touch()
    return run(ONE_AFTER_ANOTHER, folder, json.dumps([*VENDORS, *OPTIONAL]))


def test_import_loads_little_and_a_scope_reaches_functions_that_were_jitted_before_it(tmp_path):
    loaded, kernels = run(FIRST_USED_IN_A_TRACE, tmp_path)
    assert [name for name in loaded if not name.startswith("jax.")] == [
        "kernelry",
        "kernelry._compat",
        "kernelry._version",
    ]
    assert [name for name in loaded if name.startswith(("jax.extend", "jax.experimental"))] == []
    assert kernels == ["blockwise"]


def test_names_are_found_on_first_use_and_listed():
    assert set(kernelry.__all__) <= set(dir(kernelry))
    assert all(getattr(kernelry, name) is getattr(kernelry, name) for name in kernelry.__all__)
    assert "attention" in vars(kernelry)  # kept, so that a call does not look for it again
    with pytest.raises(AttributeError, match="module 'kernelry' has no attribute 'atention'"):
        kernelry.atention  # noqa: B018


def test_primitives_are_of_the_class_that_jax_extend_has():
    from jax.extend.core import Primitive

    assert _compat._Primitive is Primitive


def test_listing_imports_no_vendor_and_nothing_of_the_command(modules):
    assert set(modules[0]).isdisjoint((*VENDORS, *OPTIONAL))


def test_listing_imports_no_config_no_phases_and_no_adapter(modules):
    needless = ("kernelry.config", "kernelry.phases", "kernelry.execution.adapters.order", "kernelry.kernel.proof")
    assert [name for name in modules[0] if name.startswith(needless)] == []


def test_flax_without_flax_says_what_to_install(modules):
    assert modules[1] == "kernelry.flax needs flax 0.12 or newer: pip install 'kernelry[flax]'."


def test_submodules_are_attributes_and_import_no_vendor(modules):
    assert set(modules[2]).isdisjoint(VENDORS)


def test_list_command_imports_no_vendor(modules):
    assert set(modules[3]).isdisjoint(VENDORS)


def test_watched_libraries_would_be_seen(modules):
    assert set(modules[4]).issuperset((*VENDORS, *OPTIONAL))
