"""The masks of the parts of a key/value cache that a layer is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from kernelry.cache.parts import MaskedPart, check_positional, over_earlier_keys
from kernelry.errors import ArgumentError, ShapeError
from kernelry.flax.layout import check_mask, chosen, length_of, placed
from kernelry.flax.tokens import CachedPart, Tokens
from kernelry.masks import Mask, Segments
from kernelry.masks.composition import is_positional
from kernelry.request.arguments import as_array

_ACTIVE = 1
"""The segment id of a query that names none, as in MaxText's decoding."""


def masked_parts(
    query: jax.Array, cached: tuple[CachedPart, ...], own: CachedPart | None, *, base: Mask, tokens: Tokens, bias: Any
) -> list[MaskedPart]:
    """Composes the mask of every part.

    Args:
      query: [B, T, N, H].
      cached: disjoint parts of the keys.
      own: the key and value of the query's own tokens if they are not cached yet; the last part.
      base: the mask of the layer or of the call.
      tokens: what is known of the query's tokens.
      bias: broadcastable to [B, N, T, slots of all parts], or None.

    Raises:
      ArgumentError: parts do not support something in the tokens or the mask.
      ShapeError: an array does not fit.
    """
    check_mask(base)
    _check_tokens(tokens, cached)
    check_positional(
        base,
        placed="with cached= each part does: positions=",
        slots="and cached= holds several: pass segment_ids of each CachedPart, or an indexer over the slots of all "
        "parts",
    )
    parts = cached if own is None else (*cached, own)
    lengths = tuple(length_of("cached key", part.key) for part in parts)
    q_len = as_array("query", query, 4).shape[1]
    if own is not None and lengths[-1] != q_len:
        raise ShapeError(
            f"with cached= key and value are those of the query's own tokens, T={q_len} of them, got {lengths[-1]}: "
            "pass other keys as one more CachedPart."
        )
    found = []
    indexers, biases = _split("indexer", tokens.indexer, lengths), _split("bias", bias, lengths)
    for number, (part, indexer, logits) in enumerate(zip(parts, indexers, biases, strict=True)):
        mask = _own_mask(base, tokens) if part is own else _cached_mask(base, tokens, part, number, q_len)
        mask = mask if indexer is None else mask & chosen(indexer)
        found.append(MaskedPart(part.key, part.value, mask, logits))
    return found


def _own_mask(base: Mask, tokens: Tokens) -> Mask:
    """The mask of the query's own tokens: keys and queries have the same positions."""
    if tokens.positions is not None:
        mask = base.at(query_positions=tokens.positions, kv_positions=tokens.positions)
    else:
        mask = base.at(query_offset=tokens.query_offset, kv_offset=tokens.query_offset)
    return mask if tokens.segment_ids is None else mask & Segments(tokens.segment_ids)


def _cached_mask(base: Mask, tokens: Tokens, part: CachedPart, number: int, q_len: int) -> Mask:
    mask = _earlier(base, tokens, part, number, q_len)
    if part.segment_ids is None:
        return mask
    ids = np.full(q_len, _ACTIVE, np.int32) if tokens.segment_ids is None else tokens.segment_ids
    return mask & Segments(ids, part.segment_ids)


def _earlier(base: Mask, tokens: Tokens, part: CachedPart, number: int, q_len: int) -> Mask:
    if part.positions is None:
        base = over_earlier_keys(base)
    if not is_positional(base):
        return base
    if part.positions is None:
        raise ArgumentError(
            f"the mask {base!r} compares positions, and cached part {number} has no positions: pass "
            "CachedPart(positions=…), and query_offset= or positions= in Tokens."
        )
    if not tokens.is_located:
        raise ArgumentError(
            f"cached part {number} has positions, but the query's are unknown: pass "
            "Tokens(query_offset=…) or Tokens(positions=…)."
        )
    return placed(base, dataclasses.replace(tokens, kv_positions=part.positions), q_len, part.key.shape[1])


def _split(name: str, array: Any, lengths: tuple[int, ...]) -> Iterator[Any]:
    """Splits the last dimension between the parts; if it is 1, a bias is the same for all keys."""
    if array is None or (name == "bias" and np.shape(array)[-1:] == (1,)):
        return iter([array] * len(lengths))
    ends = np.cumsum(lengths).tolist()
    if np.shape(array)[-1:] != (ends[-1],):
        raise ShapeError(
            f"{name} must have one entry for each of the {'+'.join(map(str, lengths))}={ends[-1]} slots of all parts, "
            f"got shape {np.shape(array)}."
        )
    return (array[..., end - length : end] for end, length in zip(ends, lengths, strict=True))


def _check_tokens(tokens: Tokens, cached: tuple[CachedPart, ...]) -> None:
    if tokens.kv_positions is not None:
        raise ArgumentError("kv_positions with cached=: each part has positions of its own, CachedPart(positions=…).")
    if tokens.bidirectional is not None:
        raise ArgumentError(
            "bidirectional with cached= would need flags for every part: concatenate the parts, pass them as key and "
            "value, and pass query_offset=."
        )
    for number, part in enumerate(cached):
        if not isinstance(part, CachedPart):
            raise ArgumentError(f"cached must hold CachedParts, got {type(part).__name__}.")
        if tokens.segment_ids is not None and part.segment_ids is None:
            raise ArgumentError(
                f"the query has segment_ids, but cached part {number} has none: pass CachedPart(segment_ids=…)."
            )
