"""Masks over a grid of positions: Chunked and BlockCausal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError
from kernelry.masks.base import Bounds, Mask, Ranges
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.side import ArrayLike, Side


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True, repr=False)
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

    word: ClassVar[str] = "chunked"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.CHUNKED,)
    positional: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, str]] = {}
    decides_ranges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_size("Chunked: size", self.size))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        same = query.positions // self.size == kv.positions // self.size
        return same & (kv.positions <= query.positions)

    @classmethod
    def sees_itself(cls, atom: Atom) -> bool:
        return True

    @classmethod
    def band_around(cls, atom: Atom) -> Bounds:
        return atom.params[0] - 1, 0

    @classmethod
    def follows_from(cls, atom: Atom, other: Atom) -> bool:
        return _is_coarser(atom, other)

    @classmethod
    def of_ranges(cls, atom: Atom, query: Ranges, kv: Ranges) -> tuple[np.ndarray, np.ndarray, bool]:
        (low_q, high_q), (low_k, high_k), size = query, kv, atom.params[0]
        last = np.minimum(high_q // size, high_k // size)  # the last chunk that both reach shows most
        apart = last < np.maximum(low_q // size, low_k // size)
        behind = np.maximum(low_k, last * size) > np.minimum(high_q, last * size + size - 1)
        same = (low_q // size == high_k // size) & (low_k // size == high_q // size)
        return apart | behind, same & (high_k <= low_q), False

    @classmethod
    def seen_from(cls, atom: Atom, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return kv, kv // atom.params[0] * atom.params[0] + atom.params[0] - 1


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True, repr=False)
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

    word: ClassVar[str] = "block_causal"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.BLOCK_CAUSAL,)
    positional: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, str]] = {}
    decides_ranges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_size("BlockCausal: size", self.size))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return kv.positions // self.size <= query.positions // self.size

    @classmethod
    def sees_itself(cls, atom: Atom) -> bool:
        return True

    @classmethod
    def follows_from(cls, atom: Atom, other: Atom) -> bool:
        return _is_coarser(atom, other) or looks_back_only(other)

    @classmethod
    def of_ranges(cls, atom: Atom, query: Ranges, kv: Ranges) -> tuple[np.ndarray, np.ndarray, bool]:
        (low_q, high_q), (low_k, high_k), size = query, kv, atom.params[0]
        return low_k // size > high_q // size, high_k // size <= low_q // size, True

    @classmethod
    def seen_from(cls, atom: Atom, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return kv // atom.params[0] * atom.params[0], np.full(kv.shape, np.iinfo(np.int64).max)

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        if atom.query.start is None or atom.kv.start is None:
            return False
        size = atom.params[0]
        return bool((atom.kv.start + kv_len) // size > (atom.query.start + q_len - 1) // size)


def _is_coarser(atom: Atom, other: Atom) -> bool:
    """Whether the atoms are of one kind, and the chunks of the first are made up of the other's."""
    return other.kind is atom.kind and atom.params[0] % other.params[0] == 0


def looks_back_only(atom: Atom) -> bool:
    """Whether it shows no key after the query."""
    right = atom.mask_class.band_around(atom)[1]
    return right is not None and right <= 0


def whole_size(name: str, size: Any) -> int:
    """Checks a number of positions.

    Raises:
      ArgumentError: it is not an integer in [1, 2**31).
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size < 2**31:
        raise ArgumentError(f"{name} must be an integer in [1, 2**31), got {size!r}.")
    return int(size)
