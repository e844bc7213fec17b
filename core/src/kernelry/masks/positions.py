"""Where the slots of an array stand: sides of a mask, and the positions `.at` gives them."""

from __future__ import annotations

import dataclasses
import enum
from types import ModuleType
from typing import Any, Protocol, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks.form import OPEN_RUN, PositionForm, PositionKind, Runs

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
      heads: query head indices [1, N, 1, 1] where a mask needs them.
    """

    axis: Axis
    slots: ArrayLike
    positions: ArrayLike
    whole: bool = True
    heads: ArrayLike | None = None

    @classmethod
    def query(cls, length: int, xp: ModuleType = jnp) -> Side:
        """All T query slots; `xp` (numpy or jax.numpy) decides what `evaluate` returns."""
        return cls._of(Axis.QUERY, length, xp)

    @classmethod
    def kv(cls, length: int, xp: ModuleType = jnp) -> Side:
        """All S key/value slots."""
        return cls._of(Axis.KV, length, xp)

    @classmethod
    def _of(cls, axis: Axis, length: int, xp: ModuleType) -> Side:
        slots = _place(xp.arange(length, dtype=xp.int32), axis)
        return cls(axis, slots, slots)

    @classmethod
    def of_slots(cls, axis: Axis, slots: ArrayLike) -> Side:
        """A part of a side: int32 slots [L] of a tile, in any order."""
        placed = _place(slots, axis)
        return cls(axis, placed, placed, whole=False)

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

    def at(self, where: Positions | None) -> Side:
        """Returns the same slots at other positions."""
        return self if where is None else dataclasses.replace(self, positions=where.of(self))


def _place(values: ArrayLike, axis: Axis) -> ArrayLike:
    rows = values.shape[0] if values.ndim == 2 else 1
    length = values.shape[-1]
    return values.reshape((rows, 1, length, 1) if axis is Axis.QUERY else (rows, 1, 1, length))


class Positions(Protocol):
    """How `.at` says where one side's slots stand."""

    @property
    def form(self) -> PositionForm:
        """The static side."""
        ...

    def of(self, side: Side) -> ArrayLike:
        """Returns the positions of the side's slots, placed like them."""
        ...

    def check(self, name: str, batch: int, length: int) -> None:
        """Raises ShapeError where these positions do not fit a side of that length."""
        ...


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class StaticOffset(Positions):
    """Slot i stands at `value + i`; known while tracing."""

    value: int

    @property
    def form(self) -> PositionForm:
        return PositionForm(PositionKind.OFFSET, self.value) if self.value else PositionForm()

    def of(self, side: Side) -> ArrayLike:
        return side.slots + np.int32(self.value)

    def check(self, name: str, batch: int, length: int) -> None:
        """An offset fits every length."""

    def __str__(self) -> str:
        return str(self.value)


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class StaticOffsets(Positions):
    """Slot i of batch row b stands at `values[b] + i`; known while tracing."""

    values: tuple[int, ...]

    @property
    def form(self) -> PositionForm:
        return PositionForm(PositionKind.STATIC, tuple(((first, OPEN_RUN),) for first in self.values))

    def of(self, side: Side) -> ArrayLike:
        offsets = np.asarray(self.values, np.int32).reshape(-1, 1, 1, 1)
        return side.slots + offsets

    def check(self, name: str, batch: int, length: int) -> None:
        _check_offsets(name, len(self.values), batch)

    def __str__(self) -> str:
        return str(list(self.values))


