"""What no row may see never leaks, and rows that see nothing are exactly nothing, forward and backward.

A mask and its arguments are called once, over a stack of arrays and cotangents: in each, something else is in what is
hidden or in the cotangents of empty rows. The tests read the answers. Without compiling a call is cheap, for the stacks
of all masks have the same shapes; some are compiled, too.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    GROUPED,
    HIDING,
    WHOLE,
    Answer,
    answer,
    arrays_of,
    attend,
    compiled_attend,
    cotangents_of,
    masks_that_hide,
    visible_by,
)
from hypothesis import given, settings
from mask_strategies import masks_of

import kernelry
from kernelry import masks

pytestmark = [pytest.mark.versions, pytest.mark.filterwarnings("ignore:the soft cap caps bias too")]

L = WHOLE[0]
NOTHING = {
    "not_full": ~masks.Full(),
    "no_lengths": masks.Lengths(np.zeros(2, int)),
    "no_segments": masks.Segments(np.full(L, -1)),
}
MASKS = masks_that_hide(L) | NOTHING
ARGUMENTS = {"all": {"soft_cap": 3.0, "scale": 0.5}, "partial": {"return_partial": True, "return_max_logits": True}}
FILLS = (0.0, np.nan, np.inf, -np.inf)
"""Of what is hidden, in the first rows of a stack; then come two fills of cotangents, and cotangents of empty rows."""

OF_COTANGENTS = slice(len(FILLS), len(FILLS) + 2)
OF_EMPTY_ROWS = len(FILLS) + 2

COMPILED = [("window", "all", "float32"), ("selection", "partial", "float32"), ("or", "all", "float32")]
COMPILED += [("causal", "all", "bfloat16"), ("dense", "partial", "bfloat16")]
SWEEP = [case for case in itertools.product(HIDING, ARGUMENTS, ("float32", "bfloat16")) if case not in COMPILED]
CASES = [
    *itertools.product(HIDING, ARGUMENTS, ["float32"], [False]),
    *((*case, True) for case in COMPILED),
    *(pytest.param(*case, True, marks=pytest.mark.sweep) for case in SWEEP),
]
each_case = pytest.mark.parametrize(("mask", "arguments", "dtype", "compiled"), CASES)


def _case(arguments, dtype=np.float32, q_len=L, kv_len=L):
    """Returns arrays and cotangents; bias is whole, so that each pair has its own."""
    is_whole = arguments == "all"
    bias = (BATCH, GROUPED.query, q_len, kv_len)
    arrays = arrays_of(q_len, kv_len, bias=bias, sinks=is_whole, dtype=dtype)
    cotangents = cotangents_of(arrays, lse=not is_whole)
    if not is_whole:
        cotangents["out"] = cotangents["out"].astype(jnp.float32)
    return jax.tree.map(np.asarray, arrays), jax.tree.map(np.asarray, cotangents)


def _hidden(visible):
    """Says by array what hides in it: True at elements that no row, or no key, or no pair uses."""
    batch, q_heads, q_len, kv_len = visible.shape
    seen = visible.reshape(batch, GROUPED.kv, q_heads // GROUPED.kv, q_len, kv_len).any(axis=(2, 3))
    slots = ~np.swapaxes(seen, 1, 2)[..., None]
    rows = ~np.swapaxes(visible.any(axis=3), 1, 2)[..., None]
    return {"query": rows, "key": slots, "value": slots, "bias": ~visible}


def _put(where, filling, array):
    return np.where(where, np.asarray(filling, array.dtype), array)


def _filled(arrays, hidden, filling):
    """Puts a number into what is hidden."""
    return arrays | {name: _put(where, filling, arrays[name]) for name, where in hidden.items()}


def _rows(visible):
    """True at fully masked rows, in the shapes of lse and of the output: [B, N, T] and [B, T, N, 1]."""
    empty = ~visible.any(axis=3)
    return {"lse": empty, "out": np.swapaxes(empty, 1, 2)[..., None]}


def _stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _answers(call, visible, arrays, cotangents):
    """Answers for each fill: output, lse, largest logits and gradients, all stacked."""
    empty = _rows(visible)
    given_out = {name: array for name, array in cotangents.items() if array is not None}
    poisoned = [{name: _put(empty[name], bad, of) for name, of in given_out.items()} for bad in (np.nan, np.inf)]
    of_empty_rows = {name: of * empty[name] for name, of in given_out.items()}
    fills = [_filled(arrays, _hidden(visible), filling) for filling in FILLS]
    many = [*fills, *fills[:1] * 2, arrays]
    found = call(_stack(many), _stack([*[given_out] * len(FILLS), *poisoned, of_empty_rows]))
    return Answer(*jax.tree.map(np.asarray, found))


@functools.cache
def _answers_of(mask, arguments, dtype="float32", compiled=False):
    """Calls a mask of MASKS over a stack; returns what is visible and the answers."""
    arrays, cotangents = _case(arguments, dtype)
    visible = visible_by(MASKS[mask], arrays)

    def stacked(mask, arrays, cotangents):
        return jax.vmap(lambda *one: answer(mask, one[0], {"lse": None} | one[1], **ARGUMENTS[arguments]))(
            arrays, cotangents
        )

    call = functools.partial(jax.jit(stacked) if compiled else stacked, MASKS[mask])
    return visible, _answers(call, visible, arrays, cotangents)


def _assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def _assert_hides(visible, answers):
    """All fills of what is hidden have the same answers, and the hidden gradients are exactly 0."""
    leaves = (answers.out, answers.lse, answers.max_logits, answers.gradients)
    for filling in range(1, len(FILLS)):
        _assert_same(*(jax.tree.map(lambda leaf, row=row: leaf[row], leaves) for row in (filling, 0)))
    for name, where in _hidden(visible).items():
        gradient = answers.gradients[name][0]
        assert (gradient[np.broadcast_to(where, gradient.shape)] == 0).all(), name


@each_case
def test_hidden_slots_never_leak(mask, arguments, dtype, compiled):
    _assert_hides(*_answers_of(mask, arguments, dtype, compiled))


@jax.jit
def _answers_of_booleans(visible, arrays, cotangents):
    def one(arrays, cotangents):
        return answer(masks.Dense(visible), arrays, cotangents, **ARGUMENTS["partial"])

    return jax.vmap(one)(arrays, cotangents)


@given(masks_of(5, 7, traced=False).map(lambda mask: mask.at(query_offset=0)))
@settings(max_examples=60, deadline=None)
def test_hidden_slots_of_any_composition_never_leak(mask):
    """Of its booleans; test_laws.py hides NaN from compositions themselves."""
    arrays, cotangents = _case("partial", q_len=5, kv_len=7)
    visible = visible_by(mask, arrays)
    _assert_hides(visible, _answers(functools.partial(_answers_of_booleans, visible), visible, arrays, cotangents))


def test_hidden_slots_never_leak_through_vmap():
    arrays, cotangents = _case("all")
    lengths = np.array([[3, L], [0, 7]])
    stacked = jax.tree.map(lambda array: np.stack([array, array * 0.5]), arrays)

    @jax.jit
    def mapped(stacked):
        def one(kv, arrays):
            return answer(masks.Lengths(kv), arrays, cotangents, **ARGUMENTS["all"])

        return jax.vmap(one)(jnp.asarray(lengths), stacked)

    hidden = _stack([_hidden(visible_by(masks.Lengths(row), arrays)) for row in lengths])
    _assert_same(mapped(_filled(stacked, hidden, np.nan)), mapped(_filled(stacked, hidden, 0.0)))


@jax.jit
def _merged_with_an_unwritten_part(arrays, filling, d_out):
    """The output and the gradients of a part that is written and one whose rows after 2 and 0 hold `filling`."""
    hidden = jnp.arange(L)[None, :, None, None] >= jnp.array([2, 0])[:, None, None, None]

    def both(arrays):
        cache = {name: jnp.where(hidden, filling, arrays[name]) for name in ("key", "value")}
        unwritten = attend(masks.Lengths(np.array([2, 0])), arrays | cache, return_partial=True)
        return kernelry.finalize(kernelry.merge([attend(masks.Causal(), arrays, return_partial=True), unwritten]))

    out, pull = jax.vjp(both, arrays)
    return out, pull(d_out)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_unwritten_part_never_leaks_into_the_merge(poison):
    arrays = arrays_of(L, L)
    d_out = cotangents_of(arrays)["out"]
    found, clean = (_merged_with_an_unwritten_part(arrays, filling, d_out) for filling in (poison, 0.0))
    _assert_same(found, clean)


@each_case
def test_fully_masked_rows_are_exactly_nothing(mask, arguments, dtype, compiled):
    visible, found = _answers_of(mask, arguments, dtype, compiled)
    empty = _rows(visible)
    assert empty["lse"].any()
    assert (found.out[np.broadcast_to(empty["out"], found.out.shape)] == 0).all()
    if found.lse is not None:
        np.testing.assert_array_equal(np.isneginf(found.lse), np.broadcast_to(empty["lse"], found.lse.shape))
        nowhere = np.broadcast_to(empty["lse"].all(axis=2), found.max_logits.shape)
        np.testing.assert_array_equal(np.isneginf(found.max_logits), nowhere)


@each_case
def test_fully_masked_rows_have_no_gradients(mask, arguments, dtype, compiled):
    _, found = _answers_of(mask, arguments, dtype, compiled)
    for name, gradient in found.gradients.items():
        assert (gradient[OF_EMPTY_ROWS] == 0).all(), name


@each_case
def test_cotangents_of_fully_masked_rows_never_leak(mask, arguments, dtype, compiled):
    _, found = _answers_of(mask, arguments, dtype, compiled)
    for name, gradient in found.gradients.items():
        poisoned = gradient[OF_COTANGENTS]
        np.testing.assert_array_equal(poisoned, np.broadcast_to(gradient[0], poisoned.shape), err_msg=name)


def _part(mask):
    """Attention as a Partial."""
    found = _answers_of(mask, "partial")[1]
    return kernelry.Partial(jnp.asarray(found.out[0]), lse=jnp.asarray(found.lse[0]), dtype="float32")


@pytest.mark.parametrize("mask", HIDING)
def test_a_row_is_nothing_only_where_every_part_says_so(mask):
    merged = kernelry.merge([_part("not_full"), _part(mask)])
    empty = _rows(_answers_of(mask, "partial")[0])
    np.testing.assert_array_equal(np.isneginf(merged.lse), empty["lse"])
    out = np.asarray(kernelry.finalize(merged, jnp.zeros(GROUPED.query)))
    np.testing.assert_array_equal((out == 0).all(axis=3, keepdims=True), empty["out"])


@pytest.mark.parametrize("mask", NOTHING)
def test_an_attention_that_sees_nothing_is_nothing(mask):
    visible, found = _answers_of(mask, "all")
    assert not visible.any()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((found.out, found.gradients)))


def test_zero_logits_are_no_empty_rows():
    arrays = jax.tree.map(jnp.zeros_like, arrays_of(L, L))
    partial = compiled_attend(masks.Causal(), arrays, return_partial=True)
    np.testing.assert_allclose(np.asarray(partial.lse)[0, 0], np.log(np.arange(1, L + 1)), atol=1e-6)
