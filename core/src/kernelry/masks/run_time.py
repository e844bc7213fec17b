"""What masks that depend on arrays say of whole blocks, when the program runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.indexed import BidirectionalSpans, Dense, Lengths, Segments
from kernelry.masks.selection import BlockSelection
from kernelry.masks.side import Side


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockGrid:
    """Blocks of equal size over the queries and the keys; the last ones go beyond the end.

    Args:
      q_len, kv_len: T and S.
      block_q, block_kv: slots of a block.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int

    @property
    def rows(self) -> int:
        """The number of blocks of queries."""
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        """The number of blocks of keys."""
        return -(-self.kv_len // self.block_kv)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Decided:
    """For each batch row and block whether it may hold anything, and whether it certainly holds everything.

    Both err on the safe side: `some` may be True of an empty block, `full` False of a full one. The batch is 1 where
    all its rows are alike.
    """

    some: Bool[Array, "#B rows columns"]
    full: Bool[Array, "#B rows columns"]


def decided_at_run_time(mask: Mask, grid: BlockGrid) -> Decided:
    """Classifies the blocks of one atom of a conjunction from the least and the greatest id or position of each."""
    if isinstance(mask, Segments):
        return _of_ids(mask.query_ids, mask.kv_ids, grid)
    if isinstance(mask, BidirectionalSpans):
        return _of_ids(mask.query_spans, mask.kv_spans, grid)
    if isinstance(mask, Lengths):
        return _of_lengths(mask, grid)
    if isinstance(mask, Dense):
        return _of_array(mask, grid)
    atom = mask.form.atoms[0]
    if atom.is_band:
        return _of_band(mask, atom, grid)
    if atom.kind is AtomKind.ANY_OF:
        return _of_branches(mask, grid)
    if atom.kind is AtomKind.BLOCK_SELECTION and atom.kv.start is not None:
        return _of_selection(mask, atom, grid)
    return _undecided(grid)


def _undecided(grid: BlockGrid) -> Decided:
    shape = (1, grid.rows, grid.columns)
    return Decided(jnp.ones(shape, bool), jnp.zeros(shape, bool))


def _of_branches(mask: Mask, grid: BlockGrid) -> Decided:
    some = full = jnp.zeros((1, grid.rows, grid.columns), bool)
    for branch in mask.conjuncts()[0].branches:
        every = [decided_at_run_time(conjunct.located_mask, grid) for conjunct in branch]
        branch_some, branch_full = jnp.ones_like(some), jnp.ones_like(full)
        for part in every:
            branch_some, branch_full = branch_some & part.some, branch_full & part.full
        some, full = some | branch_some, full | branch_full
    return Decided(some, full)


def _of_ids(query: jax.Array, kv: jax.Array | None, grid: BlockGrid) -> Decided:
    """Ranges of ids that do not meet hold nothing; one id on both sides, not negative, holds everything."""
    kv = query if kv is None else kv
    if not (_fits_int32(query) and _fits_int32(kv)):
        return _undecided(grid)
    low_q, high_q, whole_q = _id_ranges(query, grid.block_q, grid.rows)
    low_k, high_k, whole_k = _id_ranges(kv, grid.block_kv, grid.columns)
    apart = (high_q[:, :, None] < low_k[:, None]) | (high_k[:, None] < low_q[:, :, None])
    same = (low_q == high_q)[:, :, None] & (low_k == high_k)[:, None] & (low_q[:, :, None] == low_k[:, None])
    full = same & whole_q[:, :, None] & whole_k[:, None]
    return Decided(~apart, full)


def _fits_int32(ids: jax.Array) -> bool:
    return bool(np.can_cast(ids.dtype, np.int32))


def _id_ranges(ids: jax.Array, block: int, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least and greatest id ≥ 0 of each block, [rows, blocks], and whether every id is ≥ 0."""
    tiles = _tiles(jnp.atleast_2d(jnp.asarray(ids)).astype(jnp.int32), block, blocks)
    alive = tiles >= 0
    low = jnp.where(alive, tiles, np.iinfo(np.int32).max).min(axis=2)
    high = jnp.where(alive, tiles, -1).max(axis=2)
    return low, high, alive.all(axis=2)


def _of_lengths(mask: Lengths, grid: BlockGrid) -> Decided:
    some_k, full_k = _reached(mask.kv_lengths, grid.block_kv, grid.columns, grid.kv_len)
    some, full = some_k[:, None], full_k[:, None]
    if mask.query_lengths is not None:
        some_q, full_q = _reached(mask.query_lengths, grid.block_q, grid.rows, grid.q_len)
        some, full = some & some_q[:, :, None], full & full_q[:, :, None]
    return _decided(some, full, grid)


def _decided(some: jax.Array, full: jax.Array, grid: BlockGrid) -> Decided:
    """Lets blocks that are alike along rows or columns stand for all of them."""
    shape = (some.shape[0], grid.rows, grid.columns)
    return Decided(jnp.broadcast_to(some, shape), jnp.broadcast_to(full, shape))


def _reached(lengths: jax.Array, block: int, blocks: int, end: int) -> tuple[jax.Array, jax.Array]:
    """Whether a length reaches into each block, and whether it covers it; [rows, blocks]."""
    column = jnp.atleast_1d(jnp.asarray(lengths)).astype(jnp.int32).reshape(-1, 1)
    starts = jnp.arange(blocks, dtype=jnp.int32)[None] * block
    return starts < column, jnp.minimum(starts + block, end) <= column


def _of_array(mask: Dense, grid: BlockGrid) -> Decided:
    visible = jnp.asarray(mask.visible)
    visible = visible.reshape((1,) * (4 - visible.ndim) + visible.shape)
    for axis, (block, blocks) in ((2, (grid.block_q, grid.rows)), (3, (grid.block_kv, grid.columns))):
        if visible.shape[axis] != 1:
            more = [(0, 0)] * 4
            more[axis] = (0, blocks * block - visible.shape[axis])
            visible = jnp.pad(visible, more, mode="edge")
    return _decided(_over_tiles(visible, grid, jnp.any), _over_tiles(visible, grid, jnp.all), grid)


def _over_tiles(visible: jax.Array, grid: BlockGrid, reduce: Callable[..., jax.Array]) -> jax.Array:
    rows = (grid.rows, grid.block_q) if visible.shape[2] > 1 else (1, 1)
    columns = (grid.columns, grid.block_kv) if visible.shape[3] > 1 else (1, 1)
    tiles = visible.reshape(*visible.shape[:2], *rows, *columns)
    return reduce(tiles, axis=(1, 3, 5))


def _of_selection(mask: Mask, atom: Atom, grid: BlockGrid) -> Decided:
    """A block of keys stands in some of the selection's own blocks; which, is known while tracing."""
    selection = mask.conjuncts()[0].mask
    assert isinstance(selection, BlockSelection)
    keep = jnp.asarray(selection.keep)
    keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
    if keep.shape[2] > 1:
        more = grid.rows * grid.block_q - keep.shape[2]
        keep = jnp.pad(keep, ((0, 0), (0, 0), (0, more), (0, 0)), mode="edge")
        keep = keep.reshape(*keep.shape[:2], grid.rows, grid.block_q, keep.shape[3])
    else:
        keep = keep[:, :, :, None]
    assert atom.kv.start is not None
    first = atom.kv.start + np.arange(grid.columns) * grid.block_kv
    last = np.minimum(first + grid.block_kv, atom.kv.start + grid.kv_len) - 1
    blocks = np.arange(keep.shape[4])
    size = selection.block_size
    within = (blocks >= (first // size)[:, None]) & (blocks <= (last // size)[:, None])  # [columns, blocks]
    covered = (
        within.sum(axis=1) == last // size - first // size + 1
    )  # blocks that the selection does not know are hidden
    some = (keep.any(axis=(1, 3))[:, :, None] & within[None, None]).any(axis=3)
    full = (keep.all(axis=(1, 3))[:, :, None] | ~within[None, None]).all(axis=3) & covered[None, None]
    return _decided(some, full, grid)


def _of_band(mask: Mask, atom: Atom, grid: BlockGrid) -> Decided:
    """A band at positions that are known only when the program runs."""
    conjunct = mask.conjuncts()[0]
    query = Side.query(grid.q_len).at(conjunct.query).positions.reshape(-1, grid.q_len)
    kv = Side.kv(grid.kv_len).at(conjunct.kv).positions.reshape(-1, grid.kv_len)
    tiles_q, tiles_k = _tiles(query, grid.block_q, grid.rows), _tiles(kv, grid.block_kv, grid.columns)
    low_q, high_q = tiles_q.min(axis=2)[:, :, None], tiles_q.max(axis=2)[:, :, None]
    low_k, high_k = tiles_k.min(axis=2)[:, None], tiles_k.max(axis=2)[:, None]
    left, right = atom.params
    some = jnp.ones((1, grid.rows, grid.columns), bool)
    full = some
    if left is not None:
        some, full = some & (_shifted(low_q, -left) <= high_k), full & (_shifted(high_q, -left) <= low_k)
    if right is not None:
        some, full = some & (low_k <= _shifted(high_q, right)), full & (high_k <= _shifted(low_q, right))
    return Decided(some, full)


def _shifted(positions: jax.Array, by: int) -> jax.Array:
    """Adds, and stays at the ends of int32: a key that stands nowhere may be given the least of all positions."""
    ends = np.iinfo(np.int32)
    return jnp.clip(positions, ends.min - min(by, 0), ends.max - max(by, 0)) + np.int32(by)


def _tiles(values: jax.Array, block: int, blocks: int) -> jax.Array:
    """[rows, L] → [rows, blocks, block]; the last value is repeated beyond the end."""
    more = blocks * block - values.shape[1]
    return jnp.pad(values, ((0, 0), (0, more)), mode="edge").reshape(values.shape[0], blocks, block)
