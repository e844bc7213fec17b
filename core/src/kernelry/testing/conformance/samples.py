"""Masks of every kind of atom, drawn so that a kernel that misreads one is wrong by much.

Batch rows differ, windows reach further left than right, ids hold 0 and −1, and no block size divides the length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias, final

import jax.numpy as jnp
import numpy as np

from kernelry import masks
from kernelry._pytree import pytree
from kernelry.masks import Atom, AtomKind, Mask, PositionKind, Side
from kernelry.testing.conformance.calls import AttentionCall

Alternatives: TypeAlias = tuple[Mask, ...]
"""Of these the first that a kernel takes is tried."""

_RNG_SEED = 5
_FAR = 2**24 + 1
"""A position that float32 rounds."""


def samples(kind: AtomKind, call: AttentionCall) -> Mapping[str, Alternatives]:
    """Masks of one kind for a call of T queries and S keys, by name; the first says most."""
    draw = _DRAWERS.get(kind)
    return draw(call) if draw is not None else {}


def ids(length: int, first: int = 0) -> np.ndarray:
    """Ids [2, length]: runs of 5 from 0 on, with −1 between; the rows differ."""
    slots = np.arange(length) + first
    plain = np.where(slots % 6 == 4, -1, slots // 5)
    other = np.where(slots % 7 == 0, -1, slots // 3 % 4)
    return np.stack([plain, other]).astype(np.int32)


def large_ids(length: int) -> np.ndarray:
    """Ids [2, length] of which two are equal in 8, in 16 bits and in float32; the rows differ."""
    row = np.array([1, 257, 65537, _FAR - 1, _FAR])[np.arange(length) % 5]
    return np.stack([row, np.roll(row, 1)]).astype(np.int32)


def every_other(query: Any, kv: Any) -> Any:
    """Keys at an even distance."""
    return (query - kv) % 2 == 0


def near(query: Any, kv: Any, reach: Any) -> Any:
    """Keys within a distance that an array says."""
    return abs(query - kv) <= reach


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Strided(Mask):
    """A third party's mask without arrays, a predicate in all but name: keys whole steps away."""

    step: int

    word: ClassVar[str] = "kernelry.testing.strided"
    positional: ClassVar[bool] = True

    def evaluate(self, query: Side, kv: Side) -> Any:
        return (query.positions - kv.positions) % self.step == 0

    @classmethod
    def sees_itself(cls, atom: Atom) -> bool:
        return True


@final
@pytree("reach")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Near(Mask):
    """A third party's mask with an array: keys within a distance, integers [B], that is at least 0."""

    reach: Any

    word: ClassVar[str] = "kernelry.testing.near"
    positional: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, str]] = {"reach": "B"}

    def evaluate(self, query: Side, kv: Side) -> Any:
        return near(query.positions, kv.positions, self.reach.reshape(-1, 1, 1, 1))

    @classmethod
    def sees_itself(cls, atom: Atom) -> bool:
        return True


