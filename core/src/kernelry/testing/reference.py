"""Attention in NumPy float64, written from the design's section 3 and nothing else.

Masks are evaluated from their definitions here, one (query, key) pair of positions at a time in
effect, sharing no code with the masks' own `evaluate`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from kernelry import masks
from kernelry.masks.base import And, At, Mask, Not, Or


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """The float64 result: out [B, T, N, D], lse [B, N, T], max_logits [B, N]."""

    out: NDArray[Any]
    lse: NDArray[Any]
    max_logits: NDArray[Any]


def reference_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Mask,
    scale: float | None = None,
    bias: Any = None,
    soft_cap: float | None = None,
    sinks: Any = None,
) -> Reference:
    """Computes attention in float64.

    Args:
      query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, D].
      mask, scale, bias, soft_cap, sinks: as in `kernelry.attention`.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (query, key, value))
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, groups = k.shape[1], q_heads // k.shape[2]
    visible = np.broadcast_to(reference_mask(mask, batch, q_heads, q_len, kv_len), (batch, q_heads, q_len, kv_len))
    q, k, v = _without_hidden(q, k, v, visible, groups)
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", q, k) * (head_dim**-0.5 if scale is None else scale)
    logits = logits if bias is None else logits + np.asarray(bias, np.float64)
    logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
    logits = np.where(visible, logits, -np.inf)
    top = logits.max(axis=-1, initial=-np.inf)
    weights = np.exp(logits - np.where(np.isneginf(top), 0, top)[..., None])
    total = weights.sum(axis=-1)
    empty = ~visible.any(axis=-1)
    with np.errstate(divide="ignore"):
        lse = np.where(empty, -np.inf, np.where(empty, 0, top) + np.log(np.where(empty, 1, total)))
    probabilities = weights / np.where(empty, 1, total)[..., None]
    if sinks is not None:
        sink = np.asarray(sinks, np.float64)[None, :, None]
        probabilities = probabilities * np.where(empty, 0, 1 / (1 + np.exp(np.minimum(sink - lse, 700))))[..., None]
    out = np.einsum("bnts,bsnd->btnd", probabilities, v)
    return Reference(out, lse, top.max(axis=-1, initial=-np.inf))


def _without_hidden(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], visible: NDArray[Any], groups: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A slot that no row sees takes no part, whatever it holds."""
    by_group = np.any(visible, axis=2).reshape(k.shape[0], k.shape[2], groups, k.shape[1])
    seen = np.any(by_group, axis=2)
    seen = np.moveaxis(seen, 1, 2)[..., None]
    sees = np.moveaxis(np.any(visible, axis=3), 1, 2)[..., None]
    return np.where(sees, q, 0), np.where(seen, k, 0), np.where(seen, v, 0)


def reference_mask(mask: Mask, batch: int, q_heads: int, q_len: int, kv_len: int) -> NDArray[Any]:
    """Evaluates a mask from its definition: booleans [B, N, T, S]."""
    sides = np.arange(q_len)[None, :], np.arange(kv_len)[None, :]
    full = (batch, q_heads, q_len, kv_len)
    return np.broadcast_to(_evaluate(mask, *sides, full), full)


def _evaluate(mask: Mask, query: NDArray[Any], kv: NDArray[Any], full: tuple[int, int, int, int]) -> Any:
    """Positions [rows, T] and [rows, S] are known here; an inner `.at` replaces them."""
    match mask:
        case And(parts=parts):
            return np.logical_and.reduce([np.broadcast_to(_evaluate(p, query, kv, full), full) for p in parts])
        case Or(parts=parts):
            return np.logical_or.reduce([np.broadcast_to(_evaluate(p, query, kv, full), full) for p in parts])
        case Not(mask=inside):
            return np.logical_not(_evaluate(inside, query, kv, full))
        case At(mask=inside, query=query_at, kv=kv_at):
            query = query if query_at is None else _positions(query_at, full[2])
            kv = kv if kv_at is None else _positions(kv_at, full[3])
            return _evaluate(inside, query, kv, full)
    return _atom(mask, query[:, None, :, None], kv[:, None, None, :], full)


def _positions(where: Any, length: int) -> NDArray[Any]:
    form = where.form
    if form.kind is masks.PositionKind.TRACED:
        value = np.asarray(where.value)
        is_offset = "Offset" in type(where).__name__
        return np.atleast_1d(value)[:, None] + np.arange(length) if is_offset else np.atleast_2d(value)
    positions = form.positions(length)
    assert positions is not None
    return np.asarray(positions)


def _atom(mask: Mask, p_q: NDArray[Any], p_k: NDArray[Any], full: tuple[int, int, int, int]) -> Any:
    slots_q, slots_k = np.arange(full[2])[None, None, :, None], np.arange(full[3])[None, None, None, :]
    match mask:
        case masks.Full():
            return np.ones(full, bool)
        case masks.Causal():
            return p_k <= p_q
        case masks.SlidingWindow(left=left, right=right):
            return (p_q - left <= p_k) & (p_k <= p_q + right)
        case masks.Segments(query_ids=query_ids, kv_ids=kv_ids):
            own = np.atleast_2d(np.asarray(query_ids))
            other = own if kv_ids is None else np.atleast_2d(np.asarray(kv_ids))
            own, other = own[:, None, :, None], other[:, None, None, :]
            return (own == other) & (own >= 0) & (other >= 0)
        case masks.Lengths(kv_lengths=kv_lengths, query_lengths=query_lengths):
            visible = slots_k < np.asarray(kv_lengths)[:, None, None, None]
            if query_lengths is None:
                return visible
            return visible & (slots_q < np.asarray(query_lengths)[:, None, None, None])
        case masks.Dense(visible=visible):
            return np.asarray(visible)
    raise NotImplementedError(f"the reference has no definition of {type(mask).__name__}")
