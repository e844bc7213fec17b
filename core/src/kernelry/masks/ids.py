"""Masks that compare ids of array slots: Segments and BidirectionalSpans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.masks.arrays import (
    as_array,
    as_integers,
    check_rows,
    described_pair,
    filled,
    module_of,
    read_booleans,
    read_slots,
    signed,
)
from kernelry.masks.base import Extent, Mask, Placeholder
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.run_time import BlockGrid, Decided, tiles
from kernelry.masks.side import ArrayLike, Side

if TYPE_CHECKING:
    from kernelry.masks.composition import Conjunct
    from kernelry.masks.padding import Padding


@final
@pytree("query_ids", "kv_ids")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Segments(Mask):
    """A query sees the keys of its own segment: ids equal and not negative.

    0 is an ordinary id; a negative id attends to nothing and is attended by nothing.
    `Segments([0, 0, 1, 1])`:

        1 1 . .
        1 1 . .
        . . 1 1
        . . 1 1

    Args:
      query_ids: integers [B, T] or [T].
      kv_ids: integers [B, S] or [S]; None means the query's own.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash; the form is the key

    query_ids: ArrayLike
    kv_ids: ArrayLike | None = None

    word: ClassVar[str] = "segments"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.SEGMENTS, AtomKind.SEGMENTS_SEPARATE)
    axes: ClassVar[Mapping[str, str]] = {"query_ids": "BT", "kv_ids": "BS"}
    placeholders: ClassVar[Mapping[str, Placeholder]] = {
        "segments": Placeholder(lambda at: Segments(_zeros(at, at.q_len)), "segments(0, 0, 1, 1)"),
        "segments_separate": Placeholder(
            lambda at: Segments(_zeros(at, at.q_len), _zeros(at, at.kv_len)), "segments([0, 0], [0, 1])"
        ),
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_ids", as_integers("Segments: query_ids", self.query_ids, (1, 2)))
        if self.kv_ids is not None:
            object.__setattr__(self, "kv_ids", as_integers("Segments: kv_ids", self.kv_ids, (1, 2)))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.SEGMENTS if self.kv_ids is None else AtomKind.SEGMENTS_SEPARATE)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return _equal_ids(query, kv, self.query_ids, self.kv_ids)

    def check(self, extent: Extent) -> None:
        _check_ids("Segments", "ids", self.query_ids, self.kv_ids, extent)

    def __repr__(self) -> str:
        return f"Segments({described_pair(self.query_ids, self.kv_ids)})"

    @classmethod
    def read(cls, *values: Any, **named: Any) -> Mask:
        return cls(*read_slots(values), **named)

    def sizes(self) -> dict[str, int]:
        return _sizes(Mask.sizes(self), self.kv_ids)

    @classmethod
    def has_live_slots(cls, atom: Atom) -> bool:
        return atom.kind is AtomKind.SEGMENTS

    def live_slots(self) -> ArrayLike:
        return _live(self.query_ids)

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        return _decide(self.query_ids, self.kv_ids, grid)

    @classmethod
    def padded_atom(cls, atom: Atom, padding: Padding) -> Atom:
        return Atom(AtomKind.SEGMENTS_SEPARATE) if padding.parts_ids else atom

    def padded(self, padding: Padding) -> Mask:
        return Segments(*_padded(self.query_ids, self.kv_ids, padding))

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        return True

    @classmethod
    def hides_rows_behind(cls, atom: Atom) -> bool:
        return True


