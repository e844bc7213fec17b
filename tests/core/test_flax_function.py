"""`attention_fn` inside and outside Flax's own attention modules, against Flax's own attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import B, F, N, T, array, close, kernels_of, linen_mha, nnx_mha, qkv

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError
from kernelry.flax import attention_fn


def visible_array(*shape):
    """Random booleans in which every query sees itself."""
    return jnp.asarray((np.random.default_rng(5).random(shape) > 0.5) | np.eye(T, dtype=bool))


def padding_mask():
    lengths = np.array([[7], [12]])
    return nnx.make_attention_mask(jnp.ones((B, T)), jnp.asarray(np.arange(T) < lengths))


CAUSAL = nnx.make_causal_mask(jnp.ones((B, T)))
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "padding": padding_mask(),
    "both": nnx.combine_masks(CAUSAL, padding_mask()),
    "boolean": CAUSAL > 0,
}


def nnx_value_and_grad(module, inputs, **call):
    loss = nnx.value_and_grad(lambda m, x: (m(x, **call) ** 2).sum(), argnums=(0, 1))
    return nnx.jit(loss)(module, inputs)


def linen_value_and_grad(module, inputs, **call):
    variables = linen_mha().init(jax.random.key(0), inputs)
    loss = jax.value_and_grad(lambda v, x: (module.apply(v, x, **call) ** 2).sum(), argnums=(0, 1))
    return jax.jit(loss)(variables, inputs)


# attention_fn inside Flax's modules


@pytest.mark.parametrize(("mask", "kv_heads"), [*((name, N) for name in MASKS), ("both", 2), ("causal", 1)])
def test_nnx_mha_agrees_with_flax_forward_and_backward(mask, kv_heads):
    inputs = array(B, T, F)
    got = nnx_value_and_grad(nnx_mha(attention_fn, num_kv_heads=kv_heads), inputs, mask=MASKS[mask])
    want = nnx_value_and_grad(nnx_mha(num_kv_heads=kv_heads), inputs, mask=MASKS[mask])
    close(got, want, 1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_linen_mha_agrees_with_flax_forward_and_backward(mask):
    inputs = array(B, T, F)
    got = linen_value_and_grad(linen_mha(attention_fn), inputs, mask=MASKS[mask])
    close(got, linen_value_and_grad(linen_mha(), inputs, mask=MASKS[mask]), 1e-4)


def test_is_causal_agrees_with_flax():
    inputs = array(B, T, F)
    got = nnx_mha(attention_fn)(inputs, is_causal=True, mask=padding_mask())
    close(got, nnx_mha()(inputs, is_causal=True, mask=padding_mask()))


def test_nnx_mha_accepts_a_kernelry_mask():
    inputs = array(B, T, F)
    close(nnx_mha(attention_fn)(inputs, mask=masks.Causal()), nnx_mha()(inputs, mask=CAUSAL))


@pytest.mark.parametrize("make", [nnx_mha, linen_mha])
def test_what_a_partial_binds_survives_flax(make):
    """linen inspects the signature of the partial, and both hand it mask=None."""
    bound = functools.partial(attention_fn, layer_mask=masks.SlidingWindow(3), kernel="blockwise", mode="prefill")
    module, inputs = make(bound), array(B, T, F)
    with kernelry.record() as resolutions:
        module(inputs) if make is nnx_mha else module.init(jax.random.key(0), inputs)
    request = resolutions[0].request
    assert (resolutions[0].kernel, str(request.mode.value)) == ("blockwise", "prefill")
    assert request.mask == masks.SlidingWindow(3).form


def test_nnx_mha_decode_cache_agrees_with_flax():
    inputs = array(B, T, F)
    ours, theirs = nnx_mha(functools.partial(attention_fn, mode="decode"), decode=True), nnx_mha(decode=True)
    for module in (ours, theirs):
        module.init_cache(inputs.shape)
    for place in range(T):
        close(ours(inputs[:, place : place + 1]), theirs(inputs[:, place : place + 1]))


def test_linen_mha_decode_cache_agrees_with_flax():
    inputs = array(B, T, F)
    ours, theirs = linen_mha(functools.partial(attention_fn, mode="decode"), decode=True), linen_mha(decode=True)
    variables = theirs.init(jax.random.key(0), inputs)
    cache = {"ours": variables["cache"], "theirs": variables["cache"]}
    for place in range(T):
        out = {}
        for name, module in (("ours", ours), ("theirs", theirs)):
            out[name], changed = module.apply(
                {"params": variables["params"], "cache": cache[name]},
                inputs[:, place : place + 1],
                mutable=["cache"],
            )
            cache[name] = changed["cache"]
        close(out["ours"], out["theirs"])


# attention_fn called directly


@pytest.mark.parametrize(
    ("batch", "mask_batch"),
    [((), ()), ((3,), (1,)), ((2, 3), ()), ((2, 3), (2, 1)), ((2, 3), (2, 3)), ((2, 1, 3), (1, 1, 3))],
)
def test_any_number_of_batch_dimensions(batch, mask_batch):
    q, k, v = qkv(*batch)
    visible, bias = visible_array(*mask_batch, 1, T, T), array(*mask_batch, 1, T, T, seed=6)
    full = (*batch, N, T, T)
    got = jax.jit(attention_fn)(q, k, v, bias, visible)
    want = jax.jit(nn.dot_product_attention)(q, k, v, jnp.broadcast_to(bias, full), jnp.broadcast_to(visible, full))
    close(got, want)


def test_a_mask_per_head_is_folded_with_its_heads():
    q, k, v = qkv(2, 3)
    visible = visible_array(2, 3, N, T, T)
    close(attention_fn(q, k, v, mask=visible), nn.dot_product_attention(q, k, v, mask=visible))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_casts_query_key_and_value(dtype):
    with kernelry.record() as resolutions:
        out = attention_fn(*qkv(B), dtype=dtype)
    assert out.dtype == dtype
    assert resolutions[0].request.dtype == np.dtype(dtype).name


def test_without_dtype_query_key_and_value_are_promoted():
    q, k, v = qkv(B)
    assert attention_fn(q.astype(jnp.bfloat16), k, v).dtype == jnp.float32


def test_precision_reaches_the_request():
    with kernelry.record() as resolutions:
        attention_fn(*qkv(B), precision="highest")
    assert resolutions[0].request.precision == "highest"


def test_a_fully_masked_row_is_zero():
    out = attention_fn(*qkv(B), mask=jnp.zeros((1, 1, T, T), bool))
    np.testing.assert_array_equal(out, 0)


def test_integer_and_float_masks_mean_their_positive_entries():
    q, k, v = qkv(B)
    for dtype in (jnp.int32, jnp.float32, jnp.bool_):
        close(attention_fn(q, k, v, mask=CAUSAL.astype(dtype)), attention_fn(q, k, v, is_causal=True))


def test_sinks_and_soft_cap_are_bound_by_partial():
    sinks = array(N)
    q, k, v = qkv(B)
    out = functools.partial(attention_fn, sinks=sinks, soft_cap=5.0, scale=0.3)(q, k, v)
    close(out, kernelry.attention(q, k, v, sinks=sinks, soft_cap=5.0, scale=0.3))


# Dropout


def test_dropout_is_drawn_from_the_key():
    q, k, v = qkv(B)
    drop = functools.partial(attention_fn, q, k, v, dropout_rate=0.5, broadcast_dropout=False)
    first = drop(dropout_rng=jax.random.key(1))
    close(first, kernelry.attention(q, k, v, dropout_rate=0.5, dropout_rng=jax.random.key(1)))
    assert not np.allclose(first, drop(dropout_rng=jax.random.key(2)))


def test_deterministic_means_no_dropout():
    q, k, v = qkv(B)
    got = attention_fn(q, k, v, dropout_rate=0.5, deterministic=True, dropout_rng=jax.random.key(1))
    close(got, attention_fn(q, k, v))


def test_dropout_inside_nnx_mha():
    module = nnx_mha(attention_fn, dropout_rate=0.5, broadcast_dropout=False)
    inputs = array(B, T, F)
    assert not np.allclose(module(inputs, deterministic=False), module(inputs, deterministic=False))
    close(module(inputs, deterministic=True), nnx_mha()(inputs))


def test_dropout_inside_linen_mha():
    module = linen_mha(attention_fn, dropout_rate=0.5, broadcast_dropout=False)
    inputs = array(B, T, F)
    variables = linen_mha().init(jax.random.key(0), inputs)
    run = functools.partial(module.apply, variables, inputs)
    dropped = run(deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(dropped, run(deterministic=True))
    close(run(deterministic=True), linen_mha().apply(variables, inputs))


def test_active_dropout_without_a_key_is_refused():
    with pytest.raises(ArgumentError, match="needs dropout_rng="):
        attention_fn(*qkv(B), dropout_rate=0.5, broadcast_dropout=False)


@pytest.mark.parametrize("make", [nnx_mha, linen_mha])
def test_broadcast_dropout_is_refused_where_dropout_is_active(make):
    module, inputs = make(attention_fn, dropout_rate=0.5), array(B, T, F)
    if make is linen_mha:
        variables = linen_mha().init(jax.random.key(0), inputs)
        module = functools.partial(module.apply, variables, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(ArgumentError, match="build the module with broadcast_dropout=False"):
        module(inputs, deterministic=False)
    module(inputs, deterministic=True)


def test_how_its_config_chooses_is_obeyed():
    config = AttentionConfig(kernel="blockwise", tilings={"blockwise": {"block_q": 4}})
    assert kernels_of(attention_fn, *qkv(B), config=config) == ["blockwise"]


def test_linen_force_fp32_for_softmax_is_the_case_anyway():
    inputs = array(B, T, F)
    variables = linen_mha().init(jax.random.key(0), inputs)
    settings = {"dtype": jnp.bfloat16, "force_fp32_for_softmax": True}
    got = linen_mha(attention_fn, **settings).apply(variables, inputs)
    want = linen_mha(**settings).apply(variables, inputs)
    close(np.float32(got), np.float32(want), 5e-2)
