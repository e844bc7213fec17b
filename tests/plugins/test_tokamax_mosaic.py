"""tokamax_mosaic: its numbers, what it is told of masks, its lowering, and what it refuses.

The vendor's kernels run in JAX's interpreter of Mosaic GPU kernels, which jax 0.12 has; in both versions a stand-in
that computes what they promise takes their place, and they are lowered for CUDA. Nothing here runs on a GPU.
"""

import functools
import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh
from pairs import covering

import kernelry
from kernelry import masks, testing
from kernelry.errors import ConfigError, PluginError
from kernelry.kernel.spec import Environment, Inputs
from kernelry.plugin import Operand, Tiling
from kernelry.request.request import Request
from kernelry_gpu_pallas.plugin import TOKAMAX_MOSAIC
from kernelry_gpu_pallas.tokamax_mosaic.visibility import Visible, is_plainly_causal

pytest.importorskip("tokamax")

from kernelry_gpu_pallas.tokamax_mosaic import _vendor

KERNEL = "tokamax_mosaic"
MESHES = {
    target: AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind=kind, num_cores=None, platform="gpu"))
    for target, kind in (("gpu:h100", "NVIDIA H100 80GB HBM3"), ("gpu:b200", "NVIDIA B200"))
}
needs_blackwell = pytest.mark.skipif(not _vendor.HAS_BLACKWELL, reason="served from tokamax 0.0.17 on")
TARGETS = ["gpu:h100", pytest.param("gpu:b200", marks=needs_blackwell)]
IDS = np.repeat([4, -1, 0, 2], 64)


def seen(*shape):
    return masks.Dense(np.random.default_rng(3).random((*shape, 256, 256)) < 0.5)


MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "causal_elsewhere": masks.Causal().at(query_offset=300, kv_offset=300),
    "window": masks.SlidingWindow(40, 30),
    "wide_window": masks.SlidingWindow(2**31 - 1, 2**31 - 1),
    "chunked": masks.Chunked(96),
    "block_causal": masks.BlockCausal(48).at(query_offset=7),
    "prefix": masks.PrefixLM(np.asarray([40, 300])).at(query_offset=3, kv_offset=5),
    "lengths": masks.Lengths(np.asarray([100, 0]), np.asarray([256, 20])),
    "later_queries": masks.Causal().at(query_positions=np.random.default_rng(1).permutation(256)),
    "traced_offsets": masks.SlidingWindow(90).at(query_offset=jnp.asarray([17, -5])),
    "traced_positions": masks.Causal().at(query_positions=jnp.arange(512).reshape(2, 256) % 300),
    "keys_at_offsets_by_row": masks.Causal().at(kv_offset=np.asarray([-8, 200])),
    "rows_that_see_nothing": masks.Causal().at(query_offset=-130),
    "conjunction": masks.Chunked(64) & masks.SlidingWindow(50) & masks.Lengths(np.asarray([30, 200])),
    "dense_beside_a_range": masks.Causal() & seen(2, 1),
    "dense_by_head": seen(1, 4),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_len", [256, 384])
def test_ranges_and_booleans_show_what_the_mask_shows(name, kv_len):
    if kv_len != 256 and name.startswith("dense"):
        pytest.skip("the array is 256 × 256")
    mask = MASKS[name] if kv_len == 256 else MASKS[name].at(kv_offset=0)
    request = Request(batch=2, q_len=256, kv_len=kv_len, q_heads=4, mask=mask)
    shown = Visible.of(Inputs(None, None, None, mask.canonical()), request)
    found = np.ones((2, 4, 256, kv_len), bool)
    slots = np.arange(kv_len)
    if is_plainly_causal(request):
        found &= slots <= np.arange(256)[:, None]
    if shown.start is not None:
        assert shown.start.dtype == jnp.int32
        found &= slots >= np.asarray(shown.start)[..., None]
    if shown.end is not None:
        assert shown.end.dtype == jnp.int32
        found &= slots < np.asarray(shown.end)[..., None]
    if shown.dense is not None:
        found &= np.asarray(shown.dense)
    np.testing.assert_array_equal(found, np.broadcast_to(mask.materialize(256, kv_len, q_heads=4), found.shape))


