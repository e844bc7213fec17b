"""Masks evaluated from their definitions: positions and ids in, booleans out.

Shares no code with the `evaluate`, `form` or `Side` of core's masks: only the public fields of masks
and positions are read. Other masks are evaluated.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool

from kernelry import masks
from kernelry.masks import positions
from kernelry.masks.base import Mask
from kernelry.masks.composition import And, At, Not, Or

_Extent: TypeAlias = tuple[int, int, int, int]
"""B, N, T, S."""


def reference_mask(mask: Mask, batch: int, q_heads: int, q_len: int, kv_len: int) -> Bool[np.ndarray, "B N T S"]:
    """Evaluates a mask from its definition: True where the query may see the key.

    Args:
      mask: any mask of `kernelry.masks`, composed and placed in any way, or of a third party.
      batch, q_heads, q_len, kv_len: B, N, T, S. Positions default to 0 … length − 1 on both sides,
        also where T ≠ S.

    Raises:
      NotImplementedError: a class of core's masks, or of positions, that has no definition here.
    """
    extent = (batch, q_heads, q_len, kv_len)
    return np.broadcast_to(_evaluate(mask, np.arange(q_len)[None], np.arange(kv_len)[None], extent), extent)


def _evaluate(mask: Mask, query: np.ndarray, kv: np.ndarray, extent: _Extent) -> np.ndarray:
    """Positions [rows, T] and [rows, S] are known here; a `.at` further in replaces them."""
    match mask:
        case And(parts=parts):
            return np.asarray(np.all(_each(parts, query, kv, extent), axis=0))
        case Or(parts=parts):
            return np.asarray(np.any(_each(parts, query, kv, extent), axis=0))
        case Not(mask=inside):
            return np.asarray(np.logical_not(_evaluate(inside, query, kv, extent)))
        case At(mask=inside, query=query_at, kv=kv_at):
            query = query if query_at is None else _positions(query_at, extent[2])
            kv = kv if kv_at is None else _positions(kv_at, extent[3])
            return _evaluate(inside, query, kv, extent)
    return _atom(mask, query[:, None, :, None], kv[:, None, None, :], extent)


def _each(parts: tuple[Mask, ...], query: np.ndarray, kv: np.ndarray, extent: _Extent) -> np.ndarray:
    """Evaluates the parts of a composite: [parts, B, N, T, S]."""
    return np.stack([np.broadcast_to(_evaluate(part, query, kv, extent), extent) for part in parts])


def _positions(where: positions.Positions, length: int) -> np.ndarray:
    """Returns int64 [rows, length] from the fields of the positions."""
    slots = np.arange(length)
    match where:
        case positions.StaticOffset(value=offset) | positions.TracedOffset(value=offset):
            return np.asarray(offset, np.int64).reshape(-1, 1) + slots
        case positions.StaticOffsets(values=offsets):
            return np.asarray(offsets, np.int64).reshape(-1, 1) + slots
        case positions.StaticPositions(runs=runs):
            rows = [[first + step for first, count in row for step in range(count)] for row in runs]
            return np.asarray(rows, np.int64).reshape(len(runs), length)
        case positions.TracedPositions(value=value):
            return np.atleast_2d(np.asarray(value, np.int64))
    raise NotImplementedError(f"the reference cannot read positions of class {type(where).__name__}.")


def _atom(mask: Mask, p_q: np.ndarray, p_k: np.ndarray, extent: _Extent) -> np.ndarray:
    """The definitions; p_q is [rows, 1, T, 1], p_k is [rows, 1, 1, S]."""
    match mask:
        case masks.Full():
            return np.ones(extent, bool)
        case masks.Causal():
            return p_k <= p_q
        case masks.SlidingWindow(left=left, right=right):
            return (p_q - left <= p_k) & (p_k <= p_q + right)
        case masks.Segments(query_ids=own, kv_ids=other):
            return _same_id(own, other)
        case masks.Lengths(kv_lengths=kv_lengths, query_lengths=query_lengths):
            return _below(kv_lengths, query_lengths, extent)
        case masks.Dense(visible=visible):
            return np.asarray(visible)
        case masks.Chunked(size=size):
            return np.asarray((p_q // size == p_k // size) & (p_k <= p_q))
        case masks.BlockCausal(size=size):
            return p_k // size <= p_q // size
        case masks.PrefixLM(prefix_lengths=prefix):
            return (p_k < np.asarray(prefix, np.int64).reshape(-1, 1, 1, 1)) | (p_k <= p_q)
        case masks.BidirectionalSpans(query_spans=own, kv_spans=other):
            return _same_id(own, other)
        case masks.BlockSelection(keep=keep, block_size=size):
            return _kept(np.asarray(keep), p_k // size, extent)
        case masks.Predicate(fn=fn, operands=operands):
            return np.asarray(fn(p_q, p_k, *(np.asarray(operand) for operand in operands)), bool)
    if mask.kinds:
        raise NotImplementedError(f"the reference has no definition of the mask {type(mask).__name__}.")
    return _of_itself(mask, p_q, p_k, extent)


def _of_itself(mask: Mask, p_q: np.ndarray, p_k: np.ndarray, extent: _Extent) -> np.ndarray:
    """A third party's mask is its own definition, evaluated in NumPy at these positions."""
    query, kv = masks.Side.query(extent[2], np, q_heads=extent[1]), masks.Side.kv(extent[3], np)
    query, kv = (dataclasses.replace(side, positions=at.astype(np.int32)) for side, at in ((query, p_q), (kv, p_k)))
    with jax.ensure_compile_time_eval():
        return np.asarray(mask.evaluate(query, kv))


def _same_id(own: Any, other: Any) -> np.ndarray:
    """Ids [L] or [rows, L] are equal and not negative; `other=None` means the query's own."""
    query = np.atleast_2d(np.asarray(own, np.int64))[:, None, :, None]
    kv = np.atleast_2d(np.asarray(own if other is None else other, np.int64))[:, None, None, :]
    return np.asarray((query == kv) & (query >= 0))


def _below(kv_lengths: Any, query_lengths: Any, extent: _Extent) -> np.ndarray:
    """The slot of the key, and of the query where given, lies below the row's length."""
    seen = np.arange(extent[3]) < np.asarray(kv_lengths, np.int64).reshape(-1, 1, 1, 1)
    if query_lengths is None:
        return seen
    return seen & (np.arange(extent[2])[:, None] < np.asarray(query_lengths, np.int64).reshape(-1, 1, 1, 1))


def _kept(keep: np.ndarray, block: np.ndarray, extent: _Extent) -> np.ndarray:
    """keep[b, head, t, block of the key]; query head n reads head n // (N // heads); False beyond the blocks."""
    batch, q_heads, q_len, kv_len = extent
    heads, blocks = keep.shape[1], keep.shape[3]
    keep = np.broadcast_to(np.repeat(keep, q_heads // heads, axis=1), (batch, q_heads, q_len, blocks))
    visible = np.zeros(extent, bool)
    block = np.broadcast_to(block, (batch, 1, 1, kv_len))
    for b in range(batch):
        for s in range(kv_len):
            at = block[b, 0, 0, s]
            if 0 <= at < blocks:
                visible[b, :, :, s] = keep[b, :, :, at]
    return visible
