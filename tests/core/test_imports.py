"""Importing kernelry and listing kernels imports no vendor and no optional library."""

import json
import os
import subprocess
import sys

import pytest

VENDORS = ("jax.experimental.pallas", "tokamax", "transformer_engine")
OPTIONAL = ("flax", "typer", "rich", "pydantic")

LIST = """
import json, sys
import kernelry
assert kernelry.kernels() and kernelry.plugins()
print(json.dumps(list(sys.modules)))
"""
COMMAND = """
import io, json, sys
from kernelry.cli import main
out, sys.stdout, sys.argv = sys.stdout, io.StringIO(), ["kernelry", "list", "--json"]
assert main() == 0 and "dot_product" in sys.stdout.getvalue()
print(json.dumps(list(sys.modules)), file=out)
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Runs code where every library watched can be imported, and returns the modules it loaded."""
    folder = tmp_path_factory.mktemp("vendors")
    for name in ("tokamax", "transformer_engine"):
        (folder / f"{name}.py").touch()
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("KERNELRY_", "PYTHON"))}
    environ |= {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}

    def run(code):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environ, cwd=folder, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout))

    return run


def test_listing_imports_no_vendor_and_no_extra(modules):
    assert modules(LIST).isdisjoint((*VENDORS, *OPTIONAL))


def test_list_command_imports_no_vendor(modules):
    assert modules(COMMAND).isdisjoint(VENDORS)


def test_watched_libraries_would_be_seen(modules):
    wanted = (*VENDORS, *OPTIONAL)
    code = f"import json, sys, {', '.join(wanted)}; print(json.dumps(list(sys.modules)))"
    assert modules(code).issuperset(wanted)
