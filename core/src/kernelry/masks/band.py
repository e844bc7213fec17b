"""Masks that bound the difference of positions: Full, Causal, SlidingWindow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError
from kernelry.masks.base import Bounds, Mask, Ranges
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.run_time import BlockGrid, Decided, tiles
from kernelry.masks.side import ArrayLike, Side

if TYPE_CHECKING:
    from kernelry.masks.composition import Conjunct, Visibility
    from kernelry.masks.padding import Padding


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Full(Mask):
    """Every query sees every key.

    `Full()`:

        1 1 1 1
        1 1 1 1
        1 1 1 1
        1 1 1 1
    """

    word: ClassVar[str] = "full"

    @property
    def atom(self) -> Atom:
        raise TypeError("Full is the empty conjunction and has no atom")

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        xp = np if isinstance(kv.slots, np.ndarray) else jnp
        return xp.ones(jnp.broadcast_shapes(query.slots.shape, kv.slots.shape), bool)

    def padded(self, padding: Padding) -> Mask:
        return self


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Causal(Mask):
    """A query sees keys at its own position and before: p_k ≤ p_q.

    `Causal()`:

        1 . . .
        1 1 . .
        1 1 1 .
        1 1 1 1
    """

    word: ClassVar[str] = "causal"
    positional: ClassVar[bool] = True

    @property
    def atom(self) -> Atom:
        return band_atom(None, 0)

    @property
    def canonical_mask(self) -> Mask:
        return Band(None, 0)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return kv.positions <= query.positions


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class SlidingWindow(Mask):
    """A query sees `left` keys before it, itself, and `right` after: p_q − left ≤ p_k ≤ p_q + right.

    In a causal decoder "window w" is `left = w − 1`; encoders count w or w // 2 on each side. `SlidingWindow(1)`:

        1 . . .
        1 1 . .
        . 1 1 .
        . . 1 1

    Args:
      left: keys before the query's own position, ≥ 0.
      right: keys after it, ≥ 0.
    """

    left: int
    right: int = 0

    word: ClassVar[str] = "window"
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, bound in (("left", self.left), ("right", self.right)):
            if isinstance(bound, bool) or not isinstance(bound, int | np.integer) or not 0 <= bound < 2**31:
                raise ArgumentError(f"SlidingWindow: {name} must be an integer in [0, 2**31), got {bound!r}.")
            object.__setattr__(self, name, int(bound))

    @property
    def atom(self) -> Atom:
        return band_atom(self.left, self.right)

    @property
    def canonical_mask(self) -> Mask:
        return Band(self.left, self.right)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return self.canonical_mask.evaluate(query, kv)


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Band(Mask):
    """The canonical form of Causal, SlidingWindow and their conjunctions; None is unbounded."""

    left: int | None
    right: int | None

    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.CAUSAL, AtomKind.WINDOW)
    positional: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, str]] = {}
    decides_ranges: ClassVar[bool] = True

    @property
    def atom(self) -> Atom:
        return band_atom(self.left, self.right)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        if self.left is None and self.right == 0:
            return kv.positions <= query.positions
        difference = query.positions - kv.positions
        inside = None
        if self.left is not None:
            inside = difference <= self.left
        if self.right is not None:
            not_after = difference >= -self.right
            inside = not_after if inside is None else inside & not_after
        return difference == difference if inside is None else inside

    @classmethod
    def sees_itself(cls, atom: Atom) -> bool:
        return all(bound is None or bound >= 0 for bound in atom.params)

    @classmethod
    def visibility(cls, atom: Atom, q_len: int, kv_len: int) -> Visibility | None:
        return _visibility(atom, q_len, kv_len) if atom.is_static else None

    @classmethod
    def band_around(cls, atom: Atom) -> Bounds:
        left, right = atom.params
        return left, right

    @classmethod
    def follows_from(cls, atom: Atom, other: Atom) -> bool:
        inner = other.mask_class.band_around(other)
        return all(
            wide is None or (near is not None and near <= wide) for near, wide in zip(inner, atom.params, strict=True)
        )

    @classmethod
    def of_ranges(cls, atom: Atom, query: Ranges, kv: Ranges) -> tuple[np.ndarray, np.ndarray, bool]:
        (low_q, high_q), (low_k, high_k) = query, kv
        left, right = atom.params
        empty, full = np.zeros(1, bool), np.ones(1, bool)
        if left is not None:
            empty, full = empty | (low_q - high_k > left), full & (high_q - low_k <= left)
        if right is not None:
            empty, full = empty | (low_k - high_q > right), full & (high_k - low_q <= right)
        return empty, full, left is None or right is None

    @classmethod
    def seen_from(cls, atom: Atom, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, right = atom.params
        ends = np.iinfo(np.int64)
        first = np.full(kv.shape, ends.min) if right is None else kv - right
        return first, np.full(kv.shape, ends.max) if left is None else kv + left

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        query = Side.query(grid.q_len).at(conjunct.query).positions.reshape(-1, grid.q_len)
        kv = Side.kv(grid.kv_len).at(conjunct.kv).positions.reshape(-1, grid.kv_len)
        tiles_q, tiles_k = tiles(query, grid.block_q, grid.rows), tiles(kv, grid.block_kv, grid.columns)
        low_q, high_q = tiles_q.min(axis=2)[:, :, None], tiles_q.max(axis=2)[:, :, None]
        low_k, high_k = tiles_k.min(axis=2)[:, None], tiles_k.max(axis=2)[:, None]
        some = jnp.ones((1, grid.rows, grid.columns), bool)
        full = some
        if self.left is not None:
            some, full = some & (_shifted(low_q, -self.left) <= high_k), full & (_shifted(high_q, -self.left) <= low_k)
        if self.right is not None:
            some, full = some & (low_k <= _shifted(high_q, self.right)), full & (high_k <= _shifted(low_q, self.right))
        return Decided(some, full)


def band_atom(left: int | None, right: int | None) -> Atom:
    """The atom of a band: CAUSAL where it is exactly p_k ≤ p_q, else WINDOW."""
    return Atom(AtomKind.CAUSAL if (left, right) == (None, 0) else AtomKind.WINDOW, (left, right))


def _shifted(positions: jax.Array, by: int) -> jax.Array:
    """Adds, and stays at the ends of int32: a key without a place may be given the least of all positions."""
    ends = np.iinfo(np.int32)
    return jnp.clip(positions, ends.min - min(by, 0), ends.max - max(by, 0)) + np.int32(by)


def _visibility(atom: Atom, q_len: int, kv_len: int) -> Visibility:
    """Exact, at static positions."""
    # Imported here because it imports this module.
    from kernelry.masks.composition import Visibility

    left, right = atom.params
    first_query, first_key = atom.query.start, atom.kv.start
    if first_query is not None and first_key is not None:
        queries, slots = (first_query, q_len), (first_key, kv_len)
        return Visibility(not _all_see(queries, slots, left, right), not _all_see(slots, queries, right, left))
    pairs = list(zip(*atom.positions(q_len, kv_len), strict=True))
    empty = any(not _sees_any(q, k, left, right).all() for q, k in pairs)
    hidden = any(not _sees_any(k, q, right, left).all() for q, k in pairs)
    return Visibility(empty, hidden)


def _all_see(own: tuple[int, int], other: tuple[int, int], below: int | None, above: int | None) -> bool:
    """Says whether every position p of a run (first, count) has one of `other` in [p − below, p + above]."""
    (first, count), (other_first, other_count) = own, other
    if count == 0 or other_count == 0:
        return count == 0
    last, other_last = first + count - 1, other_first + other_count - 1
    return (below is None or last - below <= other_last) and (above is None or first + above >= other_first)


def _sees_any(own: np.ndarray, other: np.ndarray, below: int | None, above: int | None) -> np.ndarray:
    """Says for each own position p whether `other` has one in [p − below, p + above]."""
    ordered = np.sort(other)
    first = 0 if below is None else np.searchsorted(ordered, own - below, side="left")
    last = len(ordered) if above is None else np.searchsorted(ordered, own + above, side="right")
    return np.broadcast_to(np.asarray(last > first), own.shape)
