"""fa4: the window and the rule that its vendor is given show what the mask shows. Booleans, without the vendor."""

import itertools
import operator

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelry import masks
from kernelry.kernel.spec import Inputs
from kernelry.plugin import PositionForm, PositionKind
from kernelry.request.request import Request
from kernelry_gpu_flash_attn.fa4.masks import ATOMS, VendorMask, native_window
from kernelry_gpu_flash_attn.fa4.rules import All, Axes, Compare, Entry, Key, Number, Place, Query, Some

BATCH, HEADS, KV_HEADS, T, S = 2, 4, 2, 10, 14
RNG = np.random.default_rng(2)
IDS, KV_IDS = RNG.integers(-2, 3, (BATCH, T)), RNG.integers(-2, 3, S)
DENSE = RNG.random((BATCH, HEADS, T, S)) < 0.5

MASKS = {
    "full": masks.Full(),
    "bottom_right": masks.Causal().at(query_offset=S - T),
    "top_left": masks.Causal().at(query_offset=0),
    "later": masks.Causal().at(query_offset=9),
    "earlier": masks.Causal().at(query_offset=-3),
    "before_all_keys": masks.Causal().at(query_offset=-40),
    "window": masks.SlidingWindow(3, 2).at(query_offset=S - T),
    "window_elsewhere": masks.SlidingWindow(2, 1).at(query_offset=-5, kv_offset=4),
    "wide_window": masks.SlidingWindow(2**31 - 1, 2**31 - 1).at(query_offset=1),
    "wide_window_of_rows": masks.SlidingWindow(2**31 - 1, 2**31 - 1).at(query_offset=jnp.asarray([2, -3])),
    "window_by_row": masks.SlidingWindow(2, 1).at(query_offset=np.asarray([0, 7])),
    "two_bands": masks.Causal().at(query_offset=4) & masks.SlidingWindow(3).at(query_offset=6),
    "traced_offset": masks.SlidingWindow(4).at(query_offset=jnp.asarray([1, -2]), kv_offset=3),
    "traced_positions": masks.Causal().at(query_positions=jnp.arange(T)[::-1], kv_positions=RNG.permutation(S)),
    "chunked": masks.Chunked(3).at(query_offset=S - T),
    "chunked_at_negative_positions": masks.Chunked(3).at(query_offset=-4, kv_offset=-7),
    "block_causal": masks.BlockCausal(4).at(query_offset=jnp.asarray([-5, 2]), kv_offset=-2),
    "prefix": masks.PrefixLM(np.asarray([3, 9])).at(query_offset=2),
    "prefix_of_all_rows": masks.PrefixLM(4).at(query_positions=jnp.arange(T) * 2),
    "lengths": masks.Lengths(np.asarray([5, 0])),
    "lengths_of_both": masks.Lengths(7, jnp.asarray([3, 10])),
    "segments": masks.Segments(IDS, KV_IDS),
    "spans": masks.BidirectionalSpans(IDS[0], np.stack([KV_IDS, KV_IDS[::-1]])),
    "dense": masks.Dense(DENSE),
    "dense_of_all_heads": masks.Dense(DENSE[:, :1]),
    "dense_keys": masks.Dense(DENSE[1:, :1, :1]),
    "dense_queries": masks.Dense(DENSE[:1, :, :, :1]),
    "selection": masks.BlockSelection(RNG.random((BATCH, KV_HEADS, T, 4)) < 0.5, 4).at(kv_offset=0),
    "selection_by_head": masks.BlockSelection(RNG.random((1, HEADS, 1, 3)) < 0.5, 4).at(kv_offset=-4),
    "packed": masks.Causal().at(query_offset=S - T) & masks.Segments(IDS, KV_IDS) & masks.Lengths(11),
    "any_of": masks.SlidingWindow(2).at(query_offset=1) | (masks.Segments(IDS, KV_IDS) & masks.Lengths(9)),
    "not": ~masks.Segments(IDS, KV_IDS) & masks.Lengths(np.asarray([13, 6])),
    "not_a_disjunction": ~(masks.Causal().at(query_offset=2) | masks.Dense(DENSE)),
    "not_a_conjunction": ~(masks.SlidingWindow(1, 3).at(query_offset=1) & masks.PrefixLM(5).at(query_offset=0)),
    "nothing": ~masks.Full(),
}


def shown_by(mask, q_len, kv_len):
    """What the vendor's documentation says of what it is given, [B, N, T, S]."""
    request = Request(
        batch=BATCH, q_len=q_len, kv_len=kv_len, q_heads=HEADS, kv_heads=KV_HEADS, mask=mask, target="gpu:h100"
    )
    told = VendorMask.of(Inputs(None, None, None, mask.canonical()), request)
    # Tiles go on behind the last slots.
    rows, heads, queries, keys = np.ogrid[:BATCH, :HEADS, : q_len + 255, : kv_len + 255]
    shown = np.ones((BATCH, HEADS, q_len + 255, kv_len + 255), bool)
    aligned = queries + (kv_len - q_len) - keys
    left, right = told.window
    assert left is None or left >= 0
    assert right is None or right >= 0
    if left is not None:
        shown &= aligned <= left
    if right is not None:
        shown &= aligned >= -right
    if told.rule is not None:
        arrays = tuple(map(np.asarray, told.arrays))  # which raises where an index is too large
        assert all(array.dtype in (np.int32, np.int8) and array.ndim == 4 for array in arrays)
        assert hash(told.rule) == hash(VendorMask.of(Inputs(None, None, None, mask.canonical()), request).rule)
        shown &= told.rule.at(Place(rows, heads, queries, keys, arrays, told.axes))
    return shown[:, :, :q_len, :kv_len]


