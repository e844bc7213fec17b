"""The reference's masks: each equals its definition in design 3.2-3.5, spelled out pair by pair in plain Python."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import masks
from kernelry.errors import ArgumentError
from kernelry.masks.base import Mask
from kernelry.testing import reference_mask, reference_select_blocks

B, N, T, S = 2, 4, 5, 7
OWN = np.array([[0, 3, -2, 7, 5], [9, 1, 1, 4, -6]])
OTHER = np.array([[2, -1, 4, 0, 8, 5, 6], [1, 0, 3, 9, -4, 4, 2]])
PREFIX = np.array([3, -5])
PLACES = {
    "default": ({}, lambda _b, t: t, lambda _b, s: s),
    "offset": ({"query_offset": 3, "kv_offset": -2}, lambda _b, t: t + 3, lambda _b, s: s - 2),
    "offsets": (
        {"query_offset": np.array([2, -3]), "kv_offset": np.array([1, 0])},
        lambda b, t: t + (2, -3)[b],
        lambda b, s: s + (1, 0)[b],
    ),
    "positions": (
        {"query_positions": OWN[0], "kv_positions": OTHER[0]},
        lambda _b, t: int(OWN[0, t]),
        lambda _b, s: int(OTHER[0, s]),
    ),
    "rows": (
        {"query_positions": OWN, "kv_positions": OTHER},
        lambda b, t: int(OWN[b, t]),
        lambda b, s: int(OTHER[b, s]),
    ),
    "one_side": ({"query_positions": OWN}, lambda b, t: int(OWN[b, t]), lambda _b, s: s),
}


def _equal_and_even(query, kv, shift):
    return ((query + shift) % 2 == kv % 2) & (kv <= query)


POSITIONAL = {
    "causal": (masks.Causal(), lambda _b, p, r: r <= p),
    "window": (masks.SlidingWindow(2, 1), lambda _b, p, r: p - 2 <= r <= p + 1),
    "chunked": (masks.Chunked(3), lambda _b, p, r: math.floor(p / 3) == math.floor(r / 3) and r <= p),
    "block_causal": (masks.BlockCausal(3), lambda _b, p, r: math.floor(r / 3) <= math.floor(p / 3)),
    "prefix": (masks.PrefixLM(4), lambda _b, p, r: r < 4 or r <= p),
    "prefixes": (masks.PrefixLM(jnp.asarray(PREFIX)), lambda b, p, r: r < PREFIX[b] or r <= p),
    "predicate": (
        masks.Predicate(_equal_and_even, PREFIX.reshape(B, 1, 1, 1)),
        lambda b, p, r: (p + PREFIX[b]) % 2 == r % 2 and r <= p,
    ),
}
QUERY_IDS, KV_IDS = np.array([[0, 0, 1, -1, 2], [3, -1, 3, 0, 0]]), np.array([[0, 1, 1, -1, -2, 0, 2], [3] * 6 + [-1]])
VISIBLE = np.random.default_rng(0).random((B, N, T, S)) < 0.4
INDEXED = {
    "full": (masks.Full(), lambda _b, _n, _t, _s: True),
    "segments": (
        masks.Segments(QUERY_IDS, KV_IDS),
        lambda b, _n, t, s: QUERY_IDS[b, t] >= 0 and QUERY_IDS[b, t] == KV_IDS[b, s],
    ),
    "segments_of_all_rows": (
        masks.Segments(QUERY_IDS[0], jnp.asarray(KV_IDS[0])),
        lambda _b, _n, t, s: QUERY_IDS[0, t] >= 0 and QUERY_IDS[0, t] == KV_IDS[0, s],
    ),
    "spans": (
        masks.BidirectionalSpans(QUERY_IDS, KV_IDS),
        lambda b, _n, t, s: QUERY_IDS[b, t] >= 0 and QUERY_IDS[b, t] == KV_IDS[b, s],
    ),
    "lengths": (masks.Lengths(np.array([7, 2])), lambda b, _n, _t, s: s < (7, 2)[b]),
    "both_lengths": (
        masks.Lengths(np.array([4, 7]), np.array([5, 0])),
        lambda b, _n, t, s: s < (4, 7)[b] and t < (5, 0)[b],
    ),
    "dense": (masks.Dense(VISIBLE), lambda b, n, t, s: VISIBLE[b, n, t, s]),
    "dense_of_one_row": (masks.Dense(VISIBLE[0, 0]), lambda _b, _n, t, s: VISIBLE[0, 0, t, s]),
    "dense_per_head": (masks.Dense(VISIBLE[:1, :, :1]), lambda _b, n, _t, s: VISIBLE[0, n, 0, s]),
}


def _spelled(rule, kv_len=S):
    pairs = [rule(b, n, t, s) for b in range(B) for n in range(N) for t in range(T) for s in range(kv_len)]
    return np.array(pairs, bool).reshape(B, N, T, kv_len)


def _placed(mask, place, xp):
    return mask.at(**{name: value if isinstance(value, int) else xp.asarray(value) for name, value in place.items()})


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_masks_equal_their_definition_wherever_they_stand(name, place, xp):
    (mask, rule), (where, p, r) = POSITIONAL[name], PLACES[place]
    found = reference_mask(_placed(mask, where, xp), B, N, T, S)
    np.testing.assert_array_equal(found, _spelled(lambda b, _n, t, s: rule(b, p(b, t), r(b, s))))


@pytest.mark.parametrize("place", ["default", "offset", "rows"])
@pytest.mark.parametrize("name", INDEXED)
def test_indexed_masks_equal_their_definition_and_are_not_moved(name, place):
    mask, rule = INDEXED[name]
    np.testing.assert_array_equal(reference_mask(mask.at(**PLACES[place][0]), B, N, T, S), _spelled(rule))


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        (masks.Causal(), "1000 1100 1110 1111"),
        (masks.SlidingWindow(1), "1000 1100 0110 0011"),
        (masks.SlidingWindow(0, 1), "1100 0110 0011 0001"),
        (masks.Chunked(2), "1000 1100 0010 0011"),
        (masks.BlockCausal(2), "1100 1100 1111 1111"),
        (masks.PrefixLM(2), "1100 1100 1110 1111"),
        (masks.Segments([0, 0, 1, -1]), "1100 1100 0010 0000"),
        (masks.BidirectionalSpans([-1, 0, 0, 1]), "0000 0110 0110 0001"),
        (masks.BidirectionalSpans.from_flags([True, False, True, True]), "1000 0000 0011 0011"),
        (masks.Lengths([2]), "1100 1100 1100 1100"),
        (masks.BlockSelection([[True, False], [True, False], [False, True], [True, True]], 2), "1100 1100 0011 1111"),
        (masks.Causal().at(query_positions=[3, 0, 2, 1]), "1111 1000 1110 1100"),
        (~masks.Segments([0, 0, 1, -1]), "0011 0011 1101 1111"),
        (masks.Causal() & masks.Segments([0, 0, 1, 1]), "1000 1100 0010 0011"),
        (masks.Causal() | masks.BidirectionalSpans([-1, 0, 0, 0]), "1000 1111 1111 1111"),
    ],
)
def test_masks_show_the_picture_drawn_by_hand(mask, picture):
    rows = [[mark == "1" for mark in row] for row in picture.split()]
    np.testing.assert_array_equal(reference_mask(mask, 1, 1, 4, 4)[0, 0], rows)


def test_ids_without_kv_ids_are_the_querys_own():
    own = reference_mask(masks.BidirectionalSpans(QUERY_IDS), B, N, T, T)
    np.testing.assert_array_equal(own, reference_mask(masks.Segments(QUERY_IDS, QUERY_IDS), B, N, T, T))


def test_spans_from_flags_join_neighbours_and_nothing_else():
    flags = np.array([[1, 1, 0, 1, 1], [0, 1, 0, 1, 0]], bool)
    found = reference_mask(masks.BidirectionalSpans.from_flags(flags), B, N, T, T)
    wanted = _spelled(lambda b, _n, t, s: flags[b, min(t, s) : max(t, s) + 1].all(), T)
    np.testing.assert_array_equal(found, wanted)


def test_innermost_at_wins_per_side():
    mask = masks.Causal().at(query_offset=2).at(query_offset=50, kv_offset=1)
    np.testing.assert_array_equal(reference_mask(mask, B, N, T, S), _spelled(lambda _b, _n, t, s: s + 1 <= t + 2))


def test_at_on_a_composite_places_only_the_atoms_that_stand_nowhere():
    mask = ((masks.Causal().at(query_offset=-1) | ~masks.SlidingWindow(1, 1)) & masks.Lengths([5, 6])).at(kv_offset=2)
    wanted = _spelled(lambda b, _n, t, s: (s + 2 <= t - 1 or not t - 1 <= s + 2 <= t + 1) and s < (5, 6)[b])
    np.testing.assert_array_equal(reference_mask(mask, B, N, T, S), wanted)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("heads", [1, 2, N])
@pytest.mark.parametrize("place", PLACES)
def test_block_selection_reads_the_head_of_its_group_at_the_block_of_the_key(place, heads, rows):
    where, _, r = PLACES[place]
    keep = np.random.default_rng(heads).random((rows, heads, T, 2)) < 0.5

    def rule(b, n, t, s):
        block = math.floor(r(b, s) / 3)
        return 0 <= block < 2 and keep[b % rows, n // (N // heads), t, block]

    found = reference_mask(masks.BlockSelection(keep, 3).at(**where), B, N, T, S)
    np.testing.assert_array_equal(found, _spelled(rule))


def test_block_selection_without_blocks_hides_everything():
    mask = masks.BlockSelection(np.ones((1, 1, T, 0), bool), 2)
    assert not reference_mask(mask, B, N, T, S).any()


def test_predicate_is_called_with_numpy_positions_that_broadcast():
    seen = []

    def note(query, kv, operand):
        seen.extend([query, kv, operand])
        return query >= kv

    reference_mask(masks.Predicate(note, jnp.ones((B, 1, 1, 1))).at(query_positions=OWN), B, N, T, S)
    assert [type(array) for array in seen] == [np.ndarray] * 3
    assert [array.shape for array in seen] == [(B, 1, T, 1), (1, 1, 1, S), (B, 1, 1, 1)]
    assert seen[0].dtype == seen[1].dtype == np.int64


def test_predicates_written_with_jax_are_read_too():
    mask = masks.Predicate(lambda query, kv: jnp.abs(query - kv) <= 1)
    np.testing.assert_array_equal(reference_mask(mask, B, N, T, S), _spelled(lambda _b, _n, t, s: abs(t - s) <= 1))


@pytest.mark.parametrize("extent", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_masks_of_nothing_have_the_shape_asked_for(extent):
    batch, _, q_len, kv_len = extent
    ids = masks.Segments(np.zeros((batch, q_len), int), np.zeros((batch, kv_len), int))
    positions = np.zeros((batch, q_len), int)
    mask = (masks.Chunked(2).at(query_positions=positions) | ids) & masks.PrefixLM(np.zeros(batch, int))
    selection = masks.BlockSelection(np.ones((batch, 2, q_len, 1), bool), 4)
    assert reference_mask(mask & ~selection, *extent).shape == extent


def test_masks_of_core_without_a_definition_are_refused_by_name():
    [band] = masks.SlidingWindow(3).canonical()
    with pytest.raises(NotImplementedError, match="Band"):
        reference_mask(masks.Causal() & ~band, B, N, T, S)


def test_masks_of_third_parties_are_their_own_definition():
    class Strange(Mask):
        positional = True

        def evaluate(self, query, kv):
            return (query.positions + kv.positions + query.slots) % 3 == 0

    found = reference_mask(~Strange().at(query_offset=np.arange(B), kv_offset=5), B, N, T, S)
    b, _, t, s = np.indices((B, N, T, S))
    np.testing.assert_array_equal(found, (b + t + s + 5 + t) % 3 != 0)


def test_unknown_positions_are_refused_by_name():
    class Spiral:
        pass

    with pytest.raises(NotImplementedError, match="Spiral"):
        reference_mask(type(masks.Causal().at(kv_offset=1))(masks.Causal(), None, Spiral()), B, N, T, S)


def _gated(gates, positions, *, top_k, chunk_size=2, kv_len=None):
    """Selects with keys that are unit vectors of their block, so that a query's gates are its own components."""
    gates = np.asarray(gates, np.float64)
    key = np.eye(gates.shape[-1]).repeat(chunk_size, axis=0)[None, :kv_len, None]
    where = np.asarray(positions)
    return reference_select_blocks(
        gates[None, :, None], key, chunk_size=chunk_size, top_k=top_k, query_positions=where
    )[0, 0]