LOG2_E = jnp.float32(np.log2(np.e))


def _probabilities(bound):
    """What the vendor's arguments say: logits [N, T, S] in float32 and which of them are seen."""
    query, key = (bound[name].astype(jnp.float32) for name in ("q", "k"))
    key = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
    logits = jnp.einsum("tnh,snh->nts", query, key) * bound["logits_scale"]
    if bound["bias"] is not None:
        assert bound["bias"].shape[1:] == logits.shape[1:], "the vendor's backward pass mixes heads up otherwise"
        logits = logits + bound["bias"].astype(jnp.float32)
    # What rounds and overflows in the vendor's kernels does so here; fused with what follows, a product is not rounded.
    logits = jax.lax.optimization_barrier((logits * LOG2_E) / LOG2_E)
    rows, slots = np.arange(logits.shape[1])[None, :, None], np.arange(logits.shape[2])[None, None]
    visible = jnp.asarray(rows >= slots if bound["is_causal"] else np.ones((1, *logits.shape[1:]), bool))
    if bound["mask"] is not None:
        assert bound["mask"].shape[1:] == logits.shape[1:], "the vendor's backward pass mixes heads up otherwise"
        visible = visible & bound["mask"]
    if bound["k_start"] is not None:
        visible = visible & (slots >= bound["k_start"][..., None])
    if bound["k_end"] is not None:
        visible = visible & (slots < bound["k_end"][..., None])
    return logits, visible


def _forward_stand_in(real, calls):
    def forward(*args, **options):
        bound = inspect.signature(real).bind(*args, **options).arguments
        calls.append(bound)
        logits, visible = _probabilities(bound)
        logits = jnp.where(visible, logits, -jnp.inf)
        top = logits.max(axis=2)
        weights = jnp.where(visible, jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0)[..., None]), 0.0)
        total = weights.sum(axis=2)
        value = jnp.repeat(bound["v"].astype(jnp.float32), logits.shape[0] // bound["v"].shape[1], axis=1)
        out = jnp.einsum("nts,snd->tnd", weights / (total + 1e-37)[..., None], value)
        return out.astype(bound["out_dtype"]), (top, total) if bound["return_residuals"] else None

    return forward


def _backward_stand_in(real, calls):
    def backward(*args, **options):
        bound = inspect.signature(real).bind(*args, **options).arguments
        calls.append(bound)
        assert bound["dout"].dtype == bound["q"].dtype
        logits, visible = _probabilities(bound)
        top, total = bound["residuals"]
        weights = jnp.where(visible, jnp.exp(logits - top[..., None]) / total[..., None], 0.0)
        key, value, d_out = (bound[name].astype(jnp.float32) for name in ("k", "v", "dout"))
        groups = logits.shape[0] // key.shape[1]
        key, value = (jnp.repeat(array, groups, axis=1) for array in (key, value))
        delta = (bound["out"].astype(jnp.float32) * d_out).sum(axis=2).T
        d_logits = weights * (jnp.einsum("tnd,snd->nts", d_out, value) - delta[..., None])
        d_query = jnp.einsum("nts,snh->tnh", d_logits, key) * bound["logits_scale"]
        d_key = jnp.einsum("nts,tnh->snh", d_logits, bound["q"].astype(jnp.float32)) * bound["logits_scale"]
        d_value = jnp.einsum("nts,tnd->snd", weights, d_out)
        d_key, d_value = (a.reshape(a.shape[0], -1, groups, a.shape[2]).sum(axis=2) for a in (d_key, d_value))
        shares = (d_query, d_key, d_value)
        shares = tuple(share.astype(bound[name].dtype) for share, name in zip(shares, "qkv", strict=True))
        return *shares, None if bound["bias"] is None else d_logits.astype(bound["ds_dtype"])

    return backward


@pytest.fixture
def calls(monkeypatch):
    """Puts stand-ins in the place of the vendor's kernels, by their real signatures; what each was called with."""
    found = {"forward": [], "backward": []}
    for name in ("forward_sm90", "forward_sm100"):
        real = getattr(_vendor, name).flash_attention_kernel
        stand_in = _forward_stand_in(real, found["forward"])
        monkeypatch.setattr(getattr(_vendor, name), "flash_attention_kernel", stand_in)
    for name in ("backward_sm90", "backward_sm100"):
        real = getattr(_vendor, name).flash_attention_vjp_kernel
        stand_in = _backward_stand_in(real, found["backward"])
        monkeypatch.setattr(getattr(_vendor, name), "flash_attention_vjp_kernel", stand_in)
    return found


LENGTH = 128
SIZES = {"heads": 4, "kv_heads": 2, "batch": 2, "head_dim": 16}


def _answer(arrays, d_out, options):
    """The output and the gradients of arrays by name, and the plan."""

    def run(arrays):
        out, pull = jax.vjp(lambda arrays: kernelry.attention(**arrays, kernel=KERNEL, **options), arrays)
        return out, pull(d_out.astype(out.dtype))[0]

    with kernelry.record() as resolutions:
        return *jax.jit(run)(arrays), resolutions[0].plan


def _check(arrays, d_out, **options):
    """Compares with the oracle; returns the plan."""
    out, gradients, plan = _answer(arrays, d_out, options)
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    wanted = testing.reference_attention(**wide, **options).out
    right = testing.reference_gradients(**wide, **options, d_out=np.asarray(d_out, np.float64))
    tolerance = next(t for t in TOKAMAX_MOSAIC.capabilities.tolerances if t.dtype == out.dtype)
    assert out.dtype == arrays["query"].dtype
    near = {"rtol": tolerance.forward, "atol": tolerance.forward}
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, **near)
    for name, share in gradients.items():
        near = {"rtol": tolerance.gradient, "atol": tolerance.gradient, "err_msg": f"gradient of {name}"}
        assert share.dtype == arrays[name].dtype
        np.testing.assert_allclose(np.asarray(share, np.float64), getattr(right, name), **near)
    return plan


