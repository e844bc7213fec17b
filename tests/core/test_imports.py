"""Importing kernelry and listing kernels imports no vendor and no optional library."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.versions

VENDORS = ("jax.experimental.pallas", "tokamax", "transformer_engine")
OPTIONAL = ("flax", "typer", "rich", "pydantic")

ONE_AFTER_ANOTHER = """
import importlib, io, json, sys
out, loaded = sys.stdout, []
import kernelry
assert kernelry.kernels() and kernelry.plugins()
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


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The modules loaded by listing, then by the command, then by importing every library watched: one process."""
    folder = tmp_path_factory.mktemp("vendors")
    for name in ("tokamax", "transformer_engine"):
        (folder / f"{name}.py").touch()
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("KERNELRY_", "PYTHON"))}
    environ |= {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER]
    watched = json.dumps([*VENDORS, *OPTIONAL])
    done = subprocess.run(
        command, env=environ, cwd=folder, input=watched, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout)]


def test_listing_imports_no_vendor_and_no_extra(modules):
    assert modules[0].isdisjoint((*VENDORS, *OPTIONAL))


def test_list_command_imports_no_vendor(modules):
    assert modules[1].isdisjoint(VENDORS)


def test_watched_libraries_would_be_seen(modules):
    assert modules[2].issuperset((*VENDORS, *OPTIONAL))
