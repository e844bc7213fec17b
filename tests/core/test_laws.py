"""The laws of attention over random masks and arrays.

Shapes are fixed and calls are not compiled whole, so that hundreds of masks share a few operations.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Answer, answer, arrays_of, assert_twins, attend, cotangents_of, oracle_answer, visible_by
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import Q_HEADS, atomic_masks, masks_of

import kernelry
from kernelry import masks
from kernelry.normalization import to_lse, to_max_sum

T, S = 5, 7
POSITIONAL = [
    "causal",
    "window",
    "chunked",
    "block_causal",
    "prefix",
    "predicate",
    "predicate_with_operand",
    "selection",
]
FORMS = st.sampled_from([to_lse, to_max_sum])
STATISTICS = {"return_partial": True, "return_max_logits": True}


def any_mask(depth=2):
    """Draws a mask for T queries and S keys."""
    return masks_of(T, S, depth).map(lambda mask: mask.at(query_offset=0))


def dense(mask):
    return masks.Dense(mask.materialize(T, S, q_heads=Q_HEADS))


def assert_close(left, right, atol):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=atol)


def everything(mask, seed=0):
    """The statistics, the output and the gradients of one call."""
    arrays = arrays_of(T, S, seed=seed)
    return answer(mask, arrays, cotangents_of(arrays, lse=True), **STATISTICS)


@given(any_mask(), st.integers(0, 99))
@settings(max_examples=35, deadline=None)
def test_any_composition_of_masks_means_what_the_oracle_says(mask, seed):
    arrays = arrays_of(T, S, seed=seed)
    cotangents = cotangents_of(arrays, lse=True)
    found = Answer(*answer(mask, arrays, cotangents, **STATISTICS))
    assert_twins(found, oracle_answer(mask, arrays, cotangents))


@given(any_mask(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_mask_and_its_materialised_dense_give_the_same(mask, seed):
    assert_close(everything(mask, seed), everything(dense(mask), seed), atol=1e-6)


@given(any_mask(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_double_negation_changes_nothing(mask, seed):
    assert (~~mask).form == mask.form
    assert_close(everything(~~mask, seed), everything(mask, seed), atol=1e-6)


@given(any_mask(1), any_mask(1))
@settings(max_examples=15, deadline=None)
def test_de_morgan(one, other):
    assert_close(everything(~(one & other)), everything(~one | ~other), atol=1e-6)
    assert_close(everything(~(one | other)), everything(~one & ~other), atol=1e-6)


@given(any_mask(1), any_mask(1), any_mask(1))
@settings(max_examples=12, deadline=None)
def test_and_distributes_over_or(one, other, third):
    assert_close(everything(one & (other | third)), everything((one & other) | (one & third)), atol=1e-6)


_offsets = st.sampled_from([int, np.int32, jnp.int32])


@given(
    st.sampled_from([masks.Causal(), masks.SlidingWindow(2), masks.SlidingWindow(1, 2)]),
    st.integers(-999, 999),
    _offsets,
)
@settings(max_examples=25, deadline=None)
def test_bands_do_not_move_when_both_sides_do(mask, shift, as_given):
    moved = mask.at(query_offset=as_given(2 + shift), kv_offset=as_given(shift))
    assert_close(everything(moved), everything(mask.at(query_offset=2)), atol=1e-6)


@given(st.sampled_from([masks.Chunked, masks.BlockCausal]), st.integers(1, 5), st.integers(-99, 99), _offsets)
@settings(max_examples=25, deadline=None)
def test_grids_do_not_move_when_both_sides_do_by_a_multiple_of_the_size(grid, size, times, as_given):
    mask, shift = grid(size), size * times
    moved = mask.at(query_offset=as_given(2 + shift), kv_offset=as_given(shift))
    assert_close(everything(moved), everything(mask.at(query_offset=2)), atol=1e-6)


@st.composite
def positional_masks(draw):
    """Draws masks whose atoms are all positional and that say nowhere where they stand."""
    one, other = (draw(atomic_masks(T, S, POSITIONAL)) for _ in range(2))
    return draw(st.sampled_from([one, one & other, one | other, ~one & other, ~(one | other)]))


@given(positional_masks(), st.permutations(range(S)), st.lists(st.integers(-3, 9), min_size=S, max_size=S))
@settings(max_examples=40, deadline=None)
def test_permuting_keys_with_their_positions_changes_nothing(mask, order, positions):
    arrays, order = arrays_of(T, S), np.asarray(order)
    positions = np.asarray(positions, np.int32)
    cotangents = cotangents_of(arrays, lse=True)

    def call(arrays, positions):
        return answer(mask.at(query_offset=1, kv_positions=positions), arrays, cotangents, **STATISTICS)

    permuted = arrays | {name: arrays[name][:, order] for name in ("key", "value")}
    *found, gradients = call(permuted, jnp.asarray(positions[order]))
    *expected, plain = call(arrays, positions)
    assert_close(found, expected, atol=2e-6)
    plain |= {name: plain[name][:, order] for name in ("key", "value")}
    assert_close(gradients, plain, atol=1e-5)


def assert_parts_are_the_whole(parts, visible, arrays, form):
    """Compares attention over parts, merged, with attention over all keys: output and gradients.

    Args:
      parts: slots of the keys and what is visible among them, for each part.
      visible: what is visible among all keys.
    """

    def whole(arrays):
        return attend(masks.Dense(visible), arrays)

    def in_parts(arrays):
        pieces = []
        for slots, seen in parts:
            piece = {"query": arrays["query"]} | {name: arrays[name][:, slots] for name in ("key", "value")}
            pieces.append(form(attend(masks.Dense(seen), piece, return_partial=True)))
        return kernelry.finalize(kernelry.merge(pieces), arrays["sinks"])

    d_out = cotangents_of(arrays)["out"]
    (found, pull), (expected, pull_whole) = jax.vjp(in_parts, arrays), jax.vjp(whole, arrays)
    assert_close(found, expected, atol=2e-6)
    assert_close(pull(d_out), pull_whole(d_out), atol=1e-5)


@given(any_mask(), st.sampled_from([0, 3, S]), st.sampled_from([0, 3, S]), FORMS, st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_splitting_the_keys_changes_neither_output_nor_gradients(mask, one, other, form, seed):
    arrays = arrays_of(T, S, seed=seed, sinks=True)
    visible = visible_by(mask, arrays)
    cuts = itertools.pairwise([0, *sorted((one, other)), S])
    parts = [(slice(*cut), visible[..., slice(*cut)]) for cut in cuts]
    assert_parts_are_the_whole(parts, visible, arrays, form)


@given(any_mask(), st.lists(st.integers(0, 2), min_size=S, max_size=S), FORMS, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_dealing_out_the_keys_in_any_way_changes_neither_output_nor_gradients(mask, owners, form, seed):
    arrays = arrays_of(T, S, seed=seed, sinks=True)
    visible = visible_by(mask, arrays)
    parts = [(slice(None), visible & (np.asarray(owners) == part)) for part in range(3)]
    assert_parts_are_the_whole(parts, visible, arrays, form)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(3, 1), masks.Chunked(3), masks.PrefixLM(2)])
def test_parts_of_a_positional_mask_are_the_mask_at_the_offset_of_the_keys(mask):
    arrays = arrays_of(T, S)
    whole = attend(mask.at(query_offset=2), arrays)

    def part(first, last):
        piece = arrays | {name: arrays[name][:, first:last] for name in ("key", "value")}
        return attend(mask.at(query_offset=2, kv_offset=first), piece, return_partial=True)

    for cut in (0, 3, S):
        assert_close(kernelry.finalize(kernelry.merge([part(0, cut), part(cut, S)])), whole, atol=2e-6)


@st.composite
def parts_of_keys(draw, count=3):
    """Draws the parts of an attention: each key belongs to one of them, and some may get none."""
    arrays = arrays_of(T, S, seed=draw(st.integers(0, 99)))
    visible = visible_by(draw(any_mask()), arrays)
    owner = np.asarray(draw(st.lists(st.integers(0, count - 1), min_size=S, max_size=S)))
    form = draw(FORMS)
    parts = (attend(masks.Dense(visible & (owner == part)), arrays, return_partial=True) for part in range(count))
    return [form(part) for part in parts]


def merged(*parts):
    """What merging gives, whatever its form: the output and lse."""
    partial = to_lse(kernelry.merge(parts))
    return partial.out, partial.lse


@given(parts_of_keys())
@settings(max_examples=25, deadline=None)
def test_merge_is_associative(parts):
    a, b, c = parts
    assert_close(merged(kernelry.merge([a, b]), c), merged(a, kernelry.merge([b, c])), atol=2e-6)
    assert_close(merged(kernelry.merge([a, b]), c), merged(a, b, c), atol=2e-6)


@given(parts_of_keys(), st.permutations(range(3)))
@settings(max_examples=25, deadline=None)
def test_merge_is_commutative(parts, order):
    assert_close(merged(*(parts[i] for i in order)), merged(*parts), atol=2e-6)


@given(parts_of_keys(), FORMS)
@settings(max_examples=25, deadline=None)
def test_a_part_that_sees_nothing_is_the_identity_of_merge_on_both_sides(parts, form):
    part = parts[0]
    identity = form(attend(~masks.Full(), arrays_of(T, S), return_partial=True))
    alone = to_lse(part).out, to_lse(part).lse
    assert_close(merged(part, identity), alone, atol=2e-6)
    assert_close(merged(identity, part), alone, atol=2e-6)


@given(any_mask(), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_sinks_join_once_at_the_end(mask, seed):
    arrays = arrays_of(T, S, seed=seed, sinks=True)
    sinks = arrays["sinks"]
    without = {name: array for name, array in arrays.items() if name != "sinks"}
    partial = attend(mask, without, return_partial=True)
    assert_close(attend(mask, arrays), kernelry.finalize(partial, sinks), atol=1e-6)
