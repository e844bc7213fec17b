"""`attention_fn` inside and outside Flax's own attention modules, against Flax's own attention.

Modules and what is asked of them are compiled once: masks of one shape and dtype share a program.
"""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import B, F, N, T, array, close, kernels_of, linen_mha, nnx_mha, oracle, qkv
from pairs import sweep_but

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError
from kernelry.flax import attention_fn

pytestmark = [pytest.mark.versions, pytest.mark.xdist_group("flax")]


def visible_array(*shape):
    """Random booleans in which every query sees itself."""
    return jnp.asarray((np.random.default_rng(5).random(shape) > 0.5) | np.eye(T, dtype=bool))


def padding_mask():
    lengths = np.array([[7], [12]])
    return nnx.make_attention_mask(jnp.ones((B, T)), jnp.asarray(np.arange(T) < lengths))


CAUSAL = jnp.asarray(np.tril(np.ones((1, 1, T, T), np.float32)))
PADDING = padding_mask()
MASKS = {
    "none": None,
    "causal": jnp.broadcast_to(CAUSAL, PADDING.shape),
    "padding": PADDING,
    "both": CAUSAL * PADDING,
    "boolean": CAUSAL > 0,
}
INPUTS = array(B, T, F)


@functools.partial(nnx.jit, static_argnames=("is_causal", "deterministic"))
def nnx_answer(module, inputs, **call):
    """Output, and the gradients of its square by parameters and inputs."""

    def loss(module, inputs):
        out = module(inputs, **call)
        return (out**2).sum(), out

    gradients, out = nnx.grad(loss, argnums=(0, 1), has_aux=True)(module, inputs)
    return out, gradients


@functools.partial(jax.jit, static_argnames=("module", "deterministic"))
def linen_answer(module, variables, inputs, **call):
    def loss(variables, inputs):
        out = module.apply(variables, inputs, **call)
        return (out**2).sum(), out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, inputs)
    return out, gradients


@functools.cache
def linen_variables():
    return jax.jit(linen_mha().init)(jax.random.key(0), INPUTS)


@functools.cache
def of_flax(make, mask, **settings):
    """What Flax's own attention answers; without a mask all is seen."""
    visible = jnp.ones_like(PADDING) if mask == "none" else MASKS[mask]
    if make is nnx_mha:
        return nnx_answer(nnx_mha(**settings), INPUTS, mask=visible)
    return linen_answer(linen_mha(), linen_variables(), INPUTS, mask=visible)


# attention_fn inside Flax's modules


@pytest.mark.parametrize(
    ("mask", "kv_heads"),
    sweep_but(
        [*((name, 2) for name in MASKS), *((name, N) for name in MASKS), ("causal", 1)],
        *((name, 2) for name in ("none", "causal", "padding", "both")),
    ),
)
def test_nnx_mha_agrees_with_flax_forward_and_backward(mask, kv_heads):
    got = nnx_answer(nnx_mha(attention_fn, num_kv_heads=kv_heads), INPUTS, mask=MASKS[mask])
    close(got, of_flax(nnx_mha, mask, num_kv_heads=kv_heads), 1e-4)


@pytest.mark.parametrize("mask", sweep_but(list(MASKS), "causal", "padding", "both"))
def test_linen_mha_agrees_with_flax_forward_and_backward(mask):
    got = linen_answer(linen_mha(attention_fn), linen_variables(), INPUTS, mask=MASKS[mask])
    close(got, of_flax(linen_mha, mask), 1e-4)


@pytest.mark.skipif(
    "is_causal" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters, reason="flax before 0.12.8"
)
def test_is_causal_agrees_with_flax():
    got = nnx_answer(nnx_mha(attention_fn, num_kv_heads=2), INPUTS, is_causal=True, mask=PADDING)
    close(got, of_flax(nnx_mha, "both", num_kv_heads=2), 1e-4)


def test_nnx_mha_accepts_a_kernelry_mask():
    got = nnx_answer(nnx_mha(attention_fn, num_kv_heads=2), INPUTS, mask=masks.Causal())
    close(got, of_flax(nnx_mha, "causal", num_kv_heads=2), 1e-4)


def test_no_layer_mask_adds_nothing():
    query = jnp.ones((1, 4, 1, 8))
    with kernelry.record() as resolutions:
        for layer_mask in (None, masks.Full()):
            jax.eval_shape(functools.partial(attention_fn, mask=masks.Causal(), layer_mask=layer_mask), *[query] * 3)
    assert [resolution.request.mask for resolution in resolutions] == [masks.Causal().form] * 2