SHOWN = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "prefix_of_lengths": masks.PrefixLM(np.asarray([40, 300])).at(query_offset=3, kv_offset=5)
    & masks.Lengths(np.asarray([100, 0]), np.asarray([128, 20])),
    "traced_offsets": masks.SlidingWindow(90).at(query_offset=jnp.asarray([17, -5])),
    "dense_by_head": masks.Dense(np.random.default_rng(3).random((1, 4, LENGTH, LENGTH)) < 0.5),
    "packed": masks.Causal() & masks.Segments(IDS[::2]),
}
BIASES = {
    "bias of keys": ((1, 4, 1, LENGTH), "float32"),
    "bias of queries": ((1, 1, LENGTH, 1), "float32"),
    "bias of rows": ((2, 1, LENGTH, LENGTH), "bfloat16"),
    "bias of all": ((2, 4, LENGTH, LENGTH), "bfloat16"),
}
SMOKE = covering(
    mask=[name for name in SHOWN if name != "full"],
    dtype=["bfloat16", "float16"],
    more=[{}, {"sinks": True, "scale": 0.4}],
    target=["gpu:h100", *(["gpu:b200"] if _vendor.HAS_BLACKWELL else [])],
)
SMOKE += [
    {
        "mask": "full" if name == "bias of keys" else "causal",
        "dtype": "bfloat16",
        "more": {"bias": name},
        "target": "gpu:h100",
    }
    for name in BIASES
]
if _vendor.HAS_BLACKWELL:
    SMOKE += [{"mask": "causal", "dtype": "bfloat16", "more": {"bias": "bias of keys"}, "target": "gpu:b200"}]


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: " ".join(map(str, case.values())))
def test_the_vendor_is_told_the_whole_request(case, calls, make_arrays):
    """A bias has a gradient of its own shape, sinks and the scale go around the kernel."""
    query, key, value, d_out = make_arrays(LENGTH, **SIZES, dtype=case["dtype"])
    arrays = {"query": query, "key": key, "value": value}
    options = {name: value for name, value in case["more"].items() if name == "scale"}
    if bias := case["more"].get("bias"):
        shape, dtype = BIASES[bias]
        arrays["bias"] = jnp.asarray(np.random.default_rng(5).standard_normal(shape), dtype)
    if case["more"].get("sinks"):
        arrays["sinks"] = jnp.asarray([0.5, 2.0, -1.0, 9.0])
    with kernelry.use(target=case["target"]):
        plan = _check(arrays, d_out, mask=SHOWN[case["mask"]], **options)
    assert [len(calls[direction]) for direction in ("forward", "backward")] == [1, 1]
    forward, backward = calls["forward"][0], calls["backward"][0]
    assert forward["is_causal"] == backward["is_causal"] == (case["mask"] == "causal")
    assert ("sinks_from_lse" in {step.adapter.name for step in plan.steps}) == ("sinks" in arrays)
    assert not bias or backward["ds_dtype"] == (jnp.bfloat16 if bias == "bias of all" else jnp.float32)


