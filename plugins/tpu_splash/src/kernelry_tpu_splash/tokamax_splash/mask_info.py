"""What tokamax's splash is told of a mask: the blocks that hold anything, from `block_map` or booleans."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from kernelry.masks import BlockKind
from kernelry_tpu_splash.blocks import narrowest
from kernelry_tpu_splash.tokamax_splash import _vendor


def of_rows(kinds: np.ndarray, q_len: int | None) -> _vendor.MaskInfo:
    """What the forward pass walks: one block after another, of each row of blocks at least one.

    Args:
      kinds: [rows, columns] of BlockKind.
      q_len: T where the kernel evaluates a mask; None where every block is full.
    """
    if q_len is None:
        return _vendor.MaskInfo(*[None] * 7)
    visited = kinds != BlockKind.EMPTY
    visited[:, 0] |= ~visited.any(axis=1)  # a row of blocks that is not visited is not written
    return _walk(np.argwhere(visited), np.maximum(kinds[visited], BlockKind.PARTIAL), q_len)


def of_columns(kinds: np.ndarray, q_len: int | None, *, walks: bool) -> _vendor.MaskInfo:
    """What the backward pass walks: per block of keys the blocks of queries.

    Args:
      kinds, q_len: as above.
      walks: whether it goes from one block with a visible pair to the next; else it visits all of them.
    """
    if q_len is None and not walks:
        return _vendor.MaskInfo(*[None] * 7)
    turned = kinds.T.copy()
    if not walks:
        return _vendor.MaskInfo(None, None, None, turned.astype(np.int8).reshape(-1), None, None, _slots(q_len))
    visited = turned != BlockKind.EMPTY
    visited[:, 0] |= ~visited.any(axis=1)
    return _walk(np.argwhere(visited), turned[visited], q_len)


def of_booleans(
    visible: Bool[Array, "T S"], block_q: int, block_kv: int, *, of_keys: bool, walks: bool
) -> _vendor.MaskInfo:
    """The same for a mask that only the running program knows, whose blocks are in memory.

    Args:
      visible: which keys each query sees.
      block_q, block_kv: the blocks' sizes.
      of_keys: whether the backward pass asks. It computes no block that holds nothing; the forward pass does, for
        the vendor would take it for a full one.
      walks: as above; the list has all blocks.
    """
    rows, columns = visible.shape[0] // block_q, visible.shape[1] // block_kv
    blocks = visible.reshape(rows, block_q, columns, block_kv).swapaxes(1, 2)
    if of_keys:
        blocks = blocks.transpose(1, 0, 3, 2)
    kinds = (blocks.any(axis=(2, 3)).astype(jnp.int32) + blocks.all(axis=(2, 3)).astype(jnp.int32)).reshape(-1)
    masks = blocks.reshape(rows * columns, *blocks.shape[2:]).astype(jnp.int8)
    if not of_keys:
        kinds = jnp.maximum(kinds, BlockKind.PARTIAL)
    fetched = jnp.where(kinds == BlockKind.PARTIAL, jnp.arange(rows * columns, dtype=jnp.int32), 0)
    if not walks:
        return _vendor.MaskInfo(fetched, None, None, kinds, None, masks, None)
    places = np.indices(blocks.shape[:2], np.int32).reshape(2, -1)
    return _vendor.MaskInfo(fetched, *places, kinds, np.array([rows * columns], np.int32), masks, None)


def _walk(places: np.ndarray, kinds: np.ndarray, q_len: int | None) -> _vendor.MaskInfo:
    rows, columns = (narrowest(axis) for axis in places.T)
    count = np.array([len(places)], np.int32)
    return _vendor.MaskInfo(None, rows, columns, kinds.astype(np.int8), count, None, _slots(q_len))


def _slots(q_len: int | None) -> Any:
    return None if q_len is None else np.arange(q_len, dtype=np.int32)
