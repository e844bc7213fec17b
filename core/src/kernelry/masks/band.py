"""Masks that bound the difference of positions: Full, Causal, SlidingWindow."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.side import ArrayLike, Side


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Full(Mask):
    """Every query sees every key.

    1 1 1 1
    1 1 1 1
    1 1 1 1
    1 1 1 1
    """

    @property
    def atom(self) -> Atom:
        raise TypeError("Full is the empty conjunction and has no atom")

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        xp = np if isinstance(kv.slots, np.ndarray) else jnp
        return xp.ones(jnp.broadcast_shapes(query.slots.shape, kv.slots.shape), bool)


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Causal(Mask):
    """A query sees keys at its own position and before: p_k ≤ p_q.

    1 . . .
    1 1 . .
    1 1 1 .
    1 1 1 1
    """

    positional: ClassVar[bool] = True

    @property
    def atom(self) -> Atom:
        return band_atom(None, 0)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return kv.positions <= query.positions


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class SlidingWindow(Mask):
    """A query sees `left` keys before it, itself, and `right` after: p_q − left ≤ p_k ≤ p_q + right.

    A model card's "window w" is `left = w − 1`. `SlidingWindow(1)`:

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

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, bound in (("left", self.left), ("right", self.right)):
            if isinstance(bound, bool) or not isinstance(bound, int | np.integer) or not 0 <= bound < 2**31:
                raise ArgumentError(f"SlidingWindow: {name} must be an integer in [0, 2**31), got {bound!r}.")
            object.__setattr__(self, name, int(bound))

    @property
    def atom(self) -> Atom:
        return band_atom(self.left, self.right)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return Band(self.left, self.right).evaluate(query, kv)

    def __repr__(self) -> str:
        return f"SlidingWindow({self.left}, {self.right})"


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Band(Mask):
    """The canonical form of Causal, SlidingWindow and their conjunctions; None is unbounded."""

    left: int | None
    right: int | None

    positional: ClassVar[bool] = True

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


def band_atom(left: int | None, right: int | None) -> Atom:
    """The atom of a band: CAUSAL where it is exactly p_k ≤ p_q, else WINDOW."""
    return Atom(AtomKind.CAUSAL if (left, right) == (None, 0) else AtomKind.WINDOW, (left, right))
