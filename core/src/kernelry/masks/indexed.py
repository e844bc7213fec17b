"""Masks over array slots, which `.at` does not move: Segments, BidirectionalSpans, Lengths, Dense."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.masks.arrays import (
    as_array,
    as_booleans,
    as_integers,
    as_limits,
    check_rows,
    described,
    missing_axes,
    module_of,
    with_rank_4,
)
from kernelry.masks.base import Extent, Mask
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.side import ArrayLike, Axis, Side


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
        return f"Segments({_pair(self.query_ids, self.kv_ids)})"


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
        return f"BidirectionalSpans({_pair(self.query_spans, self.kv_spans)})"


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


def _pair(first: ArrayLike, second: ArrayLike | None) -> str:
    return described(first) if second is None else f"{described(first)}, {described(second)}"


@final
@pytree("kv_lengths", "query_lengths")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Lengths(Mask):
    """A key is visible while its slot is below the row's length; likewise queries.

    `Lengths([2])`:

        1 1 . .
        1 1 . .
        1 1 . .
        1 1 . .

    Args:
      kv_lengths: an integer, or integers [B].
      query_lengths: an integer, or integers [B]; None means every query counts.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash; the form is the key

    kv_lengths: ArrayLike
    query_lengths: ArrayLike | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_lengths", as_limits("Lengths: kv_lengths", self.kv_lengths))
        if self.query_lengths is not None:
            object.__setattr__(self, "query_lengths", as_limits("Lengths: query_lengths", self.query_lengths))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.LENGTHS, () if self.query_lengths is None else ("query",))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        visible = kv.slots < self.kv_lengths.reshape(-1, 1, 1, 1)
        if self.query_lengths is None:
            return visible
        return visible & (query.slots < self.query_lengths.reshape(-1, 1, 1, 1))

    def check(self, extent: Extent) -> None:
        for name, lengths in (("kv_lengths", self.kv_lengths), ("query_lengths", self.query_lengths)):
            if lengths is not None and lengths.shape not in ((), (extent.batch,)):
                raise ShapeError(
                    f"Lengths: {name} must be a number or [B] = [{extent.batch}], got shape {lengths.shape}."
                )

    def __repr__(self) -> str:
        return f"Lengths({_pair(self.kv_lengths, self.query_lengths)})"


@final
@pytree("visible")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Dense(Mask):
    """A boolean array says which keys each query sees, e.g. those an indexer has picked.

    Args:
      visible: booleans that broadcast to B N T S; True where the key may be seen.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash; the form is the key

    visible: ArrayLike

    def __post_init__(self) -> None:
        instead = "for 0/1 numbers pass visible > 0, for additive masks pass bias=."
        object.__setattr__(self, "visible", as_booleans("Dense: visible", self.visible, instead))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.DENSE)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        visible = with_rank_4(self.visible)
        for side in (query, kv):
            axis = 2 if side.axis is Axis.QUERY else 3
            if not side.whole and visible.shape[axis] > 1:
                visible = module_of(visible, side.slots).take(visible, side.slots.reshape(-1), axis=axis)
        return visible

    def check(self, extent: Extent) -> None:
        full = (extent.batch, extent.q_heads, extent.q_len, extent.kv_len)
        shape = with_rank_4(self.visible).shape
        if any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
            found = f"{self.visible.shape}{missing_axes('array', self.visible.shape, full)}"
            raise ShapeError(f"Dense: visible must broadcast to B N T S = {full}, got shape {found}.")

    def __repr__(self) -> str:
        return f"Dense({described(self.visible)})"
