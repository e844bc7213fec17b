"""What splash is told of a mask: the blocks of keys and queries that hold anything.

The vendor's own preparation evaluates T × S booleans, chunk by chunk, and knows causal and local masks. Here the kinds
of blocks come from the mask's `block_map`, mostly from ranges of positions alone, and the kernel evaluates the mask
itself in the blocks that are neither empty nor full.
"""

from __future__ import annotations

import numpy as np

from kernelry.masks import BlockKind
from kernelry_tpu_splash.blocks import narrowest
from kernelry_tpu_splash.splash import _vendor


def of_rows(kinds: np.ndarray, q_len: int | None) -> _vendor.MaskInfo:
    """What the forward pass and the pass over dQ walk: per block of queries the blocks of keys that hold anything.

    Args:
      kinds: [rows, columns] of BlockKind.
      q_len: T where the kernel evaluates a mask; None where every block is full.
    """
    visited = kinds != BlockKind.EMPTY
    counts = visited.sum(axis=1, keepdims=True)
    width = max(1, int(counts.max(initial=0)))
    order = np.argsort(~visited, axis=1, stable=True)[:, :width]
    place = np.arange(width)[None]
    found = np.where(place < counts, np.take_along_axis(kinds, order, axis=1), BlockKind.EMPTY)
    # What is not visited repeats the last block that was: nothing is fetched for it.
    column = np.take_along_axis(order, np.minimum(place, np.maximum(counts - 1, 0)), axis=1)
    return _info(found, column, q_len)


def of_columns(kinds: np.ndarray, q_len: int | None, *, shrink: bool) -> _vendor.MaskInfo:
    """What the pass over dK and dV walks: per block of keys the blocks of queries that see any of them.

    Args:
      kinds, q_len: as above.
      shrink: False where the pass writes dQ as well and so must meet every block of queries.
    """
    rows, visited = kinds.shape[0], kinds != BlockKind.EMPTY
    counts = visited.sum(axis=0, keepdims=True)
    if not shrink:
        return _info(kinds, _next_visited(visited), q_len)
    height = max(1, int(counts.max(initial=0)))
    order = np.argsort(visited, axis=0, stable=True)[rows - height :]  # those visited stand last
    place = np.arange(height)[:, None]
    skipped = height - counts
    found = np.where(place >= skipped, np.take_along_axis(kinds, order, axis=0), BlockKind.EMPTY)
    row = np.take_along_axis(order, np.minimum(np.maximum(place, skipped), height - 1), axis=0)
    return _info(found, row, q_len)


def _next_visited(visited: np.ndarray) -> np.ndarray:
    """For each block the block of queries of its column that is visited next, or else was visited last."""
    rows = visited.shape[0]
    row = np.arange(rows)[:, None]
    upcoming = np.minimum.accumulate(np.where(visited, row, rows)[::-1], axis=0)[::-1]
    last = np.where(visited, row, 0).max(axis=0, keepdims=True, initial=0)
    return np.where(upcoming == rows, last, upcoming)


def _info(kinds: np.ndarray, fetched: np.ndarray, q_len: int | None) -> _vendor.MaskInfo:
    return _vendor.MaskInfo(
        data_next=narrowest(fetched).reshape(1, *fetched.shape),
        mask_next=None,
        block_mask=kinds.astype(np.int8).reshape(1, *kinds.shape),
        partial_mask_blocks=None,
        q_sequence=None if q_len is None else np.arange(q_len, dtype=np.int32),
    )
