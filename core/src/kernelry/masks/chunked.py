"""Masks over a grid of positions: Chunked and BlockCausal."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.side import ArrayLike, Side


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Chunked(Mask):
    """A query sees the keys of its own chunk, up to itself: p_q // size = p_k // size and p_k ≤ p_q.

    `Chunked(2)`:

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1

    Args:
      size: positions per chunk, ≥ 1. Chunks begin at the multiples of size.
    """

    size: int

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_size("Chunked: size", self.size))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.CHUNKED, (self.size,))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        same = query.positions // self.size == kv.positions // self.size
        return same & (kv.positions <= query.positions)

    def __repr__(self) -> str:
        return f"Chunked({self.size})"


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class BlockCausal(Mask):
    """A query sees its own block and those before, as in block diffusion: p_k // size ≤ p_q // size.

    `BlockCausal(2)`:

        1 1 . .
        1 1 . .
        1 1 1 1
        1 1 1 1

    Args:
      size: positions per block, ≥ 1. Blocks begin at the multiples of size.
    """

    size: int

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_size("BlockCausal: size", self.size))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.BLOCK_CAUSAL, (self.size,))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return kv.positions // self.size <= query.positions // self.size

    def __repr__(self) -> str:
        return f"BlockCausal({self.size})"


def whole_size(name: str, size: Any) -> int:
    """Checks a number of positions.

    Raises:
      ArgumentError: it is no integer in [1, 2**31).
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size < 2**31:
        raise ArgumentError(f"{name} must be an integer in [1, 2**31), got {size!r}.")
    return int(size)
