"""attention() under transformations, and `blockwise` against the float64 reference.

`dot_product` is held to the reference by test_grid.py, test_hidden.py and their neighbours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError
from kernelry.testing import reference_attention

T = S = 24
IDS = np.array([[0] * 7 + [1] * 9 + [-1] * 3 + [2] * 5, [3] * 24], np.int32)
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(5),
    "window_both_sides": masks.SlidingWindow(3, 2),
    "packed": masks.Causal() & masks.Segments(IDS),
    "packed_window": masks.SlidingWindow(4) & masks.Segments(IDS, IDS[:, ::-1].copy()),
    "offset": masks.Causal().at(query_offset=3, kv_offset=5),
}
EXTRAS = {"plain": {}, "all": {"soft_cap": 3.0, "scale": 0.4, "sinks": np.array([-1.0, 0.0, 0.5, 2.0], np.float32)}}


def _arrays(kv_heads=2, value_dim=8, dtype=np.float32, kv_len=S):
    rng = np.random.default_rng(1)
    shapes = ((2, T, 4, 8), (2, kv_len, kv_heads, 8), (2, kv_len, kv_heads, value_dim))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _call(kernel, *arrays, **arguments):
    """Calls a kernel; blockwise meets several blocks and an uneven last one."""
    tiling = {"block_q": 10} if kernel == "blockwise" else None
    with kernelry.use(tiling=tiling):
        return jax.jit(lambda *arrays: kernelry.attention(*arrays, kernel=kernel, **arguments))(*arrays)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("mask", MASKS)
def test_blockwise_output_equals_the_reference(mask, extras):
    arrays, extra = _arrays(), EXTRAS[extras]
    out = _call("blockwise", *arrays, mask=MASKS[mask], **extra)
    expected = reference_attention(*arrays, mask=MASKS[mask], **extra).out
    np.testing.assert_allclose(np.asarray(out), expected, atol=2e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_blockwise_statistics_equal_the_reference(mask):
    arrays = _arrays()
    partial, max_logits = _call("blockwise", *arrays, mask=MASKS[mask], return_partial=True, return_max_logits=True)
    expected = reference_attention(*arrays, mask=MASKS[mask])
    np.testing.assert_allclose(np.asarray(partial.lse), expected.lse, atol=2e-6)
    np.testing.assert_allclose(np.asarray(max_logits), expected.max_logits, atol=2e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_blockwise_gradients_equal_finite_differences_of_the_reference(mask):
    arrays, extra = _arrays(), EXTRAS["all"]
    sinks = jnp.asarray(extra["sinks"])
    weight = np.random.default_rng(2).standard_normal((2, T, 4, 8))
    directions = [np.random.default_rng(3).standard_normal(np.shape(a)) for a in (*arrays, sinks)]

    def loss(q, k, v, sinks):
        out = _call("blockwise", q, k, v, mask=MASKS[mask], sinks=sinks, soft_cap=3.0, scale=0.4)
        return (out * weight).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays, sinks)
    for place, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):

        def at(step, place=place, direction=direction):
            moved = [np.asarray(a, np.float64) for a in (*arrays, sinks)]
            moved[place] = moved[place] + step * direction
            q, k, v, s = moved
            return (reference_attention(q, k, v, mask=MASKS[mask], sinks=s, soft_cap=3.0, scale=0.4).out * weight).sum()

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.vdot(np.asarray(gradient, np.float64), direction), slope, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("value_dim", [4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blockwise_grouped_heads_and_split_head_dims(kv_heads, value_dim):
    arrays = _arrays(kv_heads, value_dim)
    out = _call("blockwise", *arrays, mask=masks.Causal())
    assert out.shape == (2, T, 4, value_dim)
    np.testing.assert_allclose(np.asarray(out), reference_attention(*arrays, mask=masks.Causal()).out, atol=2e-6)


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_blockwise_half_precision_stays_near_the_reference(dtype, atol):
    arrays = _arrays(dtype=dtype)
    out = _call("blockwise", *arrays, mask=masks.Causal())
    assert out.dtype == dtype
    expected = reference_attention(*(np.asarray(a, np.float32) for a in arrays), mask=masks.Causal()).out
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=atol)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_blockwise_hidden_slots_never_leak(poison):
    q, k, v = _arrays()
    mask = masks.Causal() & masks.Segments(IDS)
    hidden = jnp.asarray(IDS < 0)[:, :, None, None]
    bad = tuple(jnp.where(hidden, poison, array) for array in (q, k, v))

    def loss(*arrays):
        return jnp.sin(_call("blockwise", *arrays, mask=mask, soft_cap=3.0)).sum()

    np.testing.assert_array_equal(loss(*bad), loss(q, k, v))
    for found, expected in zip(jax.grad(loss, (0, 1, 2))(*bad), jax.grad(loss, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_blockwise_fully_masked_rows_are_zero_with_zero_gradients():
    q, k, v = _arrays()
    mask = masks.Causal() & masks.Segments(np.full((2, T), -1, np.int32))
    sinks = jnp.zeros(4)
    out = _call("blockwise", q, k, v, mask=mask, sinks=sinks)
    assert (np.asarray(out) == 0).all()
    gradients = jax.grad(lambda *a: _call("blockwise", *a[:3], mask=mask, sinks=a[3]).sum(), (0, 1, 2, 3))(
        q, k, v, sinks
    )
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_sinks_of_minus_infinity_are_no_sinks(kernel):
    q, k, v = _arrays()
    mask = MASKS["packed"]
    sinks = jnp.full(4, -jnp.inf)
    without = _call(kernel, q, k, v, mask=mask)
    np.testing.assert_allclose(
        np.asarray(_call(kernel, q, k, v, mask=mask, sinks=sinks)), np.asarray(without), atol=1e-6
    )
    gradient = jax.grad(lambda q: _call(kernel, q, k, v, mask=mask, sinks=sinks).sum())(q)
    assert np.isfinite(np.asarray(gradient)).all()


def test_a_bias_under_a_soft_cap_is_warned_about():
    with pytest.warns(UserWarning, match="soft cap caps bias"):
        kernelry.attention(*_arrays(), bias=jnp.zeros((1, S)), soft_cap=2.0)


def test_decode_step_equals_the_last_row_of_the_whole():
    q, k, v = _arrays()
    mask = masks.SlidingWindow(5)
    whole = kernelry.attention(q, k, v, mask=mask)

    @jax.jit
    def step(index, q):
        return kernelry.attention(q, k, v, mask=mask.at(query_offset=index), mode="decode")

    for index in (0, 7, T - 1):
        np.testing.assert_allclose(
            np.asarray(step(jnp.int32(index), q[:, index : index + 1])[:, 0]), np.asarray(whole[:, index]), atol=1e-6
        )


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_vmap_scan_and_remat_agree_with_plain_calls(kernel):
    q, k, v = _arrays()
    stacked = tuple(jnp.stack([array, array * 0.5]) for array in (q, k, v))

    def call(q, k, v):
        return _call(kernel, q, k, v, mask=masks.SlidingWindow(5))

    plain = np.stack([np.asarray(call(*(array[i] for array in stacked))) for i in range(2)])
    np.testing.assert_allclose(np.asarray(jax.vmap(call)(*stacked)), plain, atol=1e-6)
    scanned = jax.lax.scan(lambda carry, xs: (carry, call(*xs)), 0, stacked)[1]
    np.testing.assert_allclose(np.asarray(scanned), plain, atol=1e-6)
    remat = jax.grad(lambda q: jax.checkpoint(call)(q, k, v).sum())(q)
    np.testing.assert_allclose(np.asarray(remat), np.asarray(jax.grad(lambda q: call(q, k, v).sum())(q)), atol=1e-6)


@pytest.mark.parametrize("name", ["query", "key", "value", "sinks", "bias"])
def test_differentiating_what_was_not_asked_for_is_an_error(name):
    q, k, v = _arrays()
    arrays = {"query": q, "key": k, "value": v, "sinks": jnp.zeros(4), "bias": jnp.zeros((1, 1, T, S))}

    def loss(array, mode, gradients):
        given = {**arrays, name: array}
        qkv = (given.pop("query"), given.pop("key"), given.pop("value"))
        return kernelry.attention(*qkv, **given, mode=mode, gradients=gradients).sum()

    with pytest.raises(ArgumentError, match=f"the gradient of {name} was not asked for"):
        jax.grad(loss)(arrays[name], "prefill", None)
    others = set(arrays) - {name}
    with pytest.raises(ArgumentError, match=f"the gradient of {name} was not asked for"):
        jax.grad(loss)(arrays[name], "train", others)
    assert np.isfinite(np.asarray(jax.grad(loss)(arrays[name], "prefill", {name}))).all()


def test_numpy_arrays_are_accepted():
    arrays = tuple(np.asarray(array) for array in _arrays())
    np.testing.assert_allclose(
        np.asarray(kernelry.attention(*arrays)), reference_attention(*arrays, mask=masks.Full()).out, atol=2e-6
    )


def test_hidden_bias_never_leaks_through_the_soft_cap():
    arrays = _arrays()
    mask = masks.Lengths(np.array([20, 20], np.int32))
    bias = jnp.where(jnp.arange(S) < 20, 0.0, jnp.nan)[None]

    def loss(query, bias):
        return kernelry.attention(query, *arrays[1:], mask=mask, bias=bias, soft_cap=3.0).sum()

    with pytest.warns(UserWarning, match="soft cap caps bias"):
        found = jax.grad(loss)(arrays[0], bias)
    with pytest.warns(UserWarning, match="soft cap caps bias"):
        np.testing.assert_array_equal(found, jax.grad(loss)(arrays[0], jnp.zeros((1, S))))


def test_output_carries_a_name_for_remat_policies():
    q, k, v = _arrays()
    assert "kernelry_out" in str(jax.make_jaxpr(lambda q: kernelry.attention(q, k, v))(q))
    partial = jax.make_jaxpr(lambda q: kernelry.attention(q, k, v, return_partial=True).lse)(q)
    assert "kernelry_lse" in str(partial)


def test_gradients_of_an_operand_that_is_not_passed_are_an_error():
    with pytest.raises(ArgumentError, match="gradients names bias"):
        kernelry.attention(*_arrays(), gradients=["query", "bias"])


def test_default_precision_asks_nothing_of_a_kernel():
    with kernelry.record() as resolutions:
        kernelry.attention(*_arrays(), precision=jax.lax.Precision.DEFAULT)
    assert resolutions[0].request.precision is None


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_half_precision_survives_strict_promotion(kernel):
    arrays = _arrays(dtype="bfloat16")
    with jax.numpy_dtype_promotion("strict"):
        out = _call(kernel, *arrays, mask=masks.Causal(), soft_cap=3.0)
    assert out.dtype == jnp.bfloat16
