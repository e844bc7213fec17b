"""pallas_mha through XLA's and Triton's compilers for GPUs: what it declares compiles.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.plugin import Request
from kernelry_gpu_pallas.plugin import PALLAS_MHA

pytestmark = pytest.mark.aot

TARGETS = ("gpu:a100", "gpu:h100", "gpu:b200")
IDS = np.repeat([3, -1, 0, 5], 128)
MASKS = {"full": masks.Full(), "causal": masks.Causal(), "packed": masks.Causal() & masks.Segments(IDS[None])}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_compiles(target, name, shapes, training, compile_for):
    found = compile_for(target, training("pallas_mha", mask=MASKS[name]), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", sorted(PALLAS_MHA.capabilities.dtypes))
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_every_dtype_and_head_dim_compiles(target, dtype, head_dim, shapes, training, compile_for):
    found = compile_for(target, training("pallas_mha"), shapes(head_dim=head_dim, dtype=dtype))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
def test_every_tiling_of_the_search_space_compiles(target, shapes, training, compile_for):
    for tiling in PALLAS_MHA.tilings(Request(q_len=512, head_dim=128, q_heads=4, kv_heads=4, dtype="bfloat16")):
        with kernelry.use(tiling=dict(tiling.values)):
            found = compile_for(target, training("pallas_mha"), shapes())
        assert found.ok, (tiling, found.reason)


def test_adapters_compile_around_it(shapes, training, compile_for):
    found = compile_for("gpu:h100", training("pallas_mha", sinks=jnp.zeros(4)), shapes(500))
    assert found.ok, found.reason


def test_four_gpus(over_four_chips):
    found = over_four_chips("pallas_mha", "heads", "gpu:h100:4")
    assert found.ok, found.reason
    text = found.compiled.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert "all-gather" not in text
