"""The sides of a mask: which slots of the queries or of the keys it is asked about, and where they stand."""

from __future__ import annotations

import dataclasses
import enum
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, final

import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from kernelry.masks.positions import Positions

ArrayLike: TypeAlias = Any
"""A NumPy array (host) or a JAX array (device or tracer)."""


@final
class Axis(enum.Enum):
    """The axis of B N T S that a side runs along."""

    QUERY = -2
    KV = -1


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One side of a mask, placed so that both sides broadcast to B N T S.

    Args:
      axis: the axis its slots run along.
      slots: array indices, int32, e.g. [1, 1, T, 1] for queries and [1, 1, 1, S] for keys.
      positions: the positions of these slots, equal to the slots unless `.at` says otherwise.
      whole: True when the slots are 0 … length−1 in order, so that arrays need no gather.
      q_heads: N, of a query side; masks per key/value head then answer per query head.
    """

    axis: Axis
    slots: ArrayLike
    positions: ArrayLike
    whole: bool = True
    q_heads: int | None = None

    @classmethod
    def query(cls, length: int, xp: ModuleType = jnp, *, q_heads: int | None = None) -> Side:
        """All T query slots; `xp` (numpy or jax.numpy) decides what `evaluate` returns."""
        return cls._of(Axis.QUERY, length, xp, q_heads)

    @classmethod
    def kv(cls, length: int, xp: ModuleType = jnp) -> Side:
        """All S key/value slots."""
        return cls._of(Axis.KV, length, xp)

    @classmethod
    def _of(cls, axis: Axis, length: int, xp: ModuleType, q_heads: int | None = None) -> Side:
        if xp is jnp:
            shape = (1, 1, length, 1) if axis is Axis.QUERY else (1, 1, 1, length)
            slots: ArrayLike = lax.broadcasted_iota(jnp.int32, shape, 4 + axis.value)
        else:
            slots = _place(np.arange(length, dtype=np.int32), axis)
        return cls(axis, slots, slots, q_heads=q_heads)

    @classmethod
    def of_slots(cls, axis: Axis, slots: ArrayLike, *, q_heads: int | None = None) -> Side:
        """A part of a side: int32 slots [L] of a tile, in any order."""
        placed = _place(slots, axis)
        return cls(axis, placed, placed, whole=False, q_heads=q_heads)

    def take(self, values: ArrayLike) -> ArrayLike:
        """Places per-slot values, [B, length] or [length], along this side's axis.

        Returns:
          An array that broadcasts to B N T S.
        """
        values = values if values.ndim == 2 else values[None]
        if not self.whole:
            # NumPy cannot be indexed by a traced slot.
            values = values if isinstance(self.slots, np.ndarray) else jnp.asarray(values)
            values = values[:, self.slots.reshape(-1)]
        return _place(values, self.axis)

    def cut(self, array: ArrayLike) -> ArrayLike:
        """Takes these slots of an array that broadcasts to B N T S."""
        if self.whole or array.shape[self.axis.value] == 1:
            return array
        xp = np if isinstance(array, np.ndarray) and isinstance(self.slots, np.ndarray) else jnp
        return xp.take(array, self.slots.reshape(-1), axis=self.axis.value)

    def first(self, length: int) -> Side:
        """Returns the slots below `length`; of a tile all, those beyond moved to the last slot below it."""
        if self.whole:
            cut = (..., slice(length), slice(None)) if self.axis is Axis.QUERY else (..., slice(length))
            return dataclasses.replace(self, slots=self.slots[cut], positions=self.positions[cut])
        xp = np if isinstance(self.slots, np.ndarray) else jnp
        return dataclasses.replace(self, slots=xp.clip(self.slots, 0, max(length - 1, 0)))

    def at(self, where: Positions | None) -> Side:
        """Returns the same slots at other positions."""
        return self if where is None else dataclasses.replace(self, positions=where.of(self))


def _place(values: ArrayLike, axis: Axis) -> ArrayLike:
    rows = values.shape[0] if values.ndim == 2 else 1
    length = values.shape[-1]
    return values.reshape((rows, 1, length, 1) if axis is Axis.QUERY else (rows, 1, 1, length))
