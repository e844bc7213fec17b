"""The class of a pair of shards shows what the whole mask shows there, and equal work is one class."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mask_strategies import BATCH, KV_HEADS, Q_HEADS, STATIC_ATOMS, masks_of, near, strided

from kernelry import masks
from kernelry.errors import ArgumentError, PluginError, ShapeError
from kernelry.masks.composition import At, walk
from kernelry.masks.positions import StaticOffset
from kernelry.masks.shard_pairs import (
    EMPTY,
    ShardGrid,
    aligned_masks,
    blocks_per_shard,
    class_form,
    lockstep,
    lockstep_efficiency,
    pair_table,
)
from kernelry.masks.spread import leaf_axes, spread_in_order, why_not_cut
from kernelry.plugin import pytree

ORDERS = ("contiguous", "dual_chunk", "striped")


def in_order(mask, grid):
    """The mask as it is meant: default positions are those of the order."""
    if grid.tokens is None:
        return mask.at(query_offset=0, kv_offset=0)
    query, kv = grid.tokens
    return mask.at(query_positions=query, kv_positions=kv)


def square(length, shards, order="contiguous"):
    return ShardGrid(q_len=length, kv_len=length, q_shards=shards, kv_shards=shards, order=order)


def has_no_offset_of_zero(mask):
    """An offset of 0 is a default position in forms, and in the whole mask above it is not."""
    places = [(part.query, part.kv) for part in walk(mask) if isinstance(part, At)]
    return not any(isinstance(where, StaticOffset) and where.value == 0 for pair in places for where in pair)


def whole(mask, grid):
    visible = np.asarray(in_order(mask, grid).materialize(grid.q_len, grid.kv_len, q_heads=Q_HEADS))
    return np.broadcast_to(visible, (BATCH, Q_HEADS, grid.q_len, grid.kv_len))


def cut_arrays(mask, grid, i, j):
    """Each array of a spread mask, cut along its letters."""
    starts = {"T": (i, grid.shard_lengths[0]), "S": (j, grid.shard_lengths[1])}
    leaves, structure = jax.tree.flatten(mask)

    def cut(leaf, letters):
        assert len(letters) == np.ndim(leaf)
        index = [slice(None)] * np.ndim(leaf)
        for axis, letter in enumerate(letters):
            if letter in starts and np.shape(leaf)[axis] > 1:
                shard, length = starts[letter]
                index[axis] = slice(shard * length, (shard + 1) * length)
        return leaf[tuple(index)] if index else leaf

    return jax.tree.unflatten(structure, [cut(*pair) for pair in zip(leaves, leaf_axes(mask), strict=True)])


def shown(piece, mask, spread, grid, i, j):
    """What one piece shows in a pair of shards: located, or cut and brought within the pair as in a program."""
    (q_len, kv_len), masks_of_form = grid.shard_lengths, mask.canonical()
    located = piece.mask(masks_of_form) if not piece.traced else None
    if located is None:
        cut = cut_arrays(spread[piece.index], grid, i, j)
        located = cut.within(i * q_len, jnp.int32(j * kv_len), q_len, kv_len)
    located = located.at(query_offset=0)
    assert located.form.atoms == (piece.atom(mask.form),)
    return np.asarray(located.materialize(q_len, kv_len, q_heads=Q_HEADS))


def assert_table_is_right(mask, grid):
    visible, table, (q_len, kv_len) = whole(mask, grid), pair_table(mask.form, grid), grid.shard_lengths
    spread = [spread_in_order(one, grid.tokens) for one in mask.canonical()]
    for i, j in np.ndindex(grid.q_shards, grid.kv_shards):
        there = visible[:, :, i * q_len : (i + 1) * q_len, j * kv_len : (j + 1) * kv_len]
        pieces = table.of(i, j)
        expected = np.full(there.shape, pieces is not None)
        for piece in pieces or ():
            expected = expected & shown(piece, mask, spread, grid, i, j)
        np.testing.assert_array_equal(there, expected)
    return table


@st.composite
def grids(draw):
    """Lengths that divide in every order, T = S or not."""
    shards = draw(st.sampled_from([1, 2, 3, 4]))
    size = 2 * shards * draw(st.integers(1, 4))
    if draw(st.booleans()):
        kv_shards = draw(st.sampled_from([shards, 1]))
        orders = {"order": draw(st.sampled_from(ORDERS)), "kv_order": draw(st.sampled_from([None, "contiguous"]))}
        return ShardGrid(q_len=size, kv_len=size, q_shards=shards, kv_shards=kv_shards, **orders)
    kv_shards = draw(st.sampled_from([1, 2, 5]))
    kv_len = kv_shards * draw(st.integers(1, 6))
    return ShardGrid(q_len=size, kv_len=kv_len, q_shards=shards, kv_shards=kv_shards)


_OF_POSITIONS = ("causal", "window", "chunked", "block_causal")


@st.composite
def cases(draw):
    grid = draw(grids())
    atoms = draw(st.sampled_from([_OF_POSITIONS, STATIC_ATOMS]))
    return draw(masks_of(grid.q_len, grid.kv_len, 2, atoms, traced=False)), grid


@given(cases())
@settings(max_examples=80, deadline=None)
def test_the_class_of_every_pair_shows_what_the_mask_shows_there(case):
    assume(has_no_offset_of_zero(case[0]) or case[1].tokens is None)
    assert_table_is_right(*case)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "mask",
    [
        masks.Chunked(24),
        masks.Chunked(64),
        masks.BlockCausal(24),
        masks.SlidingWindow(20, 5),
        masks.Chunked(40) & masks.SlidingWindow(9) & masks.BlockCausal(6).at(query_offset=3),
        masks.Causal().at(query_positions=np.arange(63, -1, -1), kv_positions=np.arange(0, 192, 3)),
        masks.SlidingWindow(9, 2).at(query_positions=np.arange(63, -1, -1) * 2, kv_positions=np.arange(63, -1, -1) * 2),
        masks.SlidingWindow(9).at(query_positions=np.arange(64) // 16, kv_positions=np.arange(64) // 16 * 3),
    ],
    ids=str,
)
def test_masks_that_reach_over_several_shards(mask, order):
    assert_table_is_right(mask, square(64, 4, order))


@st.composite
def array_cases(draw):
    grid = draw(grids())
    return draw(masks_of(grid.q_len, grid.kv_len)), grid


@given(array_cases())
@settings(max_examples=50, deadline=None)
def test_parts_of_arrays_show_what_the_mask_shows_there(case):
    assume(has_no_offset_of_zero(case[0]) or case[1].tokens is None)
    assert_table_is_right(*case)


_LENGTH = 16
_RNG = np.random.default_rng(0)


def _ids(most, rows=BATCH):
    return np.sort(_RNG.integers(-1, most, (rows, _LENGTH)), axis=1).astype(np.int32)


_BY_ROW = _RNG.integers(0, 2, (BATCH, Q_HEADS, _LENGTH, _LENGTH)).astype(bool)
ARRAY_MASKS = {
    "segments": masks.Segments(_ids(3)),
    "segments without rows": masks.Segments(_ids(3)[0]),
    "segments, separate": masks.Segments(_ids(3), _ids(3)),
    "causal & segments": masks.Causal() & masks.Segments(_ids(3)),
    "(causal & segments) | spans": (masks.Causal() & masks.Segments(_ids(3))) | masks.BidirectionalSpans(_ids(2)),
    "causal | spans": masks.Causal() | masks.BidirectionalSpans(_ids(2)),
    "lengths": masks.Lengths(np.array([3, 16]), np.array([9, 2])),
    "one length": masks.Lengths(5),
    "prefix": masks.PrefixLM(np.array([2, 11])),
    "prefix at offsets": masks.PrefixLM(7).at(query_offset=np.array([1, -4]), kv_offset=2),
    "dense": masks.Dense(_BY_ROW) & masks.SlidingWindow(4, 2),
    "dense of keys": masks.Dense(_BY_ROW[:, :1, :1]),
    "selection per query head": masks.BlockSelection(_BY_ROW[..., :4], 4),
    "selection per key/value head": masks.BlockSelection(_BY_ROW[:, :KV_HEADS, :, :4], 4),
    "predicate with an operand": masks.Predicate(near, jnp.asarray([3, 6])[:, None, None, None]),
    "predicate with a scalar": masks.Predicate(near, 3),
    "predicate": masks.Predicate(strided) & masks.Causal(),
    "traced positions": masks.Causal().at(query_positions=jnp.arange(_LENGTH)[::-1]),
    "traced offsets": masks.SlidingWindow(5).at(query_offset=jnp.asarray([2, -3])),
    "rows of positions": masks.Causal().at(query_positions=np.stack([np.arange(_LENGTH), np.arange(_LENGTH)[::-1]])),
    "negation": ~(masks.Causal() & masks.Segments(_ids(3))),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ARRAY_MASKS)
def test_parts_of_every_mask_with_arrays(name, order):
    grid = ShardGrid(q_len=_LENGTH, kv_len=_LENGTH, q_shards=4, kv_shards=2, order=order)
    assert why_not_cut(ARRAY_MASKS[name].form) is None
    table = assert_table_is_right(ARRAY_MASKS[name], grid)
    assert any(piece.traced for pieces in table.classes for piece in pieces)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.PrefixLM(3), ~masks.Causal()], ids=str)
def test_an_offset_of_zero_is_a_default_position_in_every_order(mask):
    grid = square(16, 4, "striped")
    placed = mask.at(query_offset=0)
    assert pair_table(placed.form, grid) is pair_table(mask.form, grid)
    for one, other in zip(placed.canonical(), mask.canonical(), strict=True):
        parts = [cut_arrays(spread_in_order(each, grid.tokens), grid, 1, 2).within(4, 8, 4, 4) for each in (one, other)]
        np.testing.assert_array_equal(*(part.materialize(4, 4) for part in parts))


def test_within_takes_traced_starts():
    mask = masks.PrefixLM(5) & masks.Lengths(11)

    @jax.jit
    def shown(query, kv):
        return mask.within(query, kv, 4, 8).materialize(4, 8)

    np.testing.assert_array_equal(shown(8, 8)[0, 0], mask.materialize(16, 16)[0, 0, 8:12, 8:])


def test_lengths_at_the_least_integer_do_not_wrap():
    least = np.iinfo(np.int32).min
    assert not masks.Lengths(least).within(0, 4, 4, 4).materialize(4, 4).any()


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize(
    ("order", "classes", "skipped"),
    [
        ("contiguous", ["causal", "full"], lambda p: p * (p - 1) // 2),
        ("striped", ["causal", "causal at query=-1"], None),
    ],
)
def test_causal_attention_has_few_classes(shards, order, classes, skipped):
    form = masks.Causal().form
    table = pair_table(form, square(64, shards, order))
    assert sorted(str(class_form(form, pieces)) for pieces in table.classes) == classes
    assert table.skipped == (shards * (shards - 1) // 2 if skipped else 0)
    assert table.full + table.partial + table.skipped == shards**2


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_causal_attention_in_dual_chunk_order_has_three_classes_of_which_one_is_the_diagonal(shards):
    form = masks.Causal().form
    table = pair_table(form, square(64, shards, "dual_chunk"))
    assert len(table.classes) == 3
    diagonal = {str(class_form(form, table.of(shard, shard))) for shard in range(shards)}
    assert diagonal == {"causal"}
    assert table.partial == shards**2


_OF_WINDOW = ["causal", "window(0, inf) at query=1"]
_OF_SYMMETRIC_WINDOW = ["causal at query=-13", "window(0, inf) at query=13", "window(6, 0) at query=3"]


@pytest.mark.parametrize(
    ("mask", "order", "classes"),
    [
        (masks.SlidingWindow(15), "contiguous", _OF_WINDOW),
        (masks.SlidingWindow(15), "striped", ["window(3, 0)", "window(3, 0) at query=-1"]),
        (masks.Chunked(8), "contiguous", ["chunked(8)"]),
        (masks.Chunked(32), "contiguous", ["causal", "full"]),
        (masks.Chunked(16), "striped", ["causal at query=-1 & chunked(4)", "chunked(4)"]),
        (masks.BlockCausal(8), "contiguous", ["block_causal(8)", "full"]),
        (masks.BlockCausal(8), "striped", ["block_causal(2)"]),
        (
            masks.SlidingWindow(15).at(query_offset=7, kv_offset=7),
            "contiguous",
            ["causal", "window(0, inf) at query=1"],
        ),
        (
            masks.SlidingWindow(3, 3),
            "contiguous",
            ["causal at query=-13", "window(0, inf) at query=13", "window(6, 0) at query=3"],
        ),
        (masks.Full(), "dual_chunk", ["full"]),
        (masks.Chunked(32) & masks.SlidingWindow(20), "contiguous", ["causal", "window(0, inf) at query=-4"]),
    ],
    ids=str,
)
def test_equal_work_is_one_class(mask, order, classes):
    table = pair_table(mask.form, square(64, 4, order))
    assert sorted(str(class_form(mask.form, pieces)) for pieces in table.classes) == classes


def test_windows_in_dual_chunk_order_repeat_their_classes():
    counts = [len(pair_table(masks.SlidingWindow(63).form, square(128 * p, p, "dual_chunk")).classes) for p in (8, 16)]
    assert counts == [4, 4]


def test_the_keys_of_a_shard_are_listed_and_pairs_counted():
    table = pair_table(masks.SlidingWindow(4).form, square(32, 4))
    assert table.blocks_of(2) == (1, 2)
    assert table.table[0][1] == EMPTY
    assert table.of(0, 1) is None
    assert (table.full, table.partial, table.skipped) == (0, 7, 9)
    assert table.counts == (4, 3)


def test_positions_in_no_order_are_left_to_the_program_before_they_outgrow_the_sequence():
    tokens = np.random.default_rng(0).permutation(512)
    mask = masks.Causal().at(query_positions=tokens, kv_positions=tokens)
    table = pair_table(mask.form, square(512, 8))
    assert table.classes == ((pair_table(mask.form, square(512, 8)).classes[0][0],),)
    assert table.classes[0][0].traced


def test_every_key_in_its_own_place_next_to_striped_queries_stays_static():
    grid = ShardGrid(q_len=64, kv_len=64, q_shards=4, kv_shards=1, order="striped", kv_order="contiguous")
    table = assert_table_is_right(masks.Causal(), grid)
    assert all(not piece.traced and piece.kv.start == 0 for (piece,) in table.classes)


def test_a_form_and_its_masks_are_sorted_alike():
    mask = masks.SlidingWindow(20).at(query_offset=3) & masks.Chunked(8) & masks.BlockCausal(4)
    form, grid = mask.form, square(32, 2)
    pieces = pair_table(form, grid).of(0, 0)
    located = tuple(piece.mask(mask.canonical()) for piece in pieces)
    aligned = aligned_masks(form, pieces, located)
    assert tuple(one.form.atoms[0] for one in aligned) == class_form(form, pieces).atoms
    assert len(aligned) > 1


def test_where_nothing_is_visible_one_pair_is_left():
    table = pair_table(masks.Causal().form, ShardGrid(q_len=0, kv_len=8, q_shards=2, kv_shards=4))
    assert (table.skipped, table.of(0, 0)) == (7, ())
    before = masks.Causal().at(query_positions=np.arange(8), kv_positions=np.arange(8) + 8)
    table = pair_table(before.form, ShardGrid(q_len=8, kv_len=8, q_shards=2, kv_shards=4))
    assert (table.skipped, table.partial, len(table.of(0, 0))) == (7, 1, 1)


def test_no_slots_are_no_blocks():
    assert blocks_per_shard(masks.Causal().form, ShardGrid(q_len=0, kv_len=8, q_shards=2, kv_shards=4)).sum() == 0


# Measured by a prototype that evaluated every block, for T = 8192 and 8 devices: of the devices the fewest and the most
# blocks, and those that a ring waits for.
WORK = {
    ("contiguous", masks.Causal()): (36, 484, 484, 0.54),
    ("dual_chunk", masks.Causal()): (260, 260, 260, 1.0),
    ("striped", masks.Causal()): (288, 288, 288, 1.0),
    ("contiguous", masks.SlidingWindow(1023)): (36, 72, 72, 0.94),
    ("dual_chunk", masks.SlidingWindow(1023)): (46, 72, 108, 0.62),
    ("striped", masks.SlidingWindow(1023)): (120, 120, 120, 1.0),
    ("contiguous", masks.Chunked(2048)): (36, 100, 100, 0.68),
    ("dual_chunk", masks.Chunked(2048)): (68, 68, 116, 0.59),
    ("striped", masks.Chunked(2048)): (96, 96, 96, 1.0),
}


@pytest.mark.parametrize(("order", "mask"), WORK, ids=str)
def test_the_work_of_each_device_is_counted_in_blocks(order, mask):
    blocks = blocks_per_shard(mask.form, square(8192, 8, order))
    devices = blocks.sum(axis=1)
    found = devices.min(), devices.max(), lockstep(blocks), round(lockstep_efficiency(blocks), 2)
    assert found == WORK[order, mask]


def test_blocks_are_counted_within_shards_that_they_do_not_divide():
    grid = square(24, 4)
    mask = masks.SlidingWindow(1)
    visible = mask.materialize(24, 24)[0, 0]
    for i, j in np.ndindex(4, 4):
        part = visible[6 * i : 6 * i + 6, 6 * j : 6 * j + 6]
        held = [part[a : a + 4, b : b + 4].any() for a in (0, 4) for b in (0, 4)]
        assert blocks_per_shard(mask.form, grid, 4)[i, j] == sum(held)


def test_blocks_of_what_is_known_without_arrays_are_counted_with_them():
    causal, packed = masks.Causal(), masks.Causal() & masks.Segments(np.zeros(64, np.int32))
    spans = masks.BidirectionalSpans(np.zeros(64, np.int32))
    grid = square(64, 4, "dual_chunk")
    np.testing.assert_array_equal(blocks_per_shard(packed.form, grid, 4), blocks_per_shard(causal.form, grid, 4))
    either = causal | masks.SlidingWindow(8, 8)
    exact = [either.at(**dict.fromkeys(("query_positions", "kv_positions"), grid.tokens[0])).block_map(64, 64, 4, 4)]
    found = blocks_per_shard(either.form, grid, 4)
    np.testing.assert_array_equal(found, (exact[0] > 0).reshape(4, 4, 4, 4).sum(axis=(1, 3)))
    assert (blocks_per_shard((causal & ~spans).form, grid, 4) == blocks_per_shard(causal.form, grid, 4)).all()


def test_gathered_keys_take_one_step():
    assert lockstep(np.array([[3], [5]])) == 5
    assert lockstep_efficiency(np.array([[3], [5]])) == 0.8
    assert lockstep_efficiency(np.zeros((2, 2), int)) == 1.0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: square(250, 8), ShapeError, r"query length T=250 .*250 % 8 = 2; pad to 256"),
        (lambda: ShardGrid(q_len=8, kv_len=9, q_shards=2, kv_shards=2), ShapeError, r"S=9 .*9 % 2 = 1; pad to 10"),
        (lambda: ShardGrid(q_len=8, kv_len=8, q_shards=0, kv_shards=2), ArgumentError, "T=8 .*into 0 shards"),
        (lambda: square(8, 2, "stripes"), ArgumentError, "unknown order 'stripes'; did you mean 'striped'"),
        (lambda: square(8, 8, "dual_chunk").tokens, ArgumentError, r"8 tokens .*dual_chunk order: 8 % 16"),
    ],
)
def test_a_grid_that_does_not_divide_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_traced_piece_has_no_mask_before_the_program_runs():
    mask = masks.PrefixLM(3)
    [[piece]] = pair_table(mask.form, square(8, 2)).classes
    with pytest.raises(PluginError, match=r"atom 0 .*only a program"):
        piece.mask(mask.canonical())


def test_static_positions_are_spread_before_they_are_cut():
    with pytest.raises(PluginError, match=r"call spread\(\) first"):
        masks.Causal().at(query_positions=np.array([1, 0])).within(0, 0, 2, 2)


def test_operands_of_unknown_axes_are_refused():
    with pytest.raises(ShapeError, match=r"operand of near has shape \(3,\).*as B N T S"):
        leaf_axes(masks.Predicate(near, np.arange(3)))


@pytree("array")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Undeclared(masks.Mask):
    """Keys that an array names, whose axes are not declared."""

    array: np.ndarray

    word: ClassVar[str] = "undeclared"

    def evaluate(self, query, kv):
        return kv.slots < self.array[0]


@pytree("array")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Narrow(masks.Mask):
    """One value per slot; the array may have more axes than are declared."""

    array: np.ndarray

    word: ClassVar[str] = "narrow"
    axes: ClassVar[dict[str, str]] = {"array": "S"}

    def evaluate(self, query, kv):
        return kv.take(self.array)


@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class EvenSlots(masks.Mask):
    """Looks at slots."""

    word: ClassVar[str] = "even_slots"

    def evaluate(self, query, kv):
        return (query.slots + kv.slots) % 2 == 0


@pytree("start")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FromStart(masks.Mask):
    """Compares slots with an array, and says how they move."""

    start: np.ndarray

    word: ClassVar[str] = "from_start"
    axes: ClassVar[dict[str, str]] = {"start": "B"}

    def evaluate(self, query, kv):
        return kv.slots >= self.start.reshape(-1, 1, 1, 1)

    def within(self, query_start, kv_start, q_len, kv_len):
        return FromStart(self.start - kv_start)


@pytree("start")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FromStartAnywhere(masks.Mask):
    """The same, and does not say how they move."""

    start: np.ndarray

    word: ClassVar[str] = "from_start_anywhere"
    axes: ClassVar[dict[str, str]] = {"start": "B"}

    def evaluate(self, query, kv):
        return kv.slots >= self.start.reshape(-1, 1, 1, 1)


@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class ByTable(masks.Mask):
    """Reads an array that its code holds at positions: it has none of its own."""

    word: ClassVar[str] = "by_table"
    positional: ClassVar[bool] = True
    axes: ClassVar[dict[str, str]] = {}

    def evaluate(self, query, kv):
        return (jnp.arange(64) % 3 == 0)[kv.positions] & (query.positions >= 0)


@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class EvenPositions(masks.Mask):
    """Looks at positions."""

    word: ClassVar[str] = "even_positions"
    positional: ClassVar[bool] = True

    def evaluate(self, query, kv):
        return (query.positions + kv.positions) % 2 == 0


@pytest.mark.parametrize(
    "mask",
    [
        EvenPositions(),
        EvenPositions() & masks.Causal(),
        ByTable(),
        Narrow(np.arange(16) % 3 == 0),
        FromStart(np.array([3, 11])),
    ],
    ids=lambda mask: type(mask).__name__,
)
@pytest.mark.parametrize("order", ORDERS)
def test_masks_of_third_parties_are_cut_by_what_they_declare(mask, order):
    assert why_not_cut(mask.form) is None
    assert_table_is_right(mask, square(16, 4, order))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Undeclared(np.array([3])), "mask 'undeclared' .*Undeclared.axes does not say"),
        (EvenSlots() | masks.Causal(), "mask 'even_slots' .*EvenSlots compares slots, which count from 0"),
        (FromStartAnywhere(np.array([3])), "define FromStartAnywhere.within"),
        (dataclasses.replace(masks.Causal().form.atoms[0]), None),
    ],
    ids=["no axes", "slots", "slots and arrays", "none"],
)
def test_masks_that_cannot_be_cut_are_named(mask, words):
    form = masks.MaskForm((mask,)) if isinstance(mask, masks.Atom) else mask.form
    why = why_not_cut(form)
    assert why is None if words is None else why
    if words is not None:
        with pytest.raises(ShapeError, match=words):
            raise ShapeError(why)


@pytest.mark.parametrize("mask", [Undeclared(np.array([3])), Narrow(np.ones((2, 16), bool))])
def test_arrays_of_undeclared_axes_have_no_letters(mask):
    with pytest.raises(ShapeError, match=r"array has shape .*declare each dimension in \w+.axes"):
        leaf_axes(mask)
