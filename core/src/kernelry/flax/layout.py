"""Composes the mask of a call from the layer's mask, its tokens and MoBA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.config.layer import MoBA
from kernelry.errors import ArgumentError, ShapeError
from kernelry.flax.tokens import Tokens
from kernelry.masks import BidirectionalSpans, Dense, Mask, Segments
from kernelry.masks.base import Extent, is_mask
from kernelry.masks.fit import as_mask, not_a_mask
from kernelry.moba import select_blocks
from kernelry.request.arguments import as_array, as_keys


def mask_of(base: Any, tokens: Tokens, query: jax.Array, key: jax.Array, moba: MoBA | None) -> Mask:
    """Composes ((base & segments) | bidirectional spans) & indexer & MoBA's blocks.

    Args:
      base: the mask of the layer or of the call, or booleans as `kernelry.attention` takes them; it
        gets the positions of the tokens unless it has positions of its own.
      tokens: what is known of the tokens.
      query: [B, T, N, H].
      key: [B, S, K, H].
      moba: the choice of blocks, or None.

    Raises:
      ArgumentError: MoBA with keys whose positions are not their slots.
      ShapeError: an array does not fit, or T ≠ S without `query_offset`.
    """
    batch, q_len, q_heads, _ = as_array("query", query, 4).shape
    _, kv_len, kv_heads, _ = as_keys("key", key).shape
    extent = Extent(batch=batch, q_heads=q_heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len)
    mask = placed(as_mask(base, extent), tokens, q_len, kv_len)
    if tokens.segment_ids is not None:
        mask = mask & _segments(tokens, q_len, kv_len)
    if tokens.bidirectional is not None:
        mask = mask | _spans(tokens, q_len, kv_len)
    if tokens.indexer is not None:
        mask = mask & chosen(tokens.indexer)
    return mask if moba is None else mask & _blocks(tokens, query, key, moba)


def check_mask(mask: Any) -> None:
    """Raises ShapeError for anything but a mask, e.g. an array."""
    if not is_mask(mask):
        raise ShapeError(f"mask must be a kernelry mask, got {not_a_mask(mask)}.")


def placed(base: Mask, tokens: Tokens, q_len: int, kv_len: int) -> Mask:
    """Gives a mask the positions of the tokens; the innermost `.at` wins."""
    kv = tokens.kv_positions
    if tokens.positions is not None:
        same = kv is None and q_len == kv_len
        return base.at(query_positions=tokens.positions, kv_positions=tokens.positions if same else kv)
    return base.at(query_offset=tokens.query_offset, kv_positions=kv)


def chosen(indexer: Any) -> Dense:
    """The mask of an indexer [B, T, S] or [B, 1, T, S]."""
    return Dense(indexer[:, None] if indexer.ndim == 3 else indexer)


def length_of(name: str, array: Any) -> int:
    """T or S of an array [B, length, heads, depth]."""
    if np.ndim(array) != 4:
        raise ShapeError(f"{name} must be [B, length, heads, depth], got shape {np.shape(array)}.")
    return int(np.shape(array)[1])


def _per_key(name: str, values: Any, kv_len: int) -> Any:
    shape = np.shape(values)
    if len(shape) not in (1, 2) or shape[-1] != kv_len:
        raise ShapeError(f"{name} must be [B, S] or [S] with S={kv_len}, one per key, got shape {shape}.")
    return values if isinstance(values, jax.Array) else np.asarray(values)


def _segments(tokens: Tokens, q_len: int, kv_len: int) -> Mask:
    return Segments(*_both_sides(_per_key("segment_ids", tokens.segment_ids, kv_len), tokens, q_len, kv_len))


def _spans(tokens: Tokens, q_len: int, kv_len: int) -> Mask:
    # Numbered on the keys' side: a span may begin before the queries do.
    spans = BidirectionalSpans.from_flags(_per_key("bidirectional", tokens.bidirectional, kv_len))
    return BidirectionalSpans(*_both_sides(spans.query_spans, tokens, q_len, kv_len))


def _both_sides(ids: Any, tokens: Tokens, q_len: int, kv_len: int) -> tuple[Any, Any]:
    """The ids of the queries and of the keys, from those of the keys; None for the keys if they are the same."""
    offset, apart = tokens.query_offset, tokens.kv_positions is not None
    if isinstance(offset, int) and not apart and not 0 <= offset <= kv_len - q_len:
        raise ShapeError(
            f"query_offset={offset} with T={q_len} puts queries outside the S={kv_len} keys that have segment_ids or "
            "bidirectional: pass masks.Segments(query_ids, kv_ids) in mask= instead."
        )
    if q_len == kv_len:
        return ids, None
    if offset is None or apart:
        raise ShapeError(
            f"segment_ids and bidirectional are one per key, and with T={q_len} and S={kv_len} those of the "
            "queries are unknown: pass query_offset=, the slot of the first query among the keys, and no kv_positions, "
            "or masks.Segments(query_ids, kv_ids) in mask= instead."
        )
    return (
        ids[..., offset : offset + q_len] if isinstance(offset, int) else _taken(ids, slots_from(offset, q_len))
    ), ids


def _taken(ids: Any, slots: Any) -> jax.Array:
    """Takes ids [S] or [B, S] at slots [T] or [B, T]; a slot beyond the keys has the id −1."""
    ids, slots = jnp.atleast_2d(ids), jnp.atleast_2d(slots)
    rows, kv_len = max(ids.shape[0], slots.shape[0]), ids.shape[1]
    slots = jnp.broadcast_to(slots, (rows, slots.shape[1]))
    found = jnp.take_along_axis(jnp.broadcast_to(ids, (rows, kv_len)), slots, axis=1, mode="clip")
    return jnp.where((slots >= 0) & (slots < kv_len), found, -1)


def slots_from(offset: Any, length: int) -> Any:
    """The slots offset … offset + length − 1: [length], or [B, length] from offsets [B]."""
    xp: Any = jnp if isinstance(offset, jax.Array) else np
    offset, steps = xp.asarray(offset), xp.arange(length, dtype=np.int32)
    return offset + steps if offset.ndim == 0 else offset[:, None] + steps[None]


def _blocks(tokens: Tokens, query: jax.Array, key: jax.Array, moba: MoBA) -> Mask:
    q_len, kv_len = query.shape[1], key.shape[1]
    if tokens.kv_positions is not None or (tokens.positions is not None and q_len == kv_len):
        raise ArgumentError(
            "moba averages blocks of consecutive keys, so key s must have position s: pass the keys in order, and "
            "leave positions and kv_positions out (query_offset places fewer queries than keys)."
        )
    return select_blocks(
        query,
        key,
        chunk_size=moba.chunk_size,
        top_k=moba.top_k,
        query_positions=_query_positions(tokens, q_len, kv_len),
    )


def _query_positions(tokens: Tokens, q_len: int, kv_len: int) -> Any:
    if tokens.positions is not None:
        return tokens.positions
    if tokens.query_offset is not None:
        return slots_from(tokens.query_offset, q_len)
    if q_len != kv_len:
        raise ShapeError(
            f"moba needs the queries' positions, and T={q_len} ≠ S={kv_len}: pass query_offset=, e.g. "
            f"{max(kv_len - q_len, 0)}."
        )
    return np.arange(q_len)
