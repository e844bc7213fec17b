"""Dtypes of inputs and logits, the precision of products, and which gradients are asked for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    WHOLE,
    answer,
    arrays_of,
    assert_twins,
    attend,
    compiled_answer,
    compiled_attend,
    cotangents_of,
    oracle_answer,
)

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError

pytestmark = [pytest.mark.versions, pytest.mark.filterwarnings("ignore:the soft cap caps bias too")]

L = WHOLE[0]
BIAS = (BATCH, 1, 1, L)
OPERANDS = ("query", "key", "value", "bias", "sinks")


def _oracle(arrays, **arguments):
    return oracle_answer(masks.Causal(), arrays, cotangents_of(arrays), **arguments).out


@pytest.mark.parametrize(
    "arguments", [{}, {"soft_cap": 3.0, "scale": 0.4}, {"return_partial": True, "return_max_logits": True}]
)
def test_float64_equals_the_oracle(arguments):
    with jax.enable_x64(True):
        arrays = arrays_of(L, L, dtype=np.float64, bias=BIAS, sinks="return_partial" not in arguments)
        cotangents = cotangents_of(arrays, lse="return_partial" in arguments)
        cotangents = jax.tree.map(lambda array: array.astype(jnp.float64), cotangents)
        found = compiled_answer(masks.Causal(), arrays, cotangents, logits_dtype=jnp.float64, **arguments)
        assert {leaf.dtype for leaf in jax.tree.leaves((found.out, found.gradients))} == {np.dtype(np.float64)}
        assert_twins(
            found, oracle_answer(masks.Causal(), arrays, cotangents, **arguments), atol=1e-13, gradient_atol=1e-12
        )


def test_logits_of_float64_are_float32_unless_asked_otherwise():
    with jax.enable_x64(True):
        arrays = arrays_of(L, L, dtype=np.float64)
        out = compiled_attend(masks.Causal(), arrays)
        error = np.abs(np.asarray(out) - _oracle(arrays)).max()
    assert out.dtype == jnp.float64
    assert 1e-9 < error < 2e-6


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 5e-2), ("float16", 5e-3)])
def test_logits_dtype_sets_the_precision_of_logits_and_statistics(dtype, atol):
    arrays = arrays_of(L, L)
    partial = jax.eval_shape(
        lambda arrays: attend(masks.Causal(), arrays, logits_dtype=dtype, return_partial=True), arrays
    )
    assert partial.lse.dtype == dtype
    out = compiled_attend(masks.Causal(), arrays, logits_dtype=dtype)
    assert out.dtype == jnp.float32
    error = np.abs(np.asarray(out) - _oracle(arrays)).max()
    assert atol / 100 < error < atol


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_float32_where_the_inputs_are_narrower(dtype):
    arrays = arrays_of(L, L, dtype=dtype)
    partial, max_logits = compiled_attend(masks.Causal(), arrays, return_partial=True, return_max_logits=True)
    assert {partial.out.dtype, partial.lse.dtype, max_logits.dtype} == {np.dtype(np.float32)}
    expected = oracle_answer(masks.Causal(), arrays, cotangents_of(arrays))
    np.testing.assert_allclose(np.asarray(partial.lse), expected.lse, atol=2e-6)
    np.testing.assert_allclose(np.asarray(max_logits), expected.max_logits, atol=2e-6)


def _lowered(**arguments):
    arrays = arrays_of(L, L)
    return jax.jit(lambda arrays: attend(masks.Causal(), arrays, **arguments)).lower(arrays).as_text()


@pytest.mark.parametrize("precision", ["high", "highest", jax.lax.Precision.HIGHEST])
def test_precision_reaches_every_product(precision):
    text = _lowered(precision=precision)
    name = jax.lax.Precision(precision).name
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all(f"precision = [{name}, {name}]" in line for line in products)


def test_no_precision_leaves_the_products_as_jax_has_them():
    assert _lowered() == _lowered(precision="default")
    assert "HIGH" not in _lowered()


def test_precision_changes_nothing_but_rounding():
    arrays = arrays_of(L, L)
    out = compiled_attend(masks.Causal(), arrays, precision="highest")
    np.testing.assert_allclose(np.asarray(out), _oracle(arrays), atol=2e-6)


SUBSETS = [subset for size in (1, 4) for subset in itertools.combinations(OPERANDS, size)]


@functools.partial(jax.jit, static_argnames="mode")
def _gradients_of_subsets(arrays, cotangents, mode):
    """The gradients of all operands, and those of each subset alone."""
    everything = answer(masks.Causal(), arrays, cotangents, gradients=OPERANDS, mode=mode)[3]
    return everything, [answer(masks.Causal(), arrays, cotangents, gradients=s, mode=mode)[3] for s in SUBSETS]


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_gradients_of_any_subset_equal_those_of_all(mode):
    arrays = arrays_of(L, L, bias=BIAS, sinks=True)
    cotangents = cotangents_of(arrays)
    everything, subsets = _gradients_of_subsets(arrays, cotangents, mode)
    expected = oracle_answer(masks.Causal(), arrays, cotangents).gradients
    for name in OPERANDS:
        np.testing.assert_allclose(np.asarray(everything[name]), expected[name], atol=2e-5)
    for subset, found in zip(SUBSETS, subsets, strict=True):
        assert set(found) == set(subset)
        for name in subset:
            np.testing.assert_allclose(np.asarray(found[name]), np.asarray(everything[name]), atol=1e-6)


def _request(arrays, **arguments):
    """Returns what was asked for by a call that is only traced."""
    with kernelry.record() as resolutions:
        jax.eval_shape(lambda arrays: attend(masks.Causal(), arrays, **arguments), arrays)
    return resolutions[0].request


@pytest.mark.parametrize(("mode", "expected"), [("train", set(OPERANDS)), ("prefill", set()), ("decode", set())])
def test_gradients_by_default_are_those_of_the_mode(mode, expected):
    request = _request(arrays_of(L, L, bias=BIAS, sinks=True), mode=mode)
    assert {operand.value for operand in request.gradients} == expected


def test_gradients_by_default_are_those_of_the_arrays_passed():
    assert {operand.value for operand in _request(arrays_of(L, L)).gradients} == {"query", "key", "value"}


def test_no_gradients_may_be_asked_for_in_train_mode():
    arrays = arrays_of(L, L)
    with pytest.raises(ArgumentError, match="the gradient of query was not asked for"):
        jax.grad(lambda query: attend(masks.Causal(), arrays | {"query": query}, gradients=()).sum())(arrays["query"])
