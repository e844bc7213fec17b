"""Which blocks of a T×S mask hold anything, from the parts of the mask that need no array."""

from __future__ import annotations

import enum
from typing import final

import numpy as np

from kernelry.masks.base import Mask
from kernelry.masks.positions import Axis, Side


@final
class BlockKind(enum.IntEnum):
    """What a block of the mask holds."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


def block_map_of(mask: Mask, q_len: int, kv_len: int, block_q: int, block_kv: int) -> np.ndarray:
    """Classifies blocks by evaluating one row of blocks at a time: memory O(block_q · S)."""
    static = [c.located_mask for c in mask.conjuncts() if c.atom.is_static]
    dynamic = len(static) < len(mask.conjuncts())
    starts = range(0, q_len, block_q)
    columns = np.arange(0, kv_len, block_kv)
    result = np.empty((len(starts), len(columns)), np.int8)
    for row, start in enumerate(starts):
        stop = min(start + block_q, q_len)
        visible = _strip(static, start, stop, kv_len)
        counts = np.add.reduceat(visible.sum(axis=(0, 1, 2)), columns) if kv_len else np.zeros(0, int)
        full = visible.shape[0] * (stop - start) * np.diff(columns, append=kv_len)
        result[row] = np.where(
            counts == 0, BlockKind.EMPTY, np.where(counts == full, BlockKind.FULL, BlockKind.PARTIAL)
        )
    return np.where(result == BlockKind.FULL, BlockKind.PARTIAL, result) if dynamic else result


def _strip(masks: list[Mask], start: int, stop: int, kv_len: int) -> np.ndarray:
    query = Side.of_slots(Axis.QUERY, np.arange(start, stop, dtype=np.int32))
    kv = Side.kv(kv_len, np)
    visible = np.ones((1, 1, stop - start, kv_len), bool)
    for mask in masks:
        visible = visible & mask.evaluate(query, kv)
    return visible
