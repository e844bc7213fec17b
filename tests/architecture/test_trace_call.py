"""What one attention call and `import kernelry` go through does not grow unnoticed: see trace_call.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("trace_call.py")

# The most that `trace_call.py --kernel NAME` may find. Lower a number when the code gets better; before raising one,
# look with `--pairs` at which files were added.
BOUNDS = {
    "auto": {"modules": 29, "lines": 7_310, "crossings": 130, "functions": 204, "function_lines": 1_860},
    "dot_product": {"modules": 27, "lines": 6_720, "crossings": 114, "functions": 189, "function_lines": 1_760},
}
CLOSURE = {"closure_modules": 60, "closure_lines": 10_145, "bare_modules": 3}


def trace(kernel):
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KERNELRY_")} | {
        "KERNELRY_MEASUREMENTS": ""
    }
    command = [sys.executable, SCRIPT, "--kernel", kernel, "--json"]
    environ["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", BOUNDS)
def test_a_call_goes_through_no_more_than_before(kernel):
    found, bounds = trace(kernel), BOUNDS[kernel] | CLOSURE
    assert {name: found[name] for name in bounds if found[name] > bounds[name]} == {}, found
    assert all(found[name] > 0 for name in bounds), found