LEAST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("level", [-1e4, -1e6, -1e9, -1e12, -1e30, LEAST, 1e30])
@pytest.mark.parametrize("partial", [False, True])
def test_rows_and_keys_of_a_very_negative_bias_are_those_of_the_oracle(level, partial, calls, make_arrays):
    """Rows 5 to 8 have nothing else, keys 1 to 69 are hidden by it in the others, as by padding at the left."""
    query, key, value, d_out = make_arrays(LENGTH, **SIZES, dtype="bfloat16")
    bias = np.random.default_rng(5).standard_normal((2, 1, LENGTH, LENGTH)).astype(np.float32)
    bias[..., 1:70] = -abs(level)
    bias[:, :, 5:9] = level
    run = jax.jit(lambda *arrays: _padded(*arrays, d_out, partial))
    with kernelry.use(target="gpu:h100"):
        out, shares, lse = run(query, key, value, jnp.asarray(bias))
    wide = [np.asarray(array, np.float64) for array in (query, key, value)]
    wanted = testing.reference_attention(*wide, bias=bias.astype(np.float64), mask=masks.Causal())
    right = testing.reference_gradients(*wide, bias=bias, mask=masks.Causal(), d_out=np.asarray(d_out, np.float64))
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted.out, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(lse, wanted.lse, rtol=1e-5, atol=1e-5)
    for name, share in zip(("query", "key", "value", "bias"), shares, strict=True):
        theirs = getattr(right, name)
        np.testing.assert_allclose(np.asarray(share, np.float64), theirs, rtol=4e-2, atol=4e-2, err_msg=name)


def _padded(query, key, value, bias, d_out, partial):
    def attend(*arrays):
        *qkv, own = arrays
        options = {"bias": own, "mask": masks.Causal(), "kernel": KERNEL}
        found = kernelry.attention(*qkv, return_partial=True, **options)
        whole = kernelry.finalize(found) if partial else kernelry.attention(*qkv, **options)
        return whole, jax.lax.stop_gradient(found.lse)

    out, pull, lse = jax.vjp(attend, query, key, value, bias, has_aux=True)
    return out, pull(d_out.astype(out.dtype)), lse


def test_each_generation_has_its_own_kernel_and_blocks(calls, make_arrays):
    operands = make_arrays(LENGTH, dtype="bfloat16")[:3]

    def trace(target):
        with kernelry.use(target=target):
            jax.eval_shape(lambda *operands: kernelry.attention(*operands, kernel=KERNEL), *operands)

    trace("gpu:h200")
    assert isinstance(calls["forward"][0]["config"], _vendor.forward_sm90.Config)
    if not _vendor.HAS_BLACKWELL:
        with pytest.raises(PluginError, match="no kernels for gpu:b200 that are served"):
            trace("gpu:b200")
        return
    trace("gpu:b200")
    assert isinstance(calls["forward"][1]["config"], _vendor.forward_sm100.Config)
    assert not calls["forward"][1]["config"].collective