def _lengths(call: AttentionCall) -> Mapping[str, Alternatives]:
    kv = np.array([call.kv_len - 3, call.kv_len // 2], np.int32).clip(1)
    query = np.array([call.q_len // 2 + 1, call.q_len], np.int32).clip(1)
    return {"lengths": (masks.Lengths(kv),), "lengths of both sides": (masks.Lengths(kv, query),)}


def _segments(call: AttentionCall) -> Mapping[str, Alternatives]:
    own = ids(call.q_len)
    return {
        "segments": (masks.Segments(own),),
        "segments of one row": (masks.Segments(own[0]),),
        "segments of large ids": (masks.Segments(large_ids(call.q_len)),),
    }


def _segments_separate(call: AttentionCall) -> Mapping[str, Alternatives]:
    return {
        "segments of two sides": (masks.Segments(ids(call.q_len), ids(call.kv_len, 2)),),
        "large ids of two sides' segments": (masks.Segments(large_ids(call.q_len), large_ids(call.kv_len)[::-1]),),
    }


def _spans(call: AttentionCall) -> Mapping[str, Alternatives]:
    return {
        "spans": (masks.BidirectionalSpans(ids(call.q_len)),),
        "spans of large ids": (masks.BidirectionalSpans(large_ids(call.q_len)),),
    }


def _spans_separate(call: AttentionCall) -> Mapping[str, Alternatives]:
    return {"spans of two sides": (masks.BidirectionalSpans(ids(call.q_len), ids(call.kv_len, 2)),)}


def _dense(call: AttentionCall) -> Mapping[str, Alternatives]:
    rng = np.random.default_rng(_RNG_SEED)
    full = rng.random(call.pairs) < 0.4
    return {"dense": (masks.Dense(full),), "dense for all heads": (masks.Dense(full[:, :1]),)}


def _selection(call: AttentionCall) -> Mapping[str, Alternatives]:
    rng = np.random.default_rng(_RNG_SEED)
    keep = rng.random((call.batch, call.q_heads, call.q_len, -(-call.kv_len // 3))) < 0.5
    groups = masks.BlockSelection(keep[:, : call.kv_heads], 3)
    return {"block selection": (groups,), "block selection by query head": (masks.BlockSelection(keep, 3),)}


def _predicate(call: AttentionCall) -> Mapping[str, Alternatives]:
    reach = np.array([4, 2], np.int32).reshape(2, 1, 1, 1)
    return {
        "predicate": (masks.Predicate(near, reach),),
        "predicate without arrays": (masks.Predicate(every_other),),
        "custom mask without arrays": (Strided(3),),
    }


def _custom(call: AttentionCall) -> Mapping[str, Alternatives]:
    return {"custom": (Near(np.array([4, 2], np.int32)),), "custom without arrays": (Strided(3),)}


def _any_of(call: AttentionCall) -> Mapping[str, Alternatives]:
    own = ids(call.q_len)
    packed = masks.Causal() & masks.Segments(own)
    either = (
        packed | masks.BidirectionalSpans(own[::-1].copy()),
        packed | masks.Lengths(np.array([3, 5], np.int32)),
        masks.Chunked(5) | masks.SlidingWindow(1, 2),
        masks.SlidingWindow(0, 0) | ~masks.SlidingWindow(3, 3),
    )
    return {"or": either}


def _not(call: AttentionCall) -> Mapping[str, Alternatives]:
    own = masks.Segments(ids(call.q_len))
    return {"not": (~masks.SlidingWindow(2, 1), ~own, ~masks.Chunked(5)), "not segments": (~own,)}


_DRAWERS: Mapping[AtomKind, Callable[[AttentionCall], Mapping[str, Alternatives]]] = {
    AtomKind.CAUSAL: lambda _: {"causal": (masks.Causal(),)},
    AtomKind.WINDOW: lambda _: {
        "window": (masks.SlidingWindow(5, 2), masks.SlidingWindow(5, 0), masks.SlidingWindow(0, 5)),
        "window to the left": (masks.SlidingWindow(3, 0),),
    },
    AtomKind.SEGMENTS: _segments,
    AtomKind.SEGMENTS_SEPARATE: _segments_separate,
    AtomKind.LENGTHS: _lengths,
    AtomKind.SPANS: _spans,
    AtomKind.SPANS_SEPARATE: _spans_separate,
    AtomKind.CHUNKED: lambda _: {"chunked": (masks.Chunked(5),)},
    AtomKind.BLOCK_CAUSAL: lambda _: {"block causal": (masks.BlockCausal(5),)},
    AtomKind.PREFIX_LM: lambda _: {"prefix": (masks.PrefixLM(np.array([6, 2], np.int32)),)},
    AtomKind.BLOCK_SELECTION: _selection,
    AtomKind.PREDICATE: _predicate,
    AtomKind.DENSE: _dense,
    AtomKind.ANY_OF: _any_of,
    AtomKind.NOT: _not,
    AtomKind.CUSTOM: _custom,
}


def wide(kind: AtomKind, tile: int) -> Mapping[str, Alternatives]:
    """Masks that reach beyond one tile of a kernel, by name."""
    size = tile * 3 // 4 + 1
    drawn: Mapping[AtomKind, Mapping[str, Alternatives]] = {
        AtomKind.WINDOW: {"wide window": tuple(masks.SlidingWindow(tile + 3, right) for right in (2, 0))},
        AtomKind.CHUNKED: {"wide chunks": (masks.Chunked(size),)},
        AtomKind.BLOCK_CAUSAL: {"wide blocks": (masks.BlockCausal(size),)},
        AtomKind.PREFIX_LM: {"long prefix": (masks.PrefixLM(np.array([tile + 13, tile // 2 + 1], np.int32)),)},
    }
    return drawn.get(kind, {})


def positional(call: AttentionCall) -> Mapping[str, Mask]:
    """One mask of each kind that positions move, by name."""
    kinds = (
        AtomKind.CAUSAL,
        AtomKind.WINDOW,
        AtomKind.CHUNKED,
        AtomKind.BLOCK_CAUSAL,
        AtomKind.PREFIX_LM,
        AtomKind.PREDICATE,
    )
    found = (next(iter(samples(kind, call).items())) for kind in kinds)
    return {name: alternatives[0] for name, alternatives in found}


def placed(kind: PositionKind, mask: Mask, call: AttentionCall) -> Iterator[tuple[str, Alternatives]]:
    """A mask at positions of one kind, by name: neither side's may be ignored, and rows differ where they can.

    Queries stand 3 slots ahead where a kernel needs every row to see a key, and else 3 behind.
    """
    one_row, of_keys = (np.random.default_rng(_RNG_SEED).permutation(n) for n in (call.q_len, call.kv_len))
    rows, rows_of_keys = (np.stack([row, np.roll(row, 3)]) for row in (one_row, of_keys))
    match kind:
        case PositionKind.OFFSET:
            yield "offsets", (mask.at(query_offset=4, kv_offset=1), mask.at(query_offset=3))
            yield "a query offset", (mask.at(query_offset=3), mask.at(query_offset=-3))
            yield "queries behind", (mask.at(query_offset=1, kv_offset=4),)
            yield "the same offset", (mask.at(query_offset=3, kv_offset=3),)
            yield "offsets below 0", (mask.at(query_offset=-7, kv_offset=-7),)
            yield "offsets far out", (mask.at(query_offset=_FAR + 3, kv_offset=_FAR),)
        case PositionKind.STATIC:
            yield "offsets by row", (mask.at(query_offset=np.array([3, 1])),)
            yield "static positions", (mask.at(query_positions=rows, kv_positions=of_keys),)
            shifted = (np.arange(call.q_len) + 3, np.arange(call.kv_len) + 3)
            yield "shifted positions", (mask.at(query_positions=shifted[0], kv_positions=shifted[1]),)
        case PositionKind.TRACED:
            yield "traced offsets", (mask.at(query_offset=jnp.array([3, -2]), kv_offset=jnp.int32(1)),)
            traced = {"query_positions": jnp.asarray(rows), "kv_positions": jnp.asarray(rows_of_keys[::-1].copy())}
            yield "traced positions", (mask.at(**traced),)
            yield "the same traced offset", (mask.at(query_offset=jnp.int32(3), kv_offset=jnp.int32(3)),)


def emptying(call: AttentionCall) -> Mapping[str, Alternatives]:
    """Masks under which some rows see nothing and some slots are seen by no row, by name."""
    behind = {"query_offset": -3}
    slots = np.arange(call.kv_len)
    seen = np.random.default_rng(_RNG_SEED).random(call.pairs) < 0.5
    seen[:, :, :, 4] = seen[1, :, :, 5] = seen[:, :2, :, 6] = seen[0, :, 2:3] = seen[:, 3, 0] = False
    lengths = masks.Lengths(
        np.array([call.kv_len - 3, 0], np.int32), np.array([max(call.q_len - 2, 0), call.q_len], np.int32)
    )
    return {
        "causal": (masks.Causal().at(**behind),),
        "window": (masks.SlidingWindow(2, 1).at(query_offset=-5), masks.SlidingWindow(2, 0).at(query_offset=-5)),
        "segments": (masks.Segments(ids(call.q_len)),),
        "causal segments": (masks.Causal() & masks.Segments(ids(call.q_len)),),
        "segments of two sides": (masks.Segments(ids(call.q_len), ids(call.kv_len) + 1),),
        "lengths": (lengths,),
        "spans": (masks.BidirectionalSpans(ids(call.q_len)),),
        "dense": (masks.Dense(seen),),
        "chunked": (masks.Chunked(5).at(kv_positions=slots + 7),),
        "block selection": (masks.BlockSelection(seen[:, : call.kv_heads, :, : -(-call.kv_len // 3)], 3),),
        "predicate": (masks.Predicate(near, np.int32(2)).at(kv_positions=slots + 5),),
        "or": (masks.Segments(ids(call.q_len)) | masks.Lengths(np.array([0, 2]), np.array([0, 3])),),
    }


def rows_of(mask: Mask, call: AttentionCall) -> Mask:
    """The mask itself where lengths are equal, else with the queries at the end of the keys."""
    return mask if call.q_len == call.kv_len else mask.at(query_offset=max(call.kv_len - call.q_len, 0))
