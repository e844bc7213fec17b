"""Whole blocks of keys chosen per query: mixture of block attention, native sparse attention."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import ClassVar, final

import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.masks.arrays import as_booleans, described, module_of, with_rank_4
from kernelry.masks.base import Extent, Mask
from kernelry.masks.chunked import whole_size
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.side import ArrayLike, Side


@final
@pytree("keep")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
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

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash; the form is the key

    keep: ArrayLike
    block_size: int

    positional: ClassVar[bool] = True
    uses_query_positions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        instead = "compare the scores of an indexer with a threshold."
        object.__setattr__(self, "keep", as_booleans("BlockSelection: keep", self.keep, instead))
        object.__setattr__(self, "block_size", whole_size("BlockSelection: block_size", self.block_size))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.BLOCK_SELECTION, (self.block_size,))

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

    def __repr__(self) -> str:
        return f"BlockSelection({described(self.keep)}, {self.block_size})"


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