def test_largest_logits_are_the_vendors(calls, make_arrays):
    operands = make_arrays(LENGTH, **SIZES, dtype="bfloat16")[:3]
    mask = masks.SlidingWindow(3).at(query_offset=-100)
    with kernelry.use(target="gpu:h100"):
        run = jax.jit(lambda *qkv: kernelry.attention(*qkv, mask=mask, kernel=KERNEL, return_max_logits=True))
        _, top = run(*operands)
    np.testing.assert_allclose(top, testing.reference_attention(*operands, mask=mask).max_logits, rtol=1e-5)


@pytest.mark.parametrize("empty", [-np.inf, 0.7 * np.finfo(np.float32).min])
def test_rows_that_see_nothing_have_no_lse(empty, monkeypatch, make_arrays):
    """tokamax 0.0.12 leaves about −2.4e38 where 0.0.17 leaves −inf."""

    def forward(q, *args, **options):
        tops = jnp.full((q.shape[1], q.shape[0]), empty, jnp.float32)
        return q, (tops, jnp.full_like(tops, 256.0))

    monkeypatch.setattr(_vendor.forward_sm90, "flash_attention_kernel", forward)
    query, key, value, _ = make_arrays(LENGTH, **SIZES, dtype="bfloat16")
    options = {"mask": masks.Causal().at(query_offset=-500), "mode": "prefill", "return_partial": True}
    with kernelry.use(target="gpu:h100"):
        found = jax.jit(lambda *qkv: kernelry.attention(*qkv, kernel=KERNEL, **options))(query, key, value)
    assert np.isneginf(found.lse).all()
    assert not np.asarray(found.out, np.float32).any()


def test_an_infinite_lse_contributes_no_gradient(calls, make_arrays):
    query, key, value, d_out = make_arrays(LENGTH, dtype="bfloat16")
    request = Request(q_len=LENGTH, q_heads=2, kv_heads=1, head_dim=32, dtype="bfloat16", target="gpu:h100")
    tiling, lse = TOKAMAX_MOSAIC.tilings(request)[0], jnp.full((1, 2, LENGTH), jnp.inf)

    def run():
        shares = TOKAMAX_MOSAIC.body().backward(Inputs(query, key, value), request, tiling, d_out, lse, d_out, None)
        return shares.query, shares.key, shares.value

    for share in jax.jit(run)():
        np.testing.assert_array_equal(share, 0.0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "bias"),
    [("causal", None), ("window", None), ("dense_by_head", (1, 4, 256, 256))],
)
def test_lowered_for_cuda_holds_the_kernels(target, name, bias, make_arrays, lower):
    def loss(query, key, value, bias):
        out = kernelry.attention(query, key, value, bias=bias, mask=MASKS[name], kernel=KERNEL)
        return out.astype(jnp.float32).sum()

    arrays = make_arrays(heads=4, kv_heads=2, dtype="bfloat16", head_dim=128)[:3]
    bias = None if bias is None else jnp.zeros(bias)
    wrt = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    resolutions, lowered = lower(jax.grad(loss, wrt), (*arrays, bias), target, MESHES[target])
    resolutions[0].verify(lowered)
    assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu_v2") == 3  # forward, dQ, dK and dV


def test_no_gradient_no_backward_kernel(make_arrays, lower):
    def attend(query, key, value):
        return kernelry.attention(query, key, value, kernel=KERNEL, mode="prefill")

    resolutions, lowered = lower(attend, make_arrays(dtype="float16")[:3], "gpu:h100", MESHES["gpu:h100"])
    resolutions[0].verify(lowered)
    assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu_v2") == 1


