"""Masks that compare ids of array slots: Segments and BidirectionalSpans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.masks.arrays import (
    as_array,
    as_integers,
    check_rows,
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


class _EqualIds(Mask, Protocol):
    """Ids equal and not negative; `axes` names those of queries and of keys, `kinds` are of one array and of two."""

    __slots__ = ()

    _example: ClassVar[str]

    def __post_init__(self) -> None:
        for name, ids in self._named():
            object.__setattr__(self, name, as_integers(f"{type(self).__name__}: {name}", ids, (1, 2)))

    def _named(self) -> list[tuple[str, ArrayLike]]:
        """The arrays that are given, by name."""
        fields = ((name, getattr(self, name)) for name in self.axes or ())
        return [(name, ids) for name, ids in fields if ids is not None]

    @property
    def _is_shared(self) -> bool:
        return len(self._named()) == 1

    @property
    def _pair(self) -> tuple[ArrayLike, ArrayLike]:
        given = [ids for _, ids in self._named()]
        return given[0], given[-1]

    @property
    def atom(self) -> Atom:
        return Atom(self.kinds[0 if self._is_shared else 1])

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        own, other = (side.take(ids) for side, ids in zip((query, kv), self._pair, strict=True))
        return (own == other) & (own >= 0) & (other >= 0)  # an unsigned id may equal a negative one

    def check(self, extent: Extent) -> None:
        mask, (queries, keys) = type(self).__name__, tuple(self.axes or ())
        for (name, ids), length in zip(self._named(), (extent.q_len, extent.kv_len), strict=False):
            check_rows(f"{mask}: {name}", ids, extent.batch, length)
        if self._is_shared and extent.q_len != extent.kv_len:
            raise ShapeError(
                f"{mask}: {keys}=None means the query's own, but T={extent.q_len} and S={extent.kv_len}; "
                f"pass {mask}({queries}, {keys})."
            )

    @classmethod
    def read(cls, *values: Any, **named: Any) -> Mask:
        return cls(*read_slots(values), **named)

    @classmethod
    def placeholders(cls) -> dict[str, Placeholder]:
        make: Any = cls
        shared = Placeholder(lambda at: make(_zeros(at, at.q_len)), cls._example)
        separate = Placeholder(
            lambda at: make(_zeros(at, at.q_len), _zeros(at, at.kv_len)), f"{cls.word}([0, 0], [0, 1])"
        )
        return {cls.word: shared, f"{cls.word}_separate": separate}

    def sizes(self) -> dict[str, int]:
        found = Mask.sizes(self)
        return {**found, "S": found["T"]} if self._is_shared else found

    @classmethod
    def has_live_slots(cls, atom: Atom) -> bool:
        return atom.kind is cls.kinds[0]

    def live_slots(self) -> ArrayLike:
        ids = as_array(self._pair[0])
        return (ids if ids.ndim == 2 else ids[None]) >= 0

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        """Ranges of ids that do not meet hold nothing; one id on both sides, not negative, holds everything."""
        query, kv = self._pair
        if not (_fits_int32(query) and _fits_int32(kv)):
            return Decided.unknown(grid)
        low_q, high_q, whole_q = _id_ranges(query, grid.block_q, grid.rows)
        low_k, high_k, whole_k = _id_ranges(kv, grid.block_kv, grid.columns)
        apart = (high_q[:, :, None] < low_k[:, None]) | (high_k[:, None] < low_q[:, :, None])
        same = (low_q == high_q)[:, :, None] & (low_k == high_k)[:, None] & (low_q[:, :, None] == low_k[:, None])
        full = same & whole_q[:, :, None] & whole_k[:, None]
        return Decided(~apart, full)

    @classmethod
    def spread_atom(cls, atom: Atom) -> Atom:
        return Atom(cls.kinds[1])

    def spread(self) -> Mask:
        make: Any = type(self)
        return make(*self._pair)  # type: ignore[no-any-return]

    @classmethod
    def padded_atom(cls, atom: Atom, padding: Padding) -> Atom:
        return Atom(cls.kinds[1]) if padding.parts_ids else atom

    def padded(self, padding: Padding) -> Mask:
        make: Any = type(self)
        query, kv = self._pair
        queries = _with_dead_slots(query, padding.more_queries)
        if self._is_shared and not padding.parts_ids:
            return make(queries)  # type: ignore[no-any-return]
        return make(queries, _with_dead_slots(kv, padding.more_keys))  # type: ignore[no-any-return]

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        return True

    @classmethod
    def hides_rows_behind(cls, atom: Atom) -> bool:
        return True


@final
@pytree("query_ids", "kv_ids")
@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Segments(_EqualIds):
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

    query_ids: ArrayLike
    kv_ids: ArrayLike | None = None

    word: ClassVar[str] = "segments"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.SEGMENTS, AtomKind.SEGMENTS_SEPARATE)
    axes: ClassVar[Mapping[str, str]] = {"query_ids": "BT", "kv_ids": "BS"}
    _example: ClassVar[str] = "segments(0, 0, 1, 1)"


@final
@pytree("query_spans", "kv_spans")
@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class BidirectionalSpans(_EqualIds):
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

    query_spans: ArrayLike
    kv_spans: ArrayLike | None = None

    word: ClassVar[str] = "spans"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.SPANS, AtomKind.SPANS_SEPARATE)
    axes: ClassVar[Mapping[str, str]] = {"query_spans": "BT", "kv_spans": "BS"}
    _example: ClassVar[str] = "spans(-1, 0, 0, -1)"

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

    @classmethod
    def readers(cls) -> dict[str, Callable[..., Mask]]:
        return {cls.word: cls.read, cls.__name__: cls.read, f"{cls.__name__}.from_flags": _read_flags}


def _zeros(at: Extent, length: int) -> ArrayLike:
    return filled(0, (at.batch, length))


def _read_flags(*flags: Any) -> Mask:
    return BidirectionalSpans.from_flags(read_booleans(flags[0] if len(flags) == 1 else flags))


def _with_dead_slots(ids: ArrayLike, more: int) -> ArrayLike:
    """Puts ids of −1, which see nothing, behind ids [B, L] or [L]."""
    widths = [(0, 0)] * (ids.ndim - 1) + [(0, more)]
    return module_of(ids).pad(signed(ids), widths, constant_values=-1) if more else ids


def _fits_int32(ids: jax.Array) -> bool:
    return bool(np.can_cast(ids.dtype, np.int32))


def _id_ranges(ids: jax.Array, block: int, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least and greatest id ≥ 0 of each block, [rows, blocks], and whether every id is ≥ 0."""
    rows = tiles(jnp.atleast_2d(jnp.asarray(ids)).astype(jnp.int32), block, blocks)
    alive = rows >= 0
    low = jnp.where(alive, rows, np.iinfo(np.int32).max).min(axis=2)
    high = jnp.where(alive, rows, -1).max(axis=2)
    return low, high, alive.all(axis=2)
