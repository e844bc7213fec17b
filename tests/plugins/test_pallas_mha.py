"""pallas_mha in interpret mode against the float64 oracle; lowered for CUDA; and what it refuses.

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
from pairs import covering
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.request.request import Request
from kernelry_gpu_pallas.plugin import PALLAS_MHA

# Since jax 0.12 Pallas for Triton asks the abstract mesh for the device that it compiles for.
H100 = AbstractMesh(
    (1,), ("x",), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
)


MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "packed": masks.Segments(jnp.asarray(np.repeat([3, -1, 0, 5], 12))),
}
TOLERANCES = {"float32": (2e-6, 2e-5), "bfloat16": (1e-2, 4e-2), "float16": (2e-3, 1e-2)}
SMOKE = covering(
    mask=list(MASKS),
    dtype=list(TOLERANCES),
    more=["none", "sinks", "scale"],
    head_dim=[16, 80],
    heads=[2, 4],
)
LENGTH = 48
"""An odd multiple of 16: three blocks."""


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: " ".join(map(str, case.values())))
def test_every_two_features_agree_with_the_oracle(case, make_arrays, check_against_dense):
    """Grouped heads go through repeat_kv_heads, sinks have gradients through the statistics."""
    arrays = make_arrays(
        LENGTH, heads=case["heads"], kv_heads=2, batch=2, head_dim=case["head_dim"], dtype=case["dtype"]
    )
    options = {"scale": 0.3} if case["more"] == "scale" else {}
    if case["more"] == "sinks":
        options["sinks"] = jnp.linspace(-1, 2, case["heads"], dtype=case["dtype"])
    forward, gradient = TOLERANCES[case["dtype"]]
    options |= {"mask": MASKS[case["mask"]], "forward": forward, "gradient": gradient}
    plan = check_against_dense("pallas_mha", arrays, **options)
    wanted = {"repeat_kv_heads"} if case["heads"] == 4 else set()
    wanted |= {"sinks_from_lse"} if case["more"] == "sinks" else set()
    wanted |= {"clean_hidden_slots", "empty_rows_from_lse"} if case["mask"] == "packed" else set()
    assert {step.adapter.name for step in plan.steps} == wanted


@pytest.mark.sweep
@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=str)
@pytest.mark.parametrize("q_len", [128, 256])
def test_more_and_larger_blocks_agree_with_the_oracle(mask, q_len, make_arrays, check_against_dense):
    check_against_dense("pallas_mha", make_arrays(q_len, kv_heads=2), mask=mask)


def test_partial_holds_a_natural_lse(make_arrays):
    query, key, value, _ = make_arrays(LENGTH)
    options = {"mask": masks.Causal(), "mode": "prefill", "return_partial": True}
    with testing.interpret():
        found = jax.jit(lambda *qkv: kernelry.attention(*qkv, kernel="pallas_mha", **options))(query, key, value)
    assert found.lse.dtype == jnp.float32
    wanted = testing.reference_attention(query, key, value, mask=masks.Causal()).lse
    np.testing.assert_allclose(found.lse, wanted, rtol=2e-6, atol=2e-6)


def test_infinite_lse_contributes_no_gradient(make_arrays):
    query, key, value, d_out = make_arrays(LENGTH, kv_heads=2)
    request = Request(q_len=LENGTH, q_heads=2, head_dim=32, mask=masks.Causal(), interpret=True)
    inputs, tiling = kernelry.plugin.Inputs(query, key, value), PALLAS_MHA.tilings(request)[0]
    lse = jnp.full((1, 2, LENGTH), jnp.inf)

    def run():
        shares = PALLAS_MHA.body().backward(inputs, request, tiling, d_out, lse, d_out, None)
        return shares.query, shares.key, shares.value

    for share in jax.jit(run)():
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
