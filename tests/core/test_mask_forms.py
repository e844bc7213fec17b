"""Forms: equal masks written differently are equal, and forms travel as JSON."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import Q_HEADS, placed_masks, strided

from kernelry.masks import (
    AtomKind,
    BlockCausal,
    BlockSelection,
    Causal,
    Chunked,
    Full,
    Lengths,
    MaskForm,
    PositionKind,
    Predicate,
    PrefixLM,
    Segments,
    SlidingWindow,
)
from kernelry.testing import reference_mask

SEGMENTS = Segments(np.zeros((1, 4), int))


@pytest.mark.parametrize(
    ("written", "otherwise"),
    [
        (Causal() & Causal(), Causal()),
        (SlidingWindow(3) & Causal(), SlidingWindow(3)),
        (SlidingWindow(3, 2) & Causal(), SlidingWindow(3)),
        (SlidingWindow(3) & SlidingWindow(5, 1), SlidingWindow(3)),
        (Full() & Causal(), Causal()),
        (Lengths(np.array([1])) & Causal(), Causal() & Lengths(np.array([2]))),
        (Causal().at(query_offset=2) & SlidingWindow(3).at(query_offset=2), SlidingWindow(3).at(query_offset=2)),
        (Causal().at(query_offset=0), Causal()),
        (Causal() & SlidingWindow(3).at(kv_offset=0), SlidingWindow(3)),
        (Causal().at(query_positions=np.arange(4)), Causal().at(query_positions=np.array([0, 1, 2, 3]))),
        (Causal() | Lengths(np.array([1])), Lengths(np.array([1])) | Causal()),
        (Chunked(4) & Causal(), Chunked(4)),
        (Chunked(4) & SlidingWindow(9, 9), Chunked(4)),
        (Chunked(4) & SlidingWindow(2, 5), SlidingWindow(2) & Chunked(4)),
        (Chunked(4) & Chunked(4), Chunked(4)),
        (Chunked(4) & Chunked(8), Chunked(4)),
        (BlockCausal(4) & Causal(), Causal()),
        (BlockCausal(4) & BlockCausal(8), BlockCausal(4)),
        (BlockCausal(4) & Chunked(3), Chunked(3)),
        (PrefixLM(3) & Causal(), Causal()),
        (Predicate(strided) & Predicate(strided), Predicate(strided)),
        (SEGMENTS & SEGMENTS, SEGMENTS),
        (~(Causal() & SEGMENTS), ~SEGMENTS | ~Causal()),
        (~(Chunked(4) | SEGMENTS), ~SEGMENTS & ~Chunked(4)),
        (~(Causal() & ~SEGMENTS), SEGMENTS | ~Causal()),
        ((~Causal()) & (~Causal()), ~Causal()),
        (Causal() | SlidingWindow(3), Causal()),
        (SlidingWindow(3) | (Causal() | SEGMENTS), SEGMENTS | Causal()),
        (Causal() | Full(), Full()),
        (~(~Full()), Full()),
        (SEGMENTS & (SEGMENTS | Causal()), SEGMENTS),
        (SEGMENTS | (SEGMENTS & Causal()), SEGMENTS),
        ((Causal() | SEGMENTS).at(query_offset=2), Causal().at(query_offset=2) | SEGMENTS),
    ],
)
def test_equal_masks_have_equal_forms(written, otherwise):
    assert written.form == otherwise.form
    assert hash(written.form) == hash(otherwise.form)


def test_one_at_around_a_composite_keeps_bands_mergeable_when_traced():
    offset = jnp.int32(3)
    assert (Causal() & SlidingWindow(3)).at(query_offset=offset).form == SlidingWindow(3).at(query_offset=offset).form


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        (Chunked(4) & Chunked(6), 2),
        (Chunked(4) & Causal().at(query_offset=1), 2),
        (BlockCausal(4) & SlidingWindow(3, 1), 2),
        (Segments(np.zeros((1, 4), int)) & Segments(np.zeros((1, 4), int)), 2),
        (Causal().at(query_offset=jnp.int32(1)) & Causal().at(query_offset=jnp.int32(1)), 2),
        (Chunked(4) & PrefixLM(2).at(kv_offset=1), 2),
    ],
)
def test_what_may_differ_is_kept(mask, count):
    assert len(mask.form.atoms) == count


def test_block_selection_does_not_look_at_where_the_queries_stand():
    keep = np.ones((1, 1, 4, 2), bool)
    assert BlockSelection(keep, 2).at(query_offset=jnp.int32(3)).form == BlockSelection(keep, 2).form
    assert BlockSelection(keep, 2).at(kv_offset=3).form != BlockSelection(keep, 2).form


def test_bands_at_different_positions_stay_apart():
    assert len((Causal() & SlidingWindow(3).at(query_offset=1)).form.atoms) == 2


def test_shared_and_separate_segment_ids_are_two_kinds():
    ids = np.zeros((1, 4), int)
    assert Segments(ids).form.atoms[0].kind is AtomKind.SEGMENTS
    assert Segments(ids, ids).form.atoms[0].kind is AtomKind.SEGMENTS_SEPARATE


def test_take_splits_indices_in_order():
    form = (Causal() & Lengths(np.array([2])) & Segments(np.zeros((1, 4), int))).form
    taken, rest = form.take(lambda atom: atom.is_band)
    assert [form.atoms[i].kind for i in taken] == [AtomKind.CAUSAL]
    assert sorted(taken + rest) == [0, 1, 2]


@pytest.mark.parametrize(
    "mask",
    [
        Full(),
        Causal().at(query_offset=3),
        SlidingWindow(3, 1).at(kv_positions=np.array([[0, 1, 5], [2, 3, 4]])),
        Causal().at(query_offset=np.array([1, 2])),
        (~Causal() | Lengths(np.array([1]))) & Segments(np.zeros((1, 4), int)),
        Causal().at(query_offset=jnp.int32(1)),
        Chunked(4) & PrefixLM(2) | BlockCausal(3),
        BlockSelection(np.ones((1, 1, 4, 2), bool), 2) & Predicate(strided),
        ~Full(),
    ],
)
def test_forms_survive_json(mask):
    assert MaskForm.from_json(json.loads(json.dumps(mask.form.to_json()))) == mask.form


def test_position_kinds_reach_inside_composites():
    form = (~Causal().at(query_offset=jnp.int32(1)) | SEGMENTS).form
    assert PositionKind.TRACED in form.position_kinds


@given(
    st.integers(0, 6), st.integers(0, 6), st.integers(-4, 6), st.integers(-4, 6), st.integers(0, 4), st.integers(0, 4)
)
@settings(max_examples=200, deadline=None)
def test_visibility_of_consecutive_positions_is_exact(q_len, kv_len, query, kv, left, right):
    for mask in (SlidingWindow(left, right), Causal()):
        placed = mask.at(query_offset=query, kv_offset=kv)
        visible = reference_mask(placed, 1, 1, q_len, kv_len)[0, 0]
        assert placed.form.may_have_empty_rows(q_len, kv_len) == (not visible.any(axis=1).all())
        assert placed.form.may_hide_slots(q_len, kv_len) == (not visible.any(axis=0).all())


def test_visibility_of_long_sequences_costs_nothing():
    assert not SlidingWindow(5).form.may_have_empty_rows(10**12, 10**12)


@given(
    st.lists(st.integers(-3, 6), min_size=1, max_size=4),
    st.lists(st.integers(-3, 6), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(0, 2),
)
@settings(max_examples=200, deadline=None)
def test_visibility_of_static_positions_is_exact(query, kv, left, right):
    for mask in (SlidingWindow(left, right), Causal()):
        placed = mask.at(query_positions=np.array(query), kv_positions=np.array(kv))
        visible = reference_mask(placed, 1, 1, len(query), len(kv))[0, 0]
        assert placed.form.may_have_empty_rows(len(query), len(kv)) == (not visible.any(axis=1).all())
        assert placed.form.may_hide_slots(len(query), len(kv)) == (not visible.any(axis=0).all())


@given(placed_masks(), placed_masks())
@settings(max_examples=60, deadline=None)
def test_the_order_of_composition_does_not_matter(one, other):
    left, right = one[0], other[0]
    assert (left & right).form == (right & left).form
    assert (left | right).form == (right | left).form


@given(placed_masks())
@settings(max_examples=100, deadline=None)
def test_repeating_a_mask_changes_nothing(drawn):
    mask = drawn[0]
    assert (mask & mask).form == mask.form
    assert (mask | mask).form == mask.form
    assert (~~mask).form == mask.form


@given(placed_masks(depth=1), placed_masks(depth=1))
@settings(max_examples=100, deadline=None)
def test_de_morgan_holds_for_forms(one, other):
    left, right = one[0], other[0]
    assert (~(left & right)).form == (~left | ~right).form
    assert (~(left | right)).form == (~left & ~right).form


@given(st.integers(1, 8), st.integers(0, 8), st.integers(-2, 8), st.integers(-2, 8), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_visibility_of_grids_claims_only_what_is_certain(q_len, kv_len, query, kv, size):
    for mask in (Chunked(size), BlockCausal(size), Chunked(size) & SlidingWindow(1), PrefixLM(size)):
        placed = mask.at(query_offset=query, kv_offset=kv)
        visible = reference_mask(placed, 1, Q_HEADS, q_len, kv_len)[0, 0]
        assert placed.form.may_have_empty_rows(q_len, kv_len) or visible.any(axis=1).all()
        assert placed.form.may_hide_slots(q_len, kv_len) or visible.any(axis=0).all()


@pytest.mark.parametrize("mask", [Chunked(5), BlockCausal(5), Chunked(5) & SlidingWindow(2), PrefixLM(3)])
def test_grids_over_equal_positions_need_no_cleaning(mask):
    assert not mask.form.may_have_empty_rows(24, 24)
    assert not mask.form.may_hide_slots(24, 24)


@pytest.mark.parametrize(("runs", "is_arithmetic"), [(1, True), (32, True), (33, False)])
def test_positions_in_a_few_runs_are_arithmetic(runs, is_arithmetic):
    positions = np.arange(2 * runs).reshape(runs, 2)[::-1].reshape(-1).copy()
    [atom] = Causal().at(query_positions=positions).form.atoms
    assert atom.query.is_arithmetic == is_arithmetic