SHORT = {"target": "gpu:h100", "q_len": 256, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"target": "gpu:a100"}, "gpu:a100 is generation 80 < 90"),
        ({"target": "gpu"}, "the generation of target gpu is not known, and each has a kernel of its own"),
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16 or float16"),
        ({"soft_cap": 30.0}, "soft_cap=30.0 is not supported"),
        ({"sinks": True}, "sinks=True is not supported"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 is not supported"),
        ({"mode": "decode"}, "mode=decode is not prefill or train"),
        ({"q_len": 200}, "q_len=200 is not a multiple of 128"),
        ({"kv_len": 300}, "kv_len=300 is not a multiple of 128"),
        ({"head_dim": 72}, "head_dim=72 is not a multiple of 16"),
        ({"head_dim": 320}, "head_dim=320 > 256"),
        ({"mask": masks.Segments(IDS)}, "mask atom segments is not"),
        ({"mask": masks.Causal().at(kv_offset=jnp.asarray(1))}, "keys at positions that are not consecutive, or not"),
        ({"mask": masks.Causal().at(kv_positions=np.arange(256)[::-1])}, "keys at positions that are not consecutive"),
        (
            {"head_dim": 256, "bias": (1, 1, 256, 256)},
            "head_dim=256 value_dim=256 with a bias and its gradients: the smallest blocks need more memory",
        ),
        ({"target": "gpu:b200", "head_dim": 256}, "and its gradients: the smallest blocks need more memory"),
    ],
)
def test_refusals_have_values(facts, words):
    request = Request(**{**SHORT, **facts})
    stated = Environment(versions=(("tokamax", "0.0.17"),))
    refusals = (*TOKAMAX_MOSAIC.capabilities.refusals(request), *TOKAMAX_MOSAIC.refusals(request, stated))
    assert any(words in refusal.detail for refusal in refusals), [str(refusal) for refusal in refusals]


@pytest.mark.parametrize(
    ("target", "version", "words"),
    [
        ("gpu:h100", None, "tokamax is not installed; pip install 'kernelry-gpu-pallas[tokamax]'"),
        (
            "gpu:b200",
            "0.0.12",
            "tokamax 0.0.12 < 0.0.17, the first whose kernels for Blackwell are served; pip install",
        ),
        ("gpu:h100", "0.0.12", None),
        ("gpu:b200", "0.0.17", None),
        ("gpu:b200", "0.1", None),
    ],
)
def test_an_absent_or_old_tokamax_is_refused_with_what_to_install(target, version, words):
    request, stated = Request(**{**SHORT, "target": target}), Environment(versions=(("tokamax", version),))
    refusals = [str(refusal) for refusal in TOKAMAX_MOSAIC.refusals(request, stated)]
    assert len(refusals) == (words is not None)
    assert words is None or refusals[0].startswith(words)


def test_what_is_installed_is_what_this_was_written_for():
    assert importlib.metadata.version("tokamax") in ("0.0.12", "0.0.17")


@pytest.mark.parametrize("target", ["gpu:h100", "gpu:b200"])
@pytest.mark.parametrize(
    ("head_dim", "bias"), [(16, None), (64, True), (128, None), (128, True), (192, True), (256, None)]
)
def test_every_tiling_passes_its_own_check_and_none_is_there_twice(target, head_dim, bias):
    from kernelry_gpu_pallas.tokamax_mosaic.blocks import check

    bias = bias and (1, 1, 1024, 1024)
    request = Request(target=target, q_len=1024, head_dim=head_dim, bias=bias, gradients=(), dtype="bfloat16")
    tilings = TOKAMAX_MOSAIC.tilings(request)
    assert tilings
    assert len(set(tilings)) == len(tilings)
    for tiling in tilings:
        check(request, tiling)


