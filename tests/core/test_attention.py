"""attention() under transformations, and `blockwise` against the float64 reference.

`dot_product` is compared with the reference by test_grid.py, test_hidden.py and their neighbours, `blockwise` over a
larger matrix by the conformance kit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import QKV, WHOLE, Answer, Heads, arrays_of, assert_twins, cotangents_of, oracle_answer
from pairs import sweep_but

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError
from kernelry.testing import reference_attention, reference_mask

pytestmark = pytest.mark.versions

T = S = WHOLE[0]
IDS = np.array([[0] * 4 + [1] * 4 + [-1] * 2 + [2] * 2, [3] * 12], np.int32)
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(3),
    "window_both_sides": masks.SlidingWindow(2, 1),
    "packed": masks.Causal() & masks.Segments(IDS),
    "packed_window": masks.SlidingWindow(4) & masks.Segments(IDS, IDS[:, ::-1].copy()),
    "offset": masks.Causal().at(query_offset=3, kv_offset=5),
}
CAPPED = {"soft_cap": 3.0, "scale": 0.4}
PARTIAL = {"return_partial": True, "return_max_logits": True}
CASES = {  # the mask, heads, sinks or not, arguments
    "full": ("full", Heads(), False, {}),
    "causal_capped_one_key_head": ("causal", Heads(4, 1, 8, 8), True, CAPPED),
    "window_partial_own_heads": ("window", Heads(4, 4, 8, 4), False, PARTIAL),
    "window_both_sides_capped": ("window_both_sides", Heads(4, 2, 8, 4), True, CAPPED),
    "packed_capped": ("packed", Heads(), True, CAPPED),
    "packed_window_partial": ("packed_window", Heads(), False, PARTIAL),
    "offset_partial_one_key_head": ("offset", Heads(4, 1, 8, 4), False, PARTIAL),
}


def _arrays(dtype=np.float32):
    return tuple(arrays_of(T, S, seed=1, dtype=dtype).values())


def _call(kernel, *arrays, **arguments):
    """Calls a kernel; blockwise meets several blocks and an uneven last one."""
    tiling = {"block_q": 5, "block_kv": 5} if kernel == "blockwise" else None
    with kernelry.use(tiling=tiling):
        return kernelry.attention(*arrays, kernel=kernel, **arguments)


def _jitted(kernel, *arrays, **arguments):
    return jax.jit(lambda *arrays: _call(kernel, *arrays, **arguments))(*arrays)


@functools.partial(jax.jit, static_argnames=("kernel", "items"))
def _compiled(mask, arrays, cotangents, kernel, items):
    arguments = dict(items)

    def forward(arrays):
        result = _call(kernel, **arrays, mask=mask, **arguments)
        if not arguments.get("return_partial"):
            return {"out": result, "lse": None}, None
        return {"out": result[0].out, "lse": result[0].lse}, result[1]

    returned, pull, max_logits = jax.vjp(forward, arrays, has_aux=True)
    return returned["out"], returned["lse"], max_logits, pull(cotangents)[0]


def _answer(mask, arrays, cotangents, kernel="blockwise", **arguments):
    """Answers by one program for each form of mask, shapes and arguments."""
    return Answer(*_compiled(mask, arrays, cotangents, kernel, tuple(arguments.items())))


@pytest.mark.parametrize("case", CASES)
def test_blockwise_equals_the_reference_forward_and_backward(case):
    mask, heads, sinks, arguments = CASES[case]
    arrays = arrays_of(T, S, heads, sinks=sinks)
    cotangents = cotangents_of(arrays, lse=arguments is PARTIAL)
    found = _answer(MASKS[mask], arrays, cotangents, **arguments)
    assert_twins(found, oracle_answer(MASKS[mask], arrays, cotangents, **arguments))


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_blockwise_half_precision_stays_near_the_reference(dtype, atol):
    arrays = _arrays(dtype=dtype)
    out = _jitted("blockwise", *arrays, mask=masks.Causal())
    assert out.dtype == dtype
    expected = reference_attention(*(np.asarray(a, np.float32) for a in arrays), mask=masks.Causal()).out
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=atol)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_blockwise_hidden_slots_never_leak(poison):
    arrays, hidden = arrays_of(T, S, sinks=True), (IDS < 0)[:, :, None, None]
    bad = arrays | {name: jnp.where(hidden, poison, arrays[name]) for name in QKV}
    found, expected = (_answer(MASKS["packed"], given, cotangents_of(arrays), **CAPPED) for given in (bad, arrays))
    for one, other in zip(jax.tree.leaves(found.gradients), jax.tree.leaves(expected.gradients), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.out, expected.out)


def test_blockwise_fully_masked_rows_are_zero_with_zero_gradients():
    arrays = arrays_of(T, S, sinks=True)
    nothing = masks.Causal() & masks.Segments(np.full((2, T), -1, np.int32))
    found = _answer(nothing, arrays, cotangents_of(arrays), **CAPPED)
    assert all((np.asarray(array) == 0).all() for array in (found.out, *found.gradients.values()))


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_sinks_of_minus_infinity_are_no_sinks(kernel):
    arrays = arrays_of(T, S)
    cotangents = cotangents_of(arrays)
    sinks = {"sinks": np.full(4, -np.inf, np.float32)}
    found = _answer(MASKS["packed"], arrays | sinks, cotangents, kernel, **CAPPED)
    assert (np.asarray(found.gradients.pop("sinks")) == 0).all()
    assert_twins(found, oracle_answer(MASKS["packed"], arrays, cotangents, **CAPPED))


def _traced(**arguments):
    jax.eval_shape(lambda *arrays: kernelry.attention(*arrays, **arguments), *_arrays())


def test_a_bias_under_a_soft_cap_is_warned_about():
    with pytest.warns(UserWarning, match=r"soft cap caps bias.*mask=, or pass bias_after_cap=True"):
        _traced(bias=jnp.zeros((1, S)), soft_cap=2.0)


def test_a_bias_after_the_soft_cap_is_not_warned_about():
    with kernelry.record() as resolutions:
        _traced(bias=jnp.zeros((1, S)), soft_cap=2.0, bias_after_cap=True)
        _traced(bias=jnp.zeros((1, S)), bias_after_cap=True)
        _traced(soft_cap=2.0, bias_after_cap=True)
    assert [resolution.request.bias_after_cap for resolution in resolutions] == [True, False, False]


@pytest.mark.filterwarnings("ignore:the soft cap caps bias too")
@pytest.mark.parametrize("fill", [np.nan, -1e9])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_bias_and_soft_cap_in_either_order_equal_the_reference_whatever_the_bias_of_hidden_pairs(kernel, after, fill):
    arrays, order = arrays_of(T, S, bias=(2, 4, T, S)), CAPPED | PARTIAL | {"bias_after_cap": after}
    cotangents = cotangents_of(arrays, lse=True)
    visible = reference_mask(MASKS["packed"], 2, 4, T, S)
    filled = arrays | {"bias": jnp.where(visible, arrays["bias"], fill)}
    found = _answer(MASKS["packed"], filled, cotangents, kernel, **order)
    assert_twins(found, oracle_answer(MASKS["packed"], arrays, cotangents, **order))


@pytest.mark.parametrize("shape", [(1, 1, 1, S), (2, 1, T, 1), (1, 4, 1, 1)])
def test_blockwise_sums_the_gradient_of_a_bias_after_the_cap(shape):
    arrays, order = arrays_of(T, S, bias=shape, sinks=True), CAPPED | {"bias_after_cap": True}
    cotangents = cotangents_of(arrays)
    found = _answer(MASKS["causal"], arrays, cotangents, **order)
    assert_twins(found, oracle_answer(MASKS["causal"], arrays, cotangents, **order))


def test_decode_step_equals_the_last_row_of_the_whole():
    q, k, v = _arrays()
    mask = masks.SlidingWindow(5)
    whole = reference_attention(q, k, v, mask=mask).out

    @jax.jit
    def step(index, q):
        return kernelry.attention(q, k, v, mask=mask.at(query_offset=index), mode="decode")

    for index in (0, 7, T - 1):
        found = step(jnp.int32(index), q[:, index : index + 1])[:, 0]
        np.testing.assert_allclose(np.asarray(found), whole[:, index], atol=2e-6)


@pytest.mark.parametrize("kernel", sweep_but(["dot_product", "blockwise"], "dot_product"))
def test_vmap_scan_and_remat_agree_with_plain_calls(kernel):
    arrays = _arrays()
    stacked = tuple(jnp.stack([array, array * 0.5]) for array in arrays)

    def call(q, k, v):
        return _call(kernel, q, k, v, mask=masks.SlidingWindow(5))

    @jax.jit
    def run(*stacked):
        plain = jnp.stack([call(*(array[i] for array in stacked)) for i in range(2)])
        q, k, v = (array[0] for array in stacked)
        gradients = [jax.grad(lambda q, f=f: f(q, k, v).sum())(q) for f in (jax.checkpoint(call), call)]
        scanned = jax.lax.scan(lambda carry, xs: (carry, call(*xs)), 0, stacked)[1]
        return plain, jax.vmap(call)(*stacked), scanned, *gradients

    plain, mapped, scanned, remat, gradient = (np.asarray(array) for array in run(*stacked))
    np.testing.assert_allclose(mapped, plain, atol=1e-6)
    np.testing.assert_allclose(scanned, plain, atol=1e-6)
    np.testing.assert_allclose(remat, gradient, atol=1e-6)


@pytest.mark.parametrize("name", ["query", "key", "value", "sinks", "bias"])
def test_differentiating_what_was_not_asked_for_is_an_error(name):
    """Traced alone: test_precision.py compares the gradients that are asked for."""
    q, k, v = _arrays()
    arrays = {"query": q, "key": k, "value": v, "sinks": jnp.zeros(4), "bias": jnp.zeros((1, 1, T, S))}

    def differentiate(mode, gradients):
        def loss(array):
            return kernelry.attention(**(arrays | {name: array}), mode=mode, gradients=gradients).sum()

        return jax.eval_shape(jax.grad(loss), arrays[name])

    with pytest.raises(ArgumentError, match=f"the gradient of {name} was not asked for"):
        differentiate("prefill", None)
    with pytest.raises(ArgumentError, match=f"the gradient of {name} was not asked for"):
        differentiate("train", set(arrays) - {name})
    assert differentiate("prefill", {name}).shape == arrays[name].shape


def test_no_gradient_passes_through_max_logits():
    query, key, value = _arrays()

    def largest(query, key):
        return kernelry.attention(query, key, value, kernel="dot_product", return_max_logits=True)[1].sum()

    for gradient in jax.jit(jax.grad(largest, argnums=(0, 1)))(query, key):
        assert (np.asarray(gradient) == 0).all()


def test_numpy_arrays_are_accepted():
    arrays = tuple(np.asarray(array) for array in _arrays())
    out = jax.jit(lambda: kernelry.attention(*arrays))()
    np.testing.assert_allclose(np.asarray(out), reference_attention(*arrays, mask=masks.Full()).out, atol=2e-6)


def test_output_carries_a_name_for_remat_policies():
    q, k, v = _arrays()
    assert str(jax.make_jaxpr(lambda q: kernelry.attention(q, k, v))(q)).count("name=context") == 1
    partial = jax.make_jaxpr(lambda q: kernelry.attention(q, k, v, return_partial=True).lse)(q)
    assert str(partial).count("name=context") == 3  # out, lse, and what rounding took from lse


def test_gradients_of_an_operand_that_is_not_passed_are_an_error():
    with pytest.raises(ArgumentError, match="gradients names bias"):
        kernelry.attention(*_arrays(), gradients=["query", "bias"])


def test_default_precision_asks_nothing_of_a_kernel():
    with kernelry.record() as resolutions:
        jax.eval_shape(lambda *a: kernelry.attention(*a, precision=jax.lax.Precision.DEFAULT), *_arrays())
    assert resolutions[0].request.precision is None


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_half_precision_survives_strict_promotion(kernel):
    with jax.numpy_dtype_promotion("strict"):
        out = jax.eval_shape(
            lambda *arrays: _call(kernel, *arrays, mask=masks.Causal(), soft_cap=3.0), *_arrays(dtype="bfloat16")
        )
    assert out.dtype == jnp.bfloat16
