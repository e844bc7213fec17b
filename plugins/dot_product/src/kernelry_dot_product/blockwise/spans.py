"""One tile for a block of queries, as wide as what it sees, where the mask says that while tracing.

Where all keys are one block, a block of queries is a single tile: softmax needs no running maximum, and the products
are large. What such a tile leaves out of a causal mask is known before the program runs, so blocks of queries are not
looped over: each has a tile of its own width.
"""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import numpy as np
from jax import lax

from kernelry.masks import BlockKind
from kernelry.plugin import Mask, Request, static_block_map
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.tile import Tiles

_MOST_ROWS = 8
"""Blocks of queries, each with a tile of its own in the program: more take longer to compile than loops."""

_STEP = 64
"""Slots: the widths of tiles are multiples of it."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """The keys that a block of queries sees: from `start` up to `stop`; `masked` where it does not see all of them."""

    start: int
    stop: int
    masked: bool

    def of(self, tiles: Tiles) -> Tiles:
        """The tiles that have just these keys."""
        return dataclasses.replace(tiles, grid=tiles.grid.keys(self.start, self.stop))

    def cut(self, keys: jax.Array) -> jax.Array:
        """[b, k, S, H] → the slots of the span."""
        return lax.slice_in_dim(keys, self.start, self.stop, axis=2)


def spans_of(masks: tuple[Mask, ...], request: Request, grid: Grid) -> tuple[Span, ...]:
    """What each block of queries sees; empty where there are loops instead.

    Args:
      masks: a conjunction. request: what the call asks for. grid: its blocks.
    """
    known = all(mask.form.atoms[0].is_static for mask in masks)
    if not known or grid.columns != 1 or grid.rows > _MOST_ROWS or not request.has_plain_kv:
        return ()
    if not masks:
        return (Span(0, grid.kv_len, masked=False),) * grid.rows
    kinds = static_block_map(masks, grid.q_len, grid.kv_len, grid.block_q, _STEP)
    return tuple(_span(row, grid.kv_len) for row in kinds)


def _span(kinds: np.ndarray, kv_len: int) -> Span:
    seen = np.flatnonzero(kinds != BlockKind.EMPTY)
    first, last = (int(seen[0]), int(seen[-1])) if seen.size else (0, 0)
    masked = bool((kinds[first : last + 1] != BlockKind.FULL).any())
    return Span(first * _STEP, min((last + 1) * _STEP, kv_len), masked)