@pytest.mark.parametrize("name", MASKS)
def test_window_and_rule_show_what_the_mask_shows(name):
    wanted = MASKS[name].materialize(T, S, q_heads=HEADS)
    np.testing.assert_array_equal(shown_by(MASKS[name], T, S), np.broadcast_to(wanted, (BATCH, HEADS, T, S)))


def test_every_window_means_what_it_says_or_becomes_a_rule():
    bounds, offsets = (None, 0, 1, 3, 50), (-60, -6, -1, 0, 2, 5, 60)
    natives = 0
    for (q_len, kv_len), left, right, offset in itertools.product(((5, 8), (8, 5), (6, 6)), bounds, bounds, offsets):
        if left is None:
            mask = masks.Full() if right is None else masks.Causal().at(kv_offset=-right)
        else:
            mask = masks.SlidingWindow(left, 2**31 - 1 if right is None else right)
        mask = mask.at(query_offset=offset)
        request = Request(q_len=q_len, kv_len=kv_len, mask=mask, target="gpu:h100")
        told = VendorMask.of(Inputs(None, None, None, mask.canonical()), request)
        natives += told.rule is None
        shown = shown_by(mask, q_len, kv_len)
        wanted = np.broadcast_to(mask.materialize(q_len, kv_len), shown.shape)
        np.testing.assert_array_equal(shown, wanted, err_msg=f"{mask} T={q_len} S={kv_len}")
    assert natives > 200


@pytest.mark.parametrize(
    ("mask", "lengths", "window"),
    [
        (masks.Causal(), (8, 8), (None, 0)),
        (masks.Causal().at(query_offset=3), (5, 8), (None, 0)),
        (masks.SlidingWindow(4, 0), (8, 8), (4, 0)),
        (masks.SlidingWindow(0, 0), (8, 8), (0, 0)),
        (masks.SlidingWindow(2, 3), (8, 8), (2, 3)),
        (masks.SlidingWindow(2).at(query_offset=5), (5, 8), (0, 2)),
        (masks.SlidingWindow(7, 7), (8, 8), (None, None)),
        (masks.Causal().at(query_offset=4), (8, 8), (None, 4)),
        (masks.Causal().at(query_offset=-1), (8, 8), None),  # (None, -1)
        (masks.SlidingWindow(0).at(query_offset=2), (8, 8), None),  # (-2, 2)
        (masks.Causal().at(query_offset=jnp.asarray(0)), (8, 8), None),
        (masks.Chunked(2), (8, 8), None),
    ],
)
def test_windows_of_the_vendor(mask, lengths, window):
    [atom] = mask.form.atoms
    assert native_window(atom, *lengths) == window


def test_the_first_band_is_a_window_and_others_are_rules():
    mask = masks.Causal() & masks.SlidingWindow(3).at(query_offset=1)
    told = VendorMask.of(Inputs(None, None, None, mask.canonical()), Request(q_len=8, mask=mask, target="gpu:h100"))
    assert told.window != (None, None)
    assert told.rule is not None
    assert told.arrays == ()


def test_predicates_of_users_are_left_to_core():
    kinds = {atom.kind for mask in MASKS.values() for atom in mask.form.walk()}
    assert kinds <= ATOMS
    assert {kind.value for kind in type(next(iter(ATOMS)))} - {kind.value for kind in ATOMS} == {"predicate", "custom"}


def leaves():
    terms = st.builds(Query, st.integers(-3, 3)) | st.builds(Key, st.integers(-3, 3)) | st.builds(Entry, st.just(0))
    compare = st.sampled_from([operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne])
    return st.builds(Compare, compare, terms, terms | st.builds(Number, st.integers(-3, 3)))


RULES = st.recursive(
    leaves(), lambda inner: st.builds(All, st.tuples(inner, inner)) | st.builds(Some, st.tuples(inner, inner))
)


@given(RULES)
def test_a_negated_rule_is_true_where_the_rule_is_not(rule):
    rows, heads, queries, keys = np.ogrid[:2, :1, :5, :6]
    array = np.arange(2 * 5).reshape(2, 1, 5, 1) % 4
    place = Place(rows, heads, queries, keys, (array,), (Axes(row=True, query=True),))
    np.testing.assert_array_equal(
        np.broadcast_to(rule.at(place), (2, 1, 5, 6)), ~np.broadcast_to(rule.negated().at(place), (2, 1, 5, 6))
    )
    assert rule.negated().negated() == rule


def test_positions_are_arrays_only_where_they_are_no_sum():
    [atom] = masks.Causal().at(query_offset=3).form.atoms
    assert atom.query == PositionForm(PositionKind.OFFSET, 3)
    mask = masks.BlockCausal(4) & masks.Causal().at(query_offset=3)
    told = VendorMask.of(Inputs(None, None, None, mask.canonical()), Request(q_len=8, mask=mask, target="gpu:h100"))
    assert len(told.arrays) == 2  # the blocks of queries and of keys
