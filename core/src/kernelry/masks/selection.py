"""Whole blocks of keys chosen per query: mixture of block attention, native sparse attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, final

import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.masks.arrays import as_booleans, filled, module_of, padded, read_booleans, with_rank_4
from kernelry.masks.base import Extent, Mask, Placeholder
from kernelry.masks.chunked import whole_size
from kernelry.masks.form import AtomKind
from kernelry.masks.run_time import BlockGrid, Decided
from kernelry.masks.side import ArrayLike, Side

if TYPE_CHECKING:
    from kernelry.masks.composition import Conjunct
    from kernelry.masks.padding import Padding


@final
@pytree("keep")
@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockSelection(Mask):
    """A query sees the blocks of keys kept for it: keep[b, n, t, p_k // block_size].

    `BlockSelection([[True, False], [True, False], [False, True], [True, True]], 2)`:

        1 1 . .
        1 1 . .
        . . 1 1
        1 1 1 1

    Args:
      keep: booleans [B, N, T, blocks], or [B, K, T, blocks] where the query heads of a group share
        them; leading dimensions may be 1 or absent. Keys of other blocks are hidden.
      block_size: positions per block, ≥ 1. Blocks begin at the multiples of block_size.
    """

    keep: ArrayLike
    block_size: int

    word: ClassVar[str] = "block_selection"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.BLOCK_SELECTION,)
    positional: ClassVar[bool] = True
    uses_query_positions: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, str]] = {"keep": "BNT."}

    def __post_init__(self) -> None:
        instead = "compare the scores of an indexer with a threshold."
        object.__setattr__(self, "keep", as_booleans("BlockSelection: keep", self.keep, instead))
        object.__setattr__(self, "block_size", whole_size("BlockSelection: block_size", self.block_size))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        keep = with_rank_4(self.keep)
        xp = module_of(keep, query.slots, kv.positions)
        if not query.whole and keep.shape[2] != 1:
            keep = xp.take(keep, query.slots.reshape(-1), axis=2)
        if query.q_heads is not None and keep.shape[1] != 1:
            keep = _for_query_heads(keep, query.q_heads, xp)
        return _at_blocks(keep, kv.positions // self.block_size, xp)

    def check(self, extent: Extent) -> None:
        rows, heads, queries, _ = with_rank_4(self.keep).shape
        fits = rows in (1, extent.batch) and heads in (1, extent.kv_heads, extent.q_heads)
        if not fits or queries not in (1, extent.q_len):
            wanted = f"B={extent.batch}, N={extent.q_heads} or K={extent.kv_heads}, T={extent.q_len}"
            raise ShapeError(
                f"BlockSelection: keep must be [B, N or K, T, blocks] with {wanted}, got shape {self.keep.shape}."
            )

    @classmethod
    def placeholders(cls) -> dict[str, Placeholder]:
        return {
            "block_selection": Placeholder(
                lambda at, size: BlockSelection(_all_kept(at, size), size),
                "block_selection([[1, 0], [1, 1]], 2)",
                numbers=1,
            )
        }

    @classmethod
    def read(cls, keep: Any, block_size: int) -> Mask:
        return cls(read_booleans(keep), block_size)

    def sizes(self) -> dict[str, int]:
        rows, heads, queries, blocks = with_rank_4(self.keep).shape
        return {"B": rows, "N": heads, "K": heads, "T": queries, "S": blocks * self.block_size}

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        """A block of keys overlaps some of the selection's own blocks; which, is known while tracing."""
        start = conjunct.atom.kv.start
        if start is None:
            return Decided.unknown(grid)
        keep = with_rank_4(jnp.asarray(self.keep))
        if keep.shape[2] > 1:
            more = grid.rows * grid.block_q - keep.shape[2]
            keep = jnp.pad(keep, ((0, 0), (0, 0), (0, more), (0, 0)), mode="edge")
            keep = keep.reshape(*keep.shape[:2], grid.rows, grid.block_q, keep.shape[3])
        else:
            keep = keep[:, :, :, None]
        first = start + np.arange(grid.columns) * grid.block_kv
        last = np.minimum(first + grid.block_kv, start + grid.kv_len) - 1
        blocks, size = np.arange(keep.shape[4]), self.block_size
        within = (blocks >= (first // size)[:, None]) & (blocks <= (last // size)[:, None])  # [columns, blocks]
        # Keys beyond the selection's blocks are hidden.
        covered = within.sum(axis=1) == last // size - first // size + 1
        some = (keep.any(axis=(1, 3))[:, :, None] & within[None, None]).any(axis=3)
        full = (keep.all(axis=(1, 3))[:, :, None] | ~within[None, None]).all(axis=3) & covered[None, None]
        return Decided.spread(some, full, grid)

    def padded(self, padding: Padding) -> Mask:
        return BlockSelection(padded(with_rank_4(self.keep), 2, padding.more_queries), self.block_size)


def _all_kept(at: Extent, size: int) -> ArrayLike:
    blocks = -(-at.kv_len // whole_size("block_selection: size", size))
    return filled(True, (at.batch, at.kv_heads, at.q_len, blocks))


def _for_query_heads(keep: ArrayLike, q_heads: int, xp: ModuleType) -> ArrayLike:
    groups = q_heads // keep.shape[1]
    return keep if groups == 1 else xp.repeat(keep, groups, axis=1)


def _at_blocks(keep: ArrayLike, blocks: ArrayLike, xp: ModuleType) -> ArrayLike:
    """Reads keep [B, N, T, blocks] at the block numbers [B or 1, 1, 1, S]."""
    count = keep.shape[3]
    inside = (blocks >= 0) & (blocks < count)
    if count == 0:
        return xp.zeros((*keep.shape[:3], blocks.shape[3]), bool)
    blocks = xp.clip(blocks, 0, count - 1)
    if blocks.shape[0] == 1:
        return xp.take(keep, blocks.reshape(-1), axis=3) & inside
    rows = blocks.shape[0]
    keep = xp.broadcast_to(keep, (rows, *keep.shape[1:]))
    index = xp.broadcast_to(blocks, (rows, *keep.shape[1:3], blocks.shape[3])).astype(np.int32)
    return xp.take_along_axis(keep, index, axis=3) & inside