@pytest.mark.parametrize(
    ("target", "tunable", "words"),
    [
        ("gpu:h100", {"block_q": 256}, "block_q=256 is not a multiple of 64 of which 2 divide the length 256"),
        ("gpu:h100", {"block_kv_dkv": 96}, "block_kv_dkv=96 is not a multiple of 64"),
        ("gpu:h100", {"num_stages": 9}, r"forward needs \d+ of 228352 bytes of shared memory"),
        ("gpu:b200", {"block_kv": 64}, "block_kv=64 is not 128"),
        ("gpu:b200", {"block_q_dq": 64}, "block_q_dq=64 is not 128"),
    ],
)
def test_a_tiling_without_room_is_an_error(target, tunable, words, calls, make_arrays):
    arrays = make_arrays(dtype="bfloat16", head_dim=128)[:3]
    with kernelry.use(target=target, tiling=tunable), pytest.raises(ConfigError, match=words):
        kernelry.attention(*arrays, kernel=KERNEL)


def test_tilings_are_of_the_names_that_can_be_set():
    (tiling, *_) = TOKAMAX_MOSAIC.tilings(Request(**SHORT))
    names = {"block_q", "block_kv", "num_stages", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"}
    assert {name for name, _ in tiling.values} == names | {"num_stages_backward"}
    assert isinstance(tiling, Tiling)


def test_listing_imports_no_vendor():
    code = "import sys, kernelry; print('tokamax_mosaic' in str(kernelry.kernels()), 'tokamax' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False"]


def test_auto_prefers_every_kernel_for_gpus_whose_numbers_are_proven_without_help():
    resolution = kernelry.explain(Request(**SHORT, mask=masks.Causal()))
    assert resolution.plan.kernel.name != KERNEL
    with_bias = kernelry.explain(Request(**SHORT, bias=(1, 1, 256, 256), mask=masks.SlidingWindow(9)))
    assert Operand.BIAS in with_bias.request.gradients


CASES = Path(__file__).parents[1] / "support" / "mosaic_cases.py"
PRODUCTS = {"gpu:h100": [3, 3, 3], "gpu:b200": [3, 2, 2]}
"""Warpgroups of the forward pass, of dQ and of dK with dV: what tells the kernels of the generations apart."""
needs_interpreter = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"), reason="jax 0.10 has no interpreter of Mosaic GPU kernels"
)
INTERPRETED = {
    "causal": [],
    "full_float16_with_sinks": ["sinks_from_lse"],
    "window_of_a_later_chunk": ["clean_hidden_slots"],
    "rows_at_traced_offsets": ["clean_hidden_slots", "empty_rows_from_lse"],
    "rows_that_see_nothing": ["clean_hidden_slots", "empty_rows_from_lse"],
    "prefix": [],
    "packed_through_a_dense_mask": ["clean_hidden_slots", "dense_mask", "empty_rows_from_lse"],
    "dense_by_head": ["clean_hidden_slots", "empty_rows_from_lse"],
    "bias_of_each_head": [],
    "bias_in_short": ["clean_hidden_slots", "empty_rows_from_lse"],
    "head_dim_128_with_largest_logits": [],
    "padded_rows_and_keys": [],
    "uneven_lengths": ["clean_hidden_slots", "empty_rows_from_lse", "pad_sequence"],
}


@functools.cache
def _interpreted(target, case):
    ran = subprocess.run([sys.executable, CASES, target, case], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


@needs_interpreter
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "case", [c if c == "prefix" else pytest.param(c, marks=pytest.mark.sweep) for c in INTERPRETED]
)
def test_the_vendors_kernels_agree_with_dense_in_the_interpreter(target, case):
    if (target, case) == ("gpu:b200", "padded_rows_and_keys"):
        pytest.skip("two blocks of keys with a bias take the interpreter of Blackwell more than 200 s")
    found = _interpreted(target, case)
    assert found["kernel"] == KERNEL
    assert found["warpgroups"] == PRODUCTS[target]
    assert found["adapters"] == INTERPRETED[case]
    assert found["finite"]
    dtype = found["dtypes"][0]
    tolerance = next(t for t in TOKAMAX_MOSAIC.capabilities.tolerances if t.dtype == dtype)
    for name, error in found["errors"].items():
        allowed = {"out": tolerance.forward, "max_logits": 1e-5}.get(name, tolerance.gradient)
        assert error <= allowed, (name, found["errors"])