def test_blocks_own_first_then_the_best_before_and_never_a_later_one():
    gates = [[1, 5, 7, 0, 8]] * 4
    found = _gated(gates, [1, 3, 7, 9], top_k=2)
    np.testing.assert_array_equal(found, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1]])


def test_blocks_are_not_kept_by_a_query_before_all_of_them():
    assert not _gated([[3, 5, 4]], [-1], top_k=2).any()


def test_blocks_of_equal_gates_go_to_the_lower_index():
    np.testing.assert_array_equal(_gated([[3, 5, 5, 5, 0]], [8], top_k=3), [[0, 1, 1, 0, 1]])


def test_block_of_its_own_counts_among_the_top_k_even_where_it_is_the_worst():
    np.testing.assert_array_equal(_gated([[3, 5, -9]], [4], top_k=1), [[0, 0, 1]])


def test_blocks_beyond_the_keys_leave_all_of_top_k_to_those_before():
    np.testing.assert_array_equal(_gated([[3, 5, 4]], [100], top_k=2), [[0, 1, 1]])


def test_last_block_is_averaged_over_the_keys_it_has():
    gates = [[0, 4, 5]]  # with 5 keys the last block holds one: its sum and a padded mean would be 5 and 2.5
    np.testing.assert_array_equal(_gated(gates, [100], top_k=1, kv_len=5), [[0, 0, 1]])
    twice = [[0, 3, 5], [0, 6, 5]]  # sums of two keys would be 6 and 12
    np.testing.assert_array_equal(_gated(twice, [100, 100], top_k=1, kv_len=5), [[0, 0, 1], [0, 1, 0]])


def test_blocks_are_chosen_per_query_head_from_the_key_head_of_its_group():
    query, key = np.ones((1, 1, 4, 1)), np.array([[[5, 0], [0, 5], [1, 1]]], float)[..., None]
    keep = reference_select_blocks(query, key, chunk_size=1, top_k=2, query_positions=np.array([[2]]))
    np.testing.assert_array_equal(keep[0, :, 0], [[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize("bad", [{"chunk_size": 0, "top_k": 1}, {"chunk_size": 1, "top_k": 0}])
def test_blocks_refuse_sizes_that_mean_nothing(bad):
    with pytest.raises(ArgumentError, match="at least 1"):
        reference_select_blocks(np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1)), query_positions=np.zeros(1, int), **bad)