@pytest.mark.parametrize("make", [nnx_mha, linen_mha])
def test_what_a_partial_binds_survives_flax(make):
    """linen inspects the signature of the partial, and both hand it mask=None."""
    bound = functools.partial(attention_fn, layer_mask=masks.SlidingWindow(3), kernel="blockwise", mode="prefill")
    module = make(bound)
    with kernelry.record() as resolutions:
        if make is nnx_mha:
            nnx.eval_shape(lambda module, inputs: module(inputs), module, INPUTS)
        else:
            jax.eval_shape(module.init, jax.random.key(0), INPUTS)
    request = resolutions[0].request
    assert (resolutions[0].kernel, str(request.mode.value)) == ("blockwise", "prefill")
    assert request.mask == masks.SlidingWindow(3).form


def test_nnx_mha_decode_cache_agrees_with_flax():
    inputs = array(B, T, F)
    ours, theirs = nnx_mha(functools.partial(attention_fn, mode="decode"), decode=True), nnx_mha(decode=True)
    for module in (ours, theirs):
        module.init_cache(inputs.shape)
    step = nnx.jit(lambda module, x: module(x))
    for place in range(T):
        x = inputs[:, place : place + 1]
        close(step(ours, x), step(theirs, x))


def test_linen_mha_decode_cache_agrees_with_flax():
    inputs = np.asarray(INPUTS)
    ours, theirs = linen_mha(functools.partial(attention_fn, mode="decode"), decode=True), linen_mha(decode=True)
    variables = jax.jit(theirs.init)(jax.random.key(0), INPUTS)
    cache = {ours: variables["cache"], theirs: variables["cache"]}

    @functools.partial(jax.jit, static_argnums=0)
    def step(module, cache, x):
        return module.apply({"params": variables["params"], "cache": cache}, x, mutable=["cache"])

    for place in range(T):
        out = {}
        for module in (ours, theirs):
            out[module], changed = step(module, cache[module], inputs[:, place : place + 1])
            cache[module] = changed["cache"]
        close(out[ours], out[theirs])


# attention_fn called directly


attend = jax.jit(attention_fn, static_argnames=("is_causal", "deterministic", "dropout_rate", "broadcast_dropout"))


def flat_oracle(q, k, v, visible, bias=0.0):
    """The oracle's answer for any number of batch dimensions."""
    full = (*q.shape[:-3], N, T, T)
    rows = [np.reshape(x, (-1, *x.shape[-3:])) for x in (q, k, v)]
    visible, bias = (np.broadcast_to(x, full).reshape(-1, N, T, T) for x in (visible, bias))
    return oracle(*rows, visible, bias=bias).reshape(q.shape)


@pytest.mark.parametrize(
    ("batch", "mask_batch"),
    sweep_but(
        [((), ()), ((3,), (1,)), ((2, 3), ()), ((2, 3), (2, 1)), ((2, 3), (2, 3)), ((2, 1, 3), (1, 1, 3))],
        *(((), ()), ((2, 3), (2, 1)), ((2, 1, 3), (1, 1, 3))),
    ),
)
def test_any_number_of_batch_dimensions(batch, mask_batch):
    q, k, v = qkv(*batch)
    visible, bias = visible_array(*mask_batch, 1, T, T), array(*mask_batch, 1, T, T, seed=6)
    close(attend(q, k, v, bias, visible), flat_oracle(q, k, v, visible, bias))


def test_a_mask_per_head_is_folded_with_its_heads():
    q, k, v = qkv(2, 3)
    visible = visible_array(2, 3, N, T, T)
    close(attend(q, k, v, mask=visible), flat_oracle(q, k, v, visible))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_casts_query_key_and_value(dtype):
    with kernelry.record() as resolutions:
        out = jax.eval_shape(functools.partial(attention_fn, dtype=dtype), *qkv(B))
    assert out.dtype == dtype
    assert resolutions[0].request.dtype == np.dtype(dtype).name


def test_without_dtype_query_key_and_value_are_promoted():
    q, k, v = qkv(B)
    assert jax.eval_shape(attention_fn, q.astype(jnp.bfloat16), k, v).dtype == jnp.float32


def test_precision_reaches_the_request():
    with kernelry.record() as resolutions:
        jax.eval_shape(functools.partial(attention_fn, precision="highest"), *qkv(B))
    assert resolutions[0].request.precision == "highest"


