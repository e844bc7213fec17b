"""pallas_mha in interpret mode against dot_product; lowered for CUDA; and what it refuses.

Interpret mode proves numbers, lowering proves that the program holds the kernel: nothing here runs
on a GPU.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.request import Request
from kernelry_gpu_pallas.plugin import PALLAS_MHA

# Since jax 0.12 Pallas for Triton asks the abstract mesh for the device that it compiles for.
H100 = AbstractMesh(
    (1,), ("x",), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
)


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=str)
def test_masks_agree_with_dense(mask, make_arrays, check_against_dense):
    check_against_dense("pallas_mha", make_arrays(kv_heads=2), mask=mask)


def test_lengths_of_odd_multiples_agree_with_dense(make_arrays, check_against_dense):
    check_against_dense("pallas_mha", make_arrays(48, kv_heads=2), mask=masks.Causal())


def test_odd_head_dim_and_scale_agree_with_dense(make_arrays, check_against_dense):
    check_against_dense("pallas_mha", make_arrays(128, kv_heads=2, head_dim=80), mask=masks.Causal(), scale=0.3)


@pytest.mark.parametrize(("dtype", "forward", "gradient"), [("bfloat16", 1e-2, 4e-2), ("float16", 2e-3, 1e-2)])
def test_short_dtypes_stay_within_their_tolerance(dtype, forward, gradient, make_arrays, check_against_dense):
    arrays = make_arrays(128, kv_heads=2, dtype=dtype)
    check_against_dense("pallas_mha", arrays, mask=masks.Causal(), forward=forward, gradient=gradient)


def test_grouped_heads_go_through_repeat_kv_heads(make_arrays, check_against_dense):
    arrays = make_arrays(128, heads=4, kv_heads=2, batch=2)
    plan = check_against_dense("pallas_mha", arrays, mask=masks.Causal())
    assert [step.adapter.name for step in plan.steps] == ["repeat_kv_heads"]


@pytest.mark.parametrize(("dtype", "forward", "gradient"), [("float32", 2e-6, 2e-5), ("bfloat16", 1e-2, 4e-2)])
def test_sinks_have_gradients_through_the_statistics(dtype, forward, gradient, make_arrays, check_against_dense):
    sinks = jnp.asarray([-1.0, 2.0], dtype)
    arrays = make_arrays(128, kv_heads=2, dtype=dtype)
    check_against_dense("pallas_mha", arrays, sinks=sinks, mask=masks.Causal(), forward=forward, gradient=gradient)


def test_partial_holds_a_natural_lse(make_arrays):
    query, key, value, _ = make_arrays(128)
    options = {"mask": masks.Causal(), "mode": "prefill", "return_partial": True}
    with testing.interpret():
        found = kernelry.attention(query, key, value, kernel="pallas_mha", **options)
    wanted = kernelry.attention(query, key, value, kernel="dot_product", **options)
    assert found.lse.dtype == jnp.float32
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=2e-6, atol=2e-6)


def test_infinite_lse_contributes_no_gradient(make_arrays):
    query, key, value, d_out = make_arrays(64, kv_heads=2)
    request = Request(q_len=64, q_heads=2, head_dim=32, mask=masks.Causal(), interpret=True)
    inputs, tiling = kernelry.plugin.Inputs(query, key, value), PALLAS_MHA.tilings(request)[0]
    lse = jnp.full((1, 2, 64), jnp.inf)
    shares = PALLAS_MHA.body().backward(inputs, request, tiling, d_out, lse, d_out, None)
    for share in (shares.query, shares.key, shares.value):
        np.testing.assert_array_equal(share, 0.0)


def _refusal(arrays, **options):
    with testing.interpret(), kernelry.use(policy=NO_ADAPTERS), pytest.raises(KernelRefusedError) as caught:
        kernelry.attention(*arrays[:3], kernel="pallas_mha", **options)
    return str(caught.value)


def test_uneven_length_is_refused_with_its_values(make_arrays):
    assert "q_len=200 is not a multiple of 16, the smallest block_q; pad to 208" in _refusal(
        make_arrays(200, kv_heads=2)
    )


def test_soft_cap_is_refused(make_arrays):
    assert "soft_cap=2.0 is not supported" in _refusal(make_arrays(64), soft_cap=2.0)


def test_window_is_refused(make_arrays):
    assert "mask atom window(5, 0) is not causal or segments" in _refusal(make_arrays(64), mask=masks.SlidingWindow(5))


def test_unequal_lengths_are_refused(make_arrays):
    assert "q_len=64 differs from kv_len=128" in _refusal(make_arrays(64, 128))


def test_split_head_dims_are_refused(make_arrays):
    assert "value_dim=48 differs from head_dim=32" in _refusal(make_arrays(64, value_dim=48))


def test_head_dim_below_triton_is_refused(make_arrays):
    assert "head_dim=8 < 16" in _refusal(make_arrays(64, head_dim=8))


def test_old_gpus_are_refused():
    resolution = kernelry.explain(Request(target="gpu:v100", q_len=64, dtype="float16"), kernel="pallas_mha")
    assert "gpu:v100 is generation 70 < 80" in str(resolution)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "blocks"),
    [("bfloat16", 128, (128, 32)), ("float32", 80, (64, 32)), ("bfloat16", 256, (64, 32)), ("float32", 256, (32, 32))],
)
def test_default_blocks_fit_shared_memory(dtype, head_dim, blocks):
    tiling = PALLAS_MHA.tilings(Request(q_len=1024, head_dim=head_dim, dtype=dtype))[0]
    assert (tiling["block_q"], tiling["block_q_dq"]) == blocks


@pytest.mark.parametrize(
    ("tiling", "message"),
    [({"block_q_dkv": 48}, "block_q_dkv=48 of pallas_mha does not divide"), ({"block_q_dq": 16}, "must equal")],
)
def test_blocks_the_vendor_would_get_wrong_are_an_error(tiling, message, make_arrays):
    arrays = make_arrays(64)
    with testing.interpret(), kernelry.use(tiling=tiling), pytest.raises(ConfigError, match=message):
        kernelry.attention(*arrays[:3], kernel="pallas_mha")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.12
def test_lowered_for_cuda_holds_the_kernel(make_arrays, lower):
    def loss(query, key, value):
        out = kernelry.attention(query, key, value, mask=masks.Causal(), kernel="pallas_mha")
        return out.astype(jnp.float32).sum()

    arrays = make_arrays(dtype="bfloat16", head_dim=64)[:3]
    resolutions, lowered = lower(jax.grad(loss, (0, 1, 2)), arrays, "gpu:h100", H100)
    resolutions[0].verify(lowered)
    assert lowered.as_text().count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3


def test_importing_the_vendor_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error'); import kernelry_gpu_pallas.pallas_mha._vendor"
    subprocess.run([sys.executable, "-c", code], check=True)
