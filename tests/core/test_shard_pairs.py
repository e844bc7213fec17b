"""The class of a pair of shards shows what the whole mask shows there, and equal work is one class."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import BATCH, Q_HEADS, STATIC_ATOMS, masks_of

from kernelry.masks.shard_pairs import (
    ShardGrid,
    pair_table,
)
from kernelry.masks.spread import leaf_axes, spread_in_order

ORDERS = ("contiguous", "dual_chunk", "striped")


def in_order(mask, grid):
    """The mask as it is meant: default positions are those of the order."""
    if grid.tokens is None:
        return mask.at(query_offset=0, kv_offset=0)
    query, kv = grid.tokens
    return mask.at(query_positions=query, kv_positions=kv)


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


def part_of(mask, grid, i, j):
    """The mask of a pair of shards, as a running program makes it."""
    (q_len, kv_len), tokens = grid.shard_lengths, grid.tokens or (None, None)
    part = cut_arrays(spread_in_order(mask, *tokens), grid, i, j)
    return part.within(i * q_len, jnp.int32(j * kv_len), q_len, kv_len)


def shown(piece, mask, grid, i, j):
    located = part_of(mask.canonical()[piece.index], grid, i, j) if piece.traced else piece.mask(mask.canonical())
    assert located.at(query_offset=0).form.atoms == (piece.atom(mask.form),)
    return np.asarray(located.at(query_offset=0).materialize(*grid.shard_lengths, q_heads=Q_HEADS))


def assert_table_is_right(mask, grid):
    visible, table, (q_len, kv_len) = whole(mask, grid), pair_table(mask.form, grid), grid.shard_lengths
    for i in range(grid.q_shards):
        for j in range(grid.kv_shards):
            there = visible[:, :, i * q_len : (i + 1) * q_len, j * kv_len : (j + 1) * kv_len]
            pieces = table.of(i, j)
            if pieces is None:
                assert not there.any()
                continue
            for piece in pieces:
                there_too = shown(piece, mask, grid, i, j)
                assert (there <= there_too).all()
            expected = np.ones(there.shape, bool)
            for piece in pieces:
                expected = expected & shown(piece, mask, grid, i, j)
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
@settings(max_examples=150, deadline=None)
def test_the_class_of_every_pair_shows_what_the_mask_shows_there(case):
    assert_table_is_right(*case)