@final
@pytree("value")
@dataclasses.dataclass(frozen=True, slots=True)
class TracedOffset(Positions):
    """Slot i stands at `value + i`; value is a JAX integer array, scalar or [B]."""

    value: jax.Array

    @property
    def form(self) -> PositionForm:
        return PositionForm(PositionKind.TRACED)

    def of(self, side: Side) -> ArrayLike:
        value = self.value.astype(jnp.int32)  # differences of narrow or unsigned positions would wrap
        offset = value if value.ndim == 0 else value.reshape(-1, 1, 1, 1)
        return side.slots + offset

    def check(self, name: str, batch: int, length: int) -> None:
        if self.value.ndim == 1:
            _check_offsets(name, self.value.shape[0], batch)

    def __str__(self) -> str:
        return f"array{list(self.value.shape)}"


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class StaticPositions(Positions):
    """Positions known while tracing, stored as runs and compared by value."""

    runs: Runs

    @classmethod
    def of_array(cls, values: np.ndarray) -> StaticPositions:
        """Compresses positions [L] or [B, L] into runs of consecutive numbers."""
        return cls(tuple(_compress(row) for row in np.atleast_2d(values)))

    @property
    def form(self) -> PositionForm:
        return PositionForm(PositionKind.STATIC, self.runs)

    @property
    def array(self) -> np.ndarray:
        """Positions as int32 [rows, L]."""
        positions = self.form.positions(0)
        assert positions is not None
        return positions.astype(np.int32)

    def of(self, side: Side) -> ArrayLike:
        values = self.array if isinstance(side.slots, np.ndarray) else jnp.asarray(self.array)
        return side.take(values)

    def check(self, name: str, batch: int, length: int) -> None:
        _check_positions(name, self.array.shape, batch, length)

    def __str__(self) -> str:
        return f"<{sum(len(row) for row in self.runs)} runs>"


@final
@pytree("value")
@dataclasses.dataclass(frozen=True, slots=True)
class TracedPositions(Positions):
    """Positions given by a JAX integer array, [L] or [B, L]."""

    value: jax.Array

    @property
    def form(self) -> PositionForm:
        return PositionForm(PositionKind.TRACED)

    def of(self, side: Side) -> ArrayLike:
        return side.take(self.value.astype(jnp.int32))

    def check(self, name: str, batch: int, length: int) -> None:
        _check_positions(name, self.value.shape, batch, length)

    def __str__(self) -> str:
        return f"array{list(self.value.shape)}"


def _check_positions(name: str, shape: tuple[int, ...], batch: int, length: int) -> None:
    rows = shape[0] if len(shape) == 2 else 1
    if shape[-1] != length or rows not in (1, batch):
        raise ShapeError(f"{name}_positions must be [{length}] or [{batch}, {length}], got shape {shape}.")


def _check_offsets(name: str, rows: int, batch: int) -> None:
    if rows not in (1, batch):
        raise ShapeError(f"{name}_offset must be a scalar or [B] = [{batch}], got shape ({rows},).")


def _compress(row: np.ndarray) -> tuple[tuple[int, int], ...]:
    if row.size == 0:
        return ()
    starts = np.flatnonzero(np.diff(row, prepend=row[0] - 2) != 1)
    counts = np.diff(starts, append=row.size)
    return tuple((int(row[start]), int(count)) for start, count in zip(starts, counts, strict=True))


def from_arguments(name: str, offset: Any, positions: Any) -> Positions | None:
    """Reads one side's arguments of `.at`.

    Args:
      name: `query` or `kv`, for messages.
      offset: an int, or an integer array, scalar or [B]; None when not given.
      positions: an integer array [L] or [B, L]; None when not given.
    """
    if offset is not None and positions is not None:
        raise ArgumentError(f"at() got both {name}_offset and {name}_positions; give one of them.")
    if offset is not None:
        return _offset(f"{name}_offset", offset)
    if positions is not None:
        return _positions(f"{name}_positions", positions)
    return None


def _offset(name: str, offset: Any) -> Positions:
    if isinstance(offset, int | np.integer):
        return StaticOffset(int(_in_range(name, np.asarray(offset, object))))
    array = _integers(name, offset, ranks=(0, 1))
    if not isinstance(array, np.ndarray):
        return TracedOffset(array)
    return StaticOffset(int(array)) if array.ndim == 0 else StaticOffsets(tuple(array.tolist()))


def _positions(name: str, positions: Any) -> Positions:
    array = _integers(name, positions, ranks=(1, 2))
    return StaticPositions.of_array(array) if isinstance(array, np.ndarray) else TracedPositions(array)


def _integers(name: str, value: Any, ranks: tuple[int, ...]) -> ArrayLike:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.ndim not in ranks or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ShapeError(
            f"{name} must be integers of rank {' or '.join(map(str, ranks))}, got {array.dtype}{array.shape}."
        )
    return array if isinstance(array, jax.Array) else _in_range(name, array)


_FARTHEST = 2**30
"""Positions stay below it, so that they and their differences fit int32."""


def _in_range(name: str, values: np.ndarray) -> np.ndarray:
    if values.size and not (values.min() > -_FARTHEST and values.max() < _FARTHEST):
        raise ArgumentError(f"{name} must lie within ±2**30, got {values.min()} … {values.max()}.")
    return values