def test_a_fully_masked_row_is_zero():
    out = attend(*qkv(B), mask=jnp.zeros((1, 1, T, T), bool))
    np.testing.assert_array_equal(out, 0)


def test_integer_and_float_masks_mean_their_positive_entries():
    q, k, v = qkv(B)
    want = oracle(q, k, v, np.tril(np.ones((T, T), bool)))
    close(attend(q, k, v, is_causal=True), want)
    for dtype in (np.int32, np.float32, np.bool_):
        close(attend(q, k, v, mask=np.asarray(CAUSAL, dtype)), want)


def test_sinks_and_soft_cap_are_bound_by_partial():
    sinks = array(N)
    q, k, v = qkv(B)
    out = jax.jit(functools.partial(attention_fn, sinks=sinks, soft_cap=5.0, scale=0.3))(q, k, v)
    close(out, oracle(q, k, v, True, sinks=sinks, soft_cap=5.0, scale=0.3))


def test_a_bias_after_the_soft_cap_is_bound_by_partial():
    q, k, v = qkv(B)
    bias = array(N, T, T, seed=4)
    out = jax.jit(functools.partial(attention_fn, soft_cap=1.0, bias_after_cap=True))(q, k, v, bias)
    close(out, oracle(q, k, v, True, bias=bias, soft_cap=1.0, bias_after_cap=True))


# Dropout


def test_dropout_is_drawn_from_the_key():
    q, k, v = qkv(B)
    drop = functools.partial(attend, q, k, v, dropout_rate=0.5, broadcast_dropout=False)
    first = drop(dropout_rng=jax.random.key(1))
    own = jax.jit(functools.partial(kernelry.attention, dropout_rate=0.5))
    close(first, own(q, k, v, dropout_rng=jax.random.key(1)))
    assert not np.allclose(first, drop(dropout_rng=jax.random.key(2)))


def test_deterministic_means_no_dropout():
    q, k, v = qkv(B)
    got = attend(q, k, v, dropout_rate=0.5, deterministic=True, dropout_rng=jax.random.key(1))
    close(got, oracle(q, k, v, True))


def test_dropout_inside_nnx_mha():
    module = nnx_mha(attention_fn, num_kv_heads=2, dropout_rate=0.5, broadcast_dropout=False)
    run = nnx.jit(lambda module, deterministic: module(INPUTS, deterministic=deterministic), static_argnums=1)
    assert not np.allclose(run(module, False), run(module, False))
    close(run(module, True), of_flax(nnx_mha, "none", num_kv_heads=2)[0])


def test_dropout_inside_linen_mha():
    module = linen_mha(attention_fn, dropout_rate=0.5, broadcast_dropout=False)
    run = jax.jit(functools.partial(module.apply, deterministic=False))
    first, second = (run(linen_variables(), INPUTS, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2))
    assert not np.allclose(first, second)
    plain = jax.jit(functools.partial(module.apply, deterministic=True))(linen_variables(), INPUTS)
    close(plain, of_flax(linen_mha, "none")[0])


def test_active_dropout_without_a_key_is_refused():
    with pytest.raises(ArgumentError, match="needs dropout_rng="):
        attention_fn(*qkv(B), dropout_rate=0.5, broadcast_dropout=False)


@pytest.mark.parametrize("make", [nnx_mha, linen_mha])
def test_broadcast_dropout_is_refused_where_dropout_is_active(make):
    module = make(attention_fn, dropout_rate=0.5)

    def trace(deterministic):
        if make is nnx_mha:
            return nnx.eval_shape(lambda module: module(INPUTS, deterministic=deterministic), module)
        apply = functools.partial(module.apply, deterministic=deterministic, rngs={"dropout": jax.random.key(1)})
        return jax.eval_shape(apply, linen_variables(), INPUTS)

    with pytest.raises(ArgumentError, match="build the module with broadcast_dropout=False"):
        trace(False)
    assert trace(True).shape == (B, T, F)


def test_how_its_config_chooses_is_obeyed():
    config = AttentionConfig(kernel="blockwise", tilings={"blockwise": {"block_q": 4}})
    assert kernels_of(attention_fn, *qkv(B), config=config) == ["blockwise"]


def test_linen_force_fp32_for_softmax_is_the_case_anyway():
    settings = {"dtype": jnp.bfloat16, "force_fp32_for_softmax": True}
    got, want = (
        jax.jit(linen_mha(function, **settings).apply)(linen_variables(), INPUTS)
        for function in (attention_fn, nn.dot_product_attention)
    )
    close(np.float32(got), np.float32(want), 5e-2)
