"""tokamax_mosaic through Mosaic GPU's compiler and NVIDIA's assembler: what it declares becomes machine code.

Compiled, not run: numbers are proven in JAX's interpreter of Mosaic GPU kernels, in tests/plugins.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

SCRIPT = Path(__file__).parents[1] / "support" / "mosaic_compilations.py"
CASES = (
    "full",
    "causal",
    "window",
    "later_chunk",
    "prefix",
    "packed",
    "dense_by_head",
    "bias",
    "short_bias",
    "sinks",
    "float16",
    "head_dim_16",
    "head_dim_64",
    "head_dim_80",
    "head_dim_192_128",
    "head_dim_256",
    "tilings",
)


@functools.cache
def _problems(target, *cases):
    pytest.importorskip("tokamax")
    vendor = pytest.importorskip("kernelry_gpu_pallas.tokamax_mosaic._vendor")
    if target == "gpu:b200" and not vendor.HAS_BLACKWELL:
        pytest.skip("served from tokamax 0.0.17 on")
    ran = subprocess.run([sys.executable, SCRIPT, target, *cases], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["gpu:h100", "gpu:b200"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_declared_compiles(target, case):
    assert _problems(target, *CASES)[case] is None


def test_gradients_of_head_dim_256_compile_on_hopper_and_are_refused_on_blackwell():
    case = "head_dim_256_with_gradients"
    assert _problems("gpu:h100", case)[case] is None
    assert "need more memory than a multiprocessor has" in _problems("gpu:b200", case)[case]
