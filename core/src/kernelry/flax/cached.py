"""Attention to the parts of a key/value cache, merged by their statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, final

import jax
import numpy as np

from kernelry.errors import ArgumentError, ShapeError
from kernelry.execution.normalization import merge
from kernelry.flax.layout import check_mask, chosen, length_of, placed
from kernelry.flax.tokens import CachedPart, Tokens
from kernelry.kernel.partial import Partial
from kernelry.masks import Causal, Full, Mask, Segments
from kernelry.masks.composition import At, children, is_positional
from kernelry.request.operands import as_array

_ACTIVE = 1
"""The segment id of a query that names none, as in MaxText's decoding."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Cache:
    """Disjoint parts of the keys.

    Args:
      parts: what is cached.
      own: the key and value of the query's own tokens, where they are not cached yet.
    """

    parts: tuple[CachedPart, ...]
    own: CachedPart | None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The slots of each part; the own part is the last."""
        return tuple(length_of("cached key", part.key) for part in self.all_parts)

    @property
    def all_parts(self) -> tuple[CachedPart, ...]:
        """The parts in the order in which the slots of a bias or an indexer run."""
        return self.parts if self.own is None else (*self.parts, self.own)


def attend_to_cache(
    call: Callable[..., Partial], query: jax.Array, cache: Cache, *, base: Mask, tokens: Tokens, bias: Any
) -> Partial:
    """Attends to every part and merges.

    Args:
      call: attention to one part; it takes the part's place, query, the part, mask and bias.
      query: [B, T, N, H].
      cache: the keys and values.
      base: the mask of the layer or of the call.
      tokens: what the call knows of the query's tokens.
      bias: broadcastable to [B, N, T, slots of all parts], or None.

    Raises:
      ArgumentError: the tokens or the mask say something that parts cannot honour.
      ShapeError: an array does not fit.
    """
    check_mask(base)
    _check_tokens(tokens, cache)
    _check_base(base)
    q_len, lengths = as_array("query", query, 4).shape[1], cache.lengths
    if cache.own is not None and lengths[-1] != q_len:
        raise ShapeError(
            f"beside cached= key and value are those of the query's own tokens, T={q_len} of them, got {lengths[-1]}: "
            "pass other keys as one more CachedPart."
        )
    partials = []
    for place, (part, indexer, logits) in enumerate(
        zip(cache.all_parts, _split("indexer", tokens.indexer, lengths), _split("bias", bias, lengths), strict=True)
    ):
        mask = _own_mask(base, tokens) if part is cache.own else _cached_mask(base, tokens, part, place, q_len)
        mask = mask if indexer is None else mask & chosen(indexer)
        partials.append(call(place, query, part, mask=mask, bias=logits))
    return merge(partials)


def _own_mask(base: Mask, tokens: Tokens) -> Mask:
    """The keys stand where the queries stand."""
    if tokens.positions is not None:
        mask = base.at(query_positions=tokens.positions, kv_positions=tokens.positions)
    else:
        mask = base.at(query_offset=tokens.query_offset, kv_offset=tokens.query_offset)
    return mask if tokens.segment_ids is None else mask & Segments(tokens.segment_ids)


def _cached_mask(base: Mask, tokens: Tokens, part: CachedPart, place: int, q_len: int) -> Mask:
    mask = _earlier(base, tokens, part, place, q_len)
    if part.segment_ids is None:
        return mask
    ids = np.full(q_len, _ACTIVE, np.int32) if tokens.segment_ids is None else tokens.segment_ids
    return mask & Segments(ids, part.segment_ids)


def _earlier(base: Mask, tokens: Tokens, part: CachedPart, place: int, q_len: int) -> Mask:
    if not is_positional(base):
        return base
    if part.positions is None and isinstance(base, Causal):
        return Full()  # everything in a cache is earlier than the query
    if part.positions is None:
        raise ArgumentError(
            f"the mask {base!r} compares positions, and cached part {place} does not say where its keys stand: pass "
            "CachedPart(positions=…), and query_offset= or positions= in Tokens."
        )
    if not tokens.is_located:
        raise ArgumentError(
            f"cached part {place} says where its keys stand, but nothing says where the query does: pass "
            "Tokens(query_offset=…) or Tokens(positions=…)."
        )
    return placed(base, dataclasses.replace(tokens, kv_positions=part.positions), q_len, part.key.shape[1])


def _split(name: str, array: Any, lengths: tuple[int, ...]) -> Iterator[Any]:
    """Splits the last dimension at the parts; where it is 1, a bias is the same for all keys."""
    if array is None or (name == "bias" and np.shape(array)[-1:] == (1,)):
        return iter([array] * len(lengths))
    ends = np.cumsum(lengths).tolist()
    if np.shape(array)[-1:] != (ends[-1],):
        raise ShapeError(
            f"{name} must have one entry for each of the {'+'.join(map(str, lengths))}={ends[-1]} slots of all parts, "
            f"got shape {np.shape(array)}."
        )
    return (array[..., end - length : end] for end, length in zip(ends, lengths, strict=True))


def _check_tokens(tokens: Tokens, cache: Cache) -> None:
    if tokens.kv_positions is not None:
        raise ArgumentError("kv_positions with cached=: each part says where its keys stand, CachedPart(positions=…).")
    if tokens.bidirectional is not None:
        raise ArgumentError(
            "bidirectional with cached= would need flags of every part: concatenate the parts, pass them as key and "
            "value, and query_offset=."
        )
    for place, part in enumerate(cache.parts):
        if not isinstance(part, CachedPart):
            raise ArgumentError(f"cached must hold CachedParts, got {type(part).__name__}.")
        if tokens.segment_ids is not None and part.segment_ids is None:
            raise ArgumentError(
                f"the query has segment_ids, but cached part {place} has none: pass CachedPart(segment_ids=…)."
            )


def _check_base(mask: Mask) -> None:
    """Refuses what belongs to the slots of one array of keys, of which a cache has several."""
    if isinstance(mask, At) and mask.kv is not None:
        raise ArgumentError(f"mask={mask!r} says where keys stand; with cached= each part does: positions=.")
    inside = children(mask)
    for part in inside:
        _check_base(part)
    if not inside and not mask.positional and not isinstance(mask, Full):
        raise ArgumentError(
            f"mask={mask!r} is about the slots of one array of keys, and cached= holds several: pass segment_ids of "
            "each CachedPart, or an indexer over the slots of all parts."
        )