@final
@pytree("query_spans", "kv_spans")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BidirectionalSpans(Mask):
    """Queries and keys of one span see each other: span ids equal and not negative.

    Meant to be OR-ed to a causal mask, for the tokens of an image.
    `BidirectionalSpans([-1, 0, 0, -1])`:

        . . . .
        . 1 1 .
        . 1 1 .
        . . . .

    Args:
      query_spans: integers [B, T] or [T]; negative is in no span.
      kv_spans: integers [B, S] or [S]; None means the query's own.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash; the form is the key

    query_spans: ArrayLike
    kv_spans: ArrayLike | None = None

    word: ClassVar[str] = "spans"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.SPANS, AtomKind.SPANS_SEPARATE)
    axes: ClassVar[Mapping[str, str]] = {"query_spans": "BT", "kv_spans": "BS"}
    placeholders: ClassVar[Mapping[str, Placeholder]] = {
        "spans": Placeholder(lambda at: BidirectionalSpans(_zeros(at, at.q_len)), "spans(-1, 0, 0, -1)"),
        "spans_separate": Placeholder(
            lambda at: BidirectionalSpans(_zeros(at, at.q_len), _zeros(at, at.kv_len)), "spans([0, 0], [0, 1])"
        ),
    }

    def __post_init__(self) -> None:
        name = "BidirectionalSpans"
        object.__setattr__(self, "query_spans", as_integers(f"{name}: query_spans", self.query_spans, (1, 2)))
        if self.kv_spans is not None:
            object.__setattr__(self, "kv_spans", as_integers(f"{name}: kv_spans", self.kv_spans, (1, 2)))

    @classmethod
    def from_flags(cls, flags: Any) -> BidirectionalSpans:
        """Numbers the runs of True: each run is a span of its own.

        Args:
          flags: booleans [B, L] or [L], e.g. which tokens belong to images.

        Raises:
          ShapeError: not booleans, or the wrong rank.
        """
        flags = as_array(flags)
        if flags.dtype != np.bool_ or flags.ndim not in (1, 2):
            raise ShapeError(
                f"BidirectionalSpans: flags must be booleans [B, L] or [L], got {flags.dtype} of shape {flags.shape}; "
                "for 0/1 numbers pass flags > 0."
            )
        xp = module_of(flags)
        before = xp.concatenate([xp.zeros_like(flags[..., :1]), flags[..., :-1]], axis=-1)
        numbers = xp.cumsum(flags & ~before, axis=-1, dtype=xp.int32) - 1
        return cls(xp.where(flags, numbers, xp.int32(-1)))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.SPANS if self.kv_spans is None else AtomKind.SPANS_SEPARATE)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return _equal_ids(query, kv, self.query_spans, self.kv_spans)

    def check(self, extent: Extent) -> None:
        _check_ids("BidirectionalSpans", "spans", self.query_spans, self.kv_spans, extent)

    def __repr__(self) -> str:
        return f"BidirectionalSpans({described_pair(self.query_spans, self.kv_spans)})"

    @classmethod
    def read(cls, *values: Any, **named: Any) -> Mask:
        return cls(*read_slots(values), **named)

    @classmethod
    def readers(cls) -> dict[str, Callable[..., Mask]]:
        return {cls.word: cls.read, cls.__name__: cls.read, f"{cls.__name__}.from_flags": _read_flags}

    def sizes(self) -> dict[str, int]:
        return _sizes(Mask.sizes(self), self.kv_spans)

    @classmethod
    def has_live_slots(cls, atom: Atom) -> bool:
        return atom.kind is AtomKind.SPANS

    def live_slots(self) -> ArrayLike:
        return _live(self.query_spans)

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        return _decide(self.query_spans, self.kv_spans, grid)

    @classmethod
    def padded_atom(cls, atom: Atom, padding: Padding) -> Atom:
        return Atom(AtomKind.SPANS_SEPARATE) if padding.parts_ids else atom

    def padded(self, padding: Padding) -> Mask:
        return BidirectionalSpans(*_padded(self.query_spans, self.kv_spans, padding))

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        return True

    @classmethod
    def hides_rows_behind(cls, atom: Atom) -> bool:
        return True


def _equal_ids(query: Side, kv: Side, query_ids: ArrayLike, kv_ids: ArrayLike | None) -> ArrayLike:
    own, other = query.take(query_ids), kv.take(query_ids if kv_ids is None else kv_ids)
    return (own == other) & (own >= 0) & (other >= 0)  # an unsigned id may equal a negative one


def _check_ids(mask: str, word: str, query_ids: ArrayLike, kv_ids: ArrayLike | None, extent: Extent) -> None:
    check_rows(f"{mask}: query_{word}", query_ids, extent.batch, extent.q_len)
    if kv_ids is not None:
        check_rows(f"{mask}: kv_{word}", kv_ids, extent.batch, extent.kv_len)
    elif extent.q_len != extent.kv_len:
        raise ShapeError(
            f"{mask}: kv_{word}=None means the query's own, but T={extent.q_len} and S={extent.kv_len}; "
            f"pass {mask}(query_{word}, kv_{word})."
        )


def _zeros(at: Extent, length: int) -> ArrayLike:
    return filled(0, (at.batch, length))


def _read_flags(*flags: Any) -> Mask:
    return BidirectionalSpans.from_flags(read_booleans(flags[0] if len(flags) == 1 else flags))


def _sizes(found: dict[str, int], kv_ids: ArrayLike | None) -> dict[str, int]:
    return {**found, "S": found["T"]} if kv_ids is None else found


def _live(ids: ArrayLike) -> ArrayLike:
    ids = as_array(ids)
    return (ids if ids.ndim == 2 else ids[None]) >= 0


def _padded(ids: ArrayLike, kv_ids: ArrayLike | None, padding: Padding) -> tuple[ArrayLike, ArrayLike | None]:
    queries = _with_dead_slots(ids, padding.more_queries)
    if kv_ids is None and not padding.parts_ids:
        return queries, None
    return queries, _with_dead_slots(ids if kv_ids is None else kv_ids, padding.more_keys)


def _with_dead_slots(ids: ArrayLike, more: int) -> ArrayLike:
    """Puts ids of −1, which see nothing, behind ids [B, L] or [L]."""
    widths = [(0, 0)] * (ids.ndim - 1) + [(0, more)]
    return module_of(ids).pad(signed(ids), widths, constant_values=-1) if more else ids


def _decide(query: jax.Array, kv: jax.Array | None, grid: BlockGrid) -> Decided:
    """Ranges of ids that do not meet hold nothing; one id on both sides, not negative, holds everything."""
    kv = query if kv is None else kv
    if not (_fits_int32(query) and _fits_int32(kv)):
        return Decided.unknown(grid)
    low_q, high_q, whole_q = _id_ranges(query, grid.block_q, grid.rows)
    low_k, high_k, whole_k = _id_ranges(kv, grid.block_kv, grid.columns)
    apart = (high_q[:, :, None] < low_k[:, None]) | (high_k[:, None] < low_q[:, :, None])
    same = (low_q == high_q)[:, :, None] & (low_k == high_k)[:, None] & (low_q[:, :, None] == low_k[:, None])
    full = same & whole_q[:, :, None] & whole_k[:, None]
    return Decided(~apart, full)


def _fits_int32(ids: jax.Array) -> bool:
    return bool(np.can_cast(ids.dtype, np.int32))


def _id_ranges(ids: jax.Array, block: int, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least and greatest id ≥ 0 of each block, [rows, blocks], and whether every id is ≥ 0."""
    rows = tiles(jnp.atleast_2d(jnp.asarray(ids)).astype(jnp.int32), block, blocks)
    alive = rows >= 0
    low = jnp.where(alive, rows, np.iinfo(np.int32).max).min(axis=2)
    high = jnp.where(alive, rows, -1).max(axis=2)
    return low, high, alive.all(axis=2)
