"""What no row may see never leaks, and rows that see nothing are exactly nothing, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    GROUPED,
    HIDING,
    Answer,
    answer,
    arrays_of,
    attend,
    cotangents_of,
    masks_that_hide,
    visible_by,
)
from hypothesis import given, settings
from mask_strategies import masks_of

import kernelry
from kernelry import masks

pytestmark = pytest.mark.filterwarnings("ignore:the soft cap caps bias too")

L = 12
"""T and S."""

MASKS = masks_that_hide(L)
ARGUMENTS = {"all": {"soft_cap": 3.0, "scale": 0.5}, "partial": {"return_partial": True, "return_max_logits": True}}


def _case(arguments, dtype=np.float32, q_len=L, kv_len=L):
    """Returns arrays, cotangents and arguments; bias is whole, so that each pair has its own."""
    is_whole = arguments == "all"
    bias = (BATCH, GROUPED.query, q_len, kv_len)
    arrays = arrays_of(q_len, kv_len, bias=bias, sinks=is_whole, dtype=dtype)
    cotangents = cotangents_of(arrays, lse=not is_whole)
    if not is_whole:
        cotangents["out"] = cotangents["out"].astype(jnp.float32)
    return arrays, cotangents, ARGUMENTS[arguments]


def _hidden(visible):
    """Says by array what hides in it: True at elements that no row, or no key, or no pair uses."""
    batch, q_heads, q_len, kv_len = visible.shape
    seen = visible.reshape(batch, GROUPED.kv, q_heads // GROUPED.kv, q_len, kv_len).any(axis=(2, 3))
    slots = ~np.swapaxes(seen, 1, 2)[..., None]
    rows = ~np.swapaxes(visible.any(axis=3), 1, 2)[..., None]
    return {"query": rows, "key": slots, "value": slots, "bias": ~visible}


def _filled(arrays, hidden, filling):
    """Puts a number into what is hidden."""
    return arrays | {
        name: jnp.where(where, jnp.asarray(filling, arrays[name].dtype), arrays[name]) for name, where in hidden.items()
    }


def _assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def _assert_hides(run, mask, arrays, cotangents):
    """Runs with zeros, NaN and inf in what is hidden; all answers are the same, the hidden gradients exactly 0."""
    hidden = _hidden(visible_by(mask, arrays))
    clean = run(mask, _filled(arrays, hidden, 0.0), cotangents)
    for poison in (np.nan, np.inf, -np.inf):
        _assert_same(run(mask, _filled(arrays, hidden, poison), cotangents), clean)
    for name, where in hidden.items():
        gradient = np.asarray(clean[3][name])
        assert (gradient[np.broadcast_to(where, gradient.shape)] == 0).all(), name


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("mask", HIDING)
def test_hidden_slots_never_leak(mask, arguments):
    arrays, cotangents, given_here = _case(arguments)
    _assert_hides(lambda *call: answer(*call, **given_here), MASKS[mask], arrays, cotangents)


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("mask", ["window", "selection", "or"])
def test_hidden_slots_never_leak_from_a_compiled_program(mask, arguments):
    arrays, cotangents, given_here = _case(arguments)
    _assert_hides(jax.jit(lambda *call: answer(*call, **given_here)), MASKS[mask], arrays, cotangents)


@pytest.mark.parametrize("mask", ["causal", "dense", "or"])
def test_hidden_slots_never_leak_in_half_precision(mask):
    arrays, cotangents, given_here = _case("all", dtype="bfloat16")
    _assert_hides(lambda *call: answer(*call, **given_here), MASKS[mask], arrays, cotangents)


@given(masks_of(5, 7).map(lambda mask: mask.at(query_offset=0)))
@settings(max_examples=20, deadline=None)
def test_hidden_slots_of_any_composition_never_leak(mask):
    arrays, cotangents, given_here = _case("partial", q_len=5, kv_len=7)
    _assert_hides(lambda *call: answer(*call, **given_here), mask, arrays, cotangents)


def test_hidden_slots_never_leak_through_vmap():
    arrays, cotangents, given_here = _case("all")
    lengths = jnp.array([[3, L], [0, 7]])
    stacked = jax.tree.map(lambda array: jnp.stack([array, array * 0.5]), arrays)

    def mapped(stacked):
        return jax.vmap(lambda kv, arrays: answer(masks.Lengths(kv), arrays, cotangents, **given_here))(
            lengths, stacked
        )

    hidden = [_hidden(visible_by(masks.Lengths(row), arrays)) for row in lengths]
    hidden = {name: np.stack([one[name] for one in hidden]) for name in hidden[0]}
    _assert_same(mapped(_filled(stacked, hidden, np.nan)), mapped(_filled(stacked, hidden, 0.0)))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_unwritten_part_never_leaks_into_the_merge(poison):
    arrays = arrays_of(L, L)
    written, unwritten = masks.Causal(), masks.Lengths(np.array([2, 0]))
    hidden = jnp.arange(L)[None, :, None, None] >= jnp.array([2, 0])[:, None, None, None]

    def both(arrays, filling):
        cache = {name: jnp.where(hidden, filling, arrays[name]) for name in ("key", "value")}
        parts = [attend(written, arrays, return_partial=True), attend(unwritten, arrays | cache, return_partial=True)]
        return kernelry.finalize(kernelry.merge(parts))

    d_out = cotangents_of(arrays)["out"]
    (out, pull), (clean, pull_clean) = (jax.vjp(lambda a, f=f: both(a, f), arrays) for f in (poison, 0.0))
    _assert_same((out, pull(d_out)), (clean, pull_clean(d_out)))


def _rows(mask, arrays):
    """True at fully masked rows: [B, N, T] and [B, T, N, 1]."""
    empty = ~visible_by(mask, arrays).any(axis=3)
    return empty, np.swapaxes(empty, 1, 2)[..., None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("mask", HIDING)
def test_fully_masked_rows_are_exactly_nothing(mask, arguments, dtype):
    arrays, cotangents, given_here = _case(arguments, dtype)
    empty, beside = _rows(MASKS[mask], arrays)
    found = Answer(*answer(MASKS[mask], arrays, cotangents, **given_here))
    assert empty.any()
    assert (np.asarray(found.out)[np.broadcast_to(beside, found.out.shape)] == 0).all()
    if found.lse is not None:
        np.testing.assert_array_equal(np.isneginf(found.lse), empty)
        np.testing.assert_array_equal(np.isneginf(found.max_logits), empty.all(axis=2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("mask", HIDING)
def test_fully_masked_rows_have_no_gradients(mask, arguments, dtype):
    arrays, cotangents, given_here = _case(arguments, dtype)
    empty, beside = _rows(MASKS[mask], arrays)
    only = {"out": cotangents["out"] * beside, "lse": None if cotangents["lse"] is None else cotangents["lse"] * empty}
    gradients = Answer(*answer(MASKS[mask], arrays, only, **given_here)).gradients
    for name, gradient in gradients.items():
        assert (np.asarray(gradient) == 0).all(), name


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("mask", HIDING)
def test_cotangents_of_fully_masked_rows_never_leak(mask, arguments):
    arrays, cotangents, given_here = _case(arguments)
    empty, beside = _rows(MASKS[mask], arrays)

    def gradients(filling):
        out = jnp.where(beside, filling, cotangents["out"])
        lse = None if cotangents["lse"] is None else jnp.where(empty, filling, cotangents["lse"])
        return Answer(*answer(MASKS[mask], arrays, {"out": out, "lse": lse}, **given_here)).gradients

    _assert_same(gradients(np.nan), gradients(0.0))


@pytest.mark.parametrize("mask", HIDING)
def test_a_row_is_nothing_only_where_every_part_says_so(mask):
    arrays = arrays_of(L, L)
    part = attend(MASKS[mask], arrays, return_partial=True)
    nothing = attend(~masks.Full(), arrays, return_partial=True)
    merged = kernelry.merge([nothing, part])
    empty, beside = _rows(MASKS[mask], arrays)
    np.testing.assert_array_equal(np.isneginf(merged.lse), empty)
    out = np.asarray(kernelry.finalize(merged, jnp.zeros(GROUPED.query)))
    np.testing.assert_array_equal((out == 0).all(axis=3, keepdims=True), beside)


@pytest.mark.parametrize("keys", [~masks.Full(), masks.Lengths(np.zeros(2, int)), masks.Segments(np.full(L, -1))])
def test_an_attention_that_sees_nothing_is_nothing(keys):
    arrays, cotangents, given_here = _case("all")
    found = Answer(*answer(keys, _filled(arrays, _hidden(visible_by(keys, arrays)), np.nan), cotangents, **given_here))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((found.out, found.gradients)))


def test_zero_logits_are_no_empty_rows():
    arrays = jax.tree.map(jnp.zeros_like, arrays_of(L, L))
    partial = attend(masks.Causal(), arrays, return_partial=True)
    np.testing.assert_allclose(np.asarray(partial.lse)[0, 0], np.log(np.arange(1, L + 1)), atol=1e-6)
