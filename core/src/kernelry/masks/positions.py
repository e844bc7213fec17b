"""Where the slots of an array stand: the positions that `.at` gives them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry._values import unwrapped
from kernelry.errors import ArgumentError, ShapeError, nearest
from kernelry.masks.arrays import as_array, as_integers, described
from kernelry.masks.form import OPEN_RUN, PositionForm, PositionKind, Runs, lengthened_runs
from kernelry.masks.side import ArrayLike, Side


class Positions(Protocol):
    """How `.at` says where one side's slots stand."""

    word: ClassVar[str]
    """The end of the argument's name: `offset` or `positions`."""

    @property
    def form(self) -> PositionForm:
        """The static side; by default of positions that only the program knows."""
        return PositionForm(PositionKind.TRACED)

    def of(self, side: Side) -> ArrayLike:
        """Returns the positions of the side's slots, placed like them."""
        ...

    def check(self, name: str, batch: int, length: int) -> None:
        """Raises ShapeError where these positions do not fit a side of that length; by default they fit any."""
        return

    def lengthened(self, more: int) -> Positions:
        """The positions of a side with `more` slots put behind."""
        return self


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class StaticOffset(Positions):
    """Slot i stands at `value + i`; known while tracing."""

    value: int

    word: ClassVar[str] = "offset"

    @property
    def form(self) -> PositionForm:
        return PositionForm(PositionKind.OFFSET, self.value) if self.value else PositionForm()

    def of(self, side: Side) -> ArrayLike:
        return side.slots + np.int32(self.value)

    def __str__(self) -> str:
        return str(self.value)


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class StaticOffsets(Positions):
    """Slot i of batch row b stands at `values[b] + i`; known while tracing."""

    values: tuple[int, ...]

    word: ClassVar[str] = "offset"

    @property
    def form(self) -> PositionForm:
        return PositionForm(PositionKind.STATIC, tuple(((first, OPEN_RUN),) for first in self.values))

    def of(self, side: Side) -> ArrayLike:
        if len(self.values) == 1:
            return side.slots + np.int32(self.values[0])  # a tile may have fewer than four dimensions
        offsets = np.asarray(self.values, np.int32).reshape(-1, 1, 1, 1)
        return side.slots + offsets

    def check(self, name: str, batch: int, length: int) -> None:
        _check_offsets(name, len(self.values), batch)

    def __str__(self) -> str:
        return str(list(self.values))


@final
@pytree("value")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TracedOffset(Positions):
    """Slot i stands at `value + i`; value is a JAX integer array, scalar or [B]."""

    value: jax.Array

    word: ClassVar[str] = "offset"

    def of(self, side: Side) -> ArrayLike:
        value = self.value.astype(jnp.int32)  # differences of narrow or unsigned positions would wrap
        offset = value if value.ndim == 0 else value.reshape(-1, 1, 1, 1)
        return side.slots + offset

    def check(self, name: str, batch: int, length: int) -> None:
        if self.value.ndim == 1:
            _check_offsets(name, self.value.shape[0], batch)

    def __str__(self) -> str:
        return described(self.value)


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class StaticPositions(Positions):
    """Positions known while tracing, stored as runs and compared by value."""

    runs: Runs

    word: ClassVar[str] = "positions"

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
        return _expanded(self.form)

    def of(self, side: Side) -> ArrayLike:
        if isinstance(side.slots, np.ndarray):
            return side.take(self.array)
        if self.form.is_arithmetic:
            return _along(self.runs[0], side.slots)
        return side.take(jnp.asarray(self.array))

    def check(self, name: str, batch: int, length: int) -> None:
        shape = self.array.shape
        _check_positions(name, shape if shape[0] > 1 else shape[1:], batch, length)

    def lengthened(self, more: int) -> Positions:
        return StaticPositions(lengthened_runs(self.runs, more))

    def __str__(self) -> str:
        rows = [_run_text(row) for row in self.runs]
        return rows[0] if len(rows) == 1 else f"[{', '.join(rows)}]"


@final
@pytree("value")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TracedPositions(Positions):
    """Positions given by a JAX integer array, [L] or [B, L]."""

    value: jax.Array

    word: ClassVar[str] = "positions"

    def of(self, side: Side) -> ArrayLike:
        return side.take(self.value.astype(jnp.int32))

    def check(self, name: str, batch: int, length: int) -> None:
        _check_positions(name, self.value.shape, batch, length)

    def lengthened(self, more: int) -> Positions:
        if not more:
            return self
        widths = [(0, 0)] * (self.value.ndim - 1) + [(0, more)]
        mode = "edge" if self.value.shape[-1] else "constant"
        return TracedPositions(jnp.pad(self.value, widths, mode=mode))

    def __str__(self) -> str:
        return described(self.value)


@functools.lru_cache(maxsize=16)
def _expanded(form: PositionForm) -> np.ndarray:
    """A block map asks for every row of blocks."""
    positions = form.positions(0)
    assert positions is not None
    positions = positions.astype(np.int32)
    positions.flags.writeable = False
    return positions


def _along(row: tuple[tuple[int, int], ...], slots: jax.Array) -> jax.Array:
    """Adds to each slot what its run is shifted by: no array is gathered from, nor held by an accelerator's kernel."""
    starts = np.cumsum([0, *(count for _, count in row)])
    shift = jnp.zeros_like(slots)
    for start, (first, _) in zip(starts.tolist(), row, strict=False):
        shift = jnp.where(slots >= np.int32(start), np.int32(first - start), shift)
    return slots + shift


_SHOWN = 64
"""Positions; longer rows are shown as their number of runs."""


def _run_text(row: tuple[tuple[int, int], ...]) -> str:
    if sum(count for _, count in row) > _SHOWN:
        return f"<{len(row)} runs>"
    return str([first + i for first, count in row for i in range(count)])


def _check_positions(name: str, shape: tuple[int, ...], batch: int, length: int) -> None:
    rows = shape[0] if len(shape) == 2 else 1
    if shape[-1] != length or rows not in (1, batch):
        raise ShapeError(f"{name}_positions must be [{length}] or [{batch}, {length}], got shape {shape}.")


def _check_offsets(name: str, rows: int, batch: int) -> None:
    if rows not in (1, batch):
        raise ShapeError(f"{name}_offset must be a scalar or [B] = [{batch}], got shape ({rows},).")


class _Row(tuple[tuple[int, int], ...]):
    """The runs of one row; the hash of many takes long, and is asked for whenever JAX looks for a program."""

    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("hash")
        if found is None:
            found = self.__dict__["hash"] = super().__hash__()
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _Row, (tuple(self),)


def _compress(row: np.ndarray) -> tuple[tuple[int, int], ...]:
    if row.size == 0:
        return ()
    starts = np.flatnonzero(np.diff(row, prepend=row[0] - 2) != 1)
    counts = np.diff(starts, append=row.size)
    return _Row(zip(row[starts].tolist(), counts.tolist(), strict=True))


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
    offset = unwrapped(offset)
    if isinstance(offset, bool):
        raise ShapeError(f"{name} must be integers, got {offset}.")
    if isinstance(offset, int | np.integer):
        return StaticOffset(int(_in_range(name, np.asarray(offset, object))))
    array = _integers(name, offset, ranks=(0, 1))
    if array.shape == (0,):
        return StaticOffset(0)  # of no rows
    if not isinstance(array, np.ndarray):
        return TracedOffset(array)
    return StaticOffset(int(array)) if array.ndim == 0 else StaticOffsets(tuple(array.tolist()))


def _positions(name: str, positions: Any) -> Positions:
    array = _integers(name, positions, ranks=(1, 2))
    if array.ndim == 2 and array.shape[0] == 0:
        return StaticOffset(0)  # of no rows
    return StaticPositions.of_array(array) if isinstance(array, np.ndarray) else TracedPositions(array)


def _integers(name: str, value: Any, ranks: tuple[int, ...]) -> ArrayLike:
    array = as_array(value)
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu":
        _in_range(name, array)
    return as_integers(name, value, ranks)


_FARTHEST = 2**30
"""Positions stay below it, so that they and their differences fit int32."""


def _in_range(name: str, values: np.ndarray) -> np.ndarray:
    if values.size and not (values.min() > -_FARTHEST and values.max() < _FARTHEST):
        raise ArgumentError(f"{name} must lie within ±2**30, got {values.min()} … {values.max()}.")
    return values


ORDERS = ("dual_chunk", "striped")


def load_balanced_order(length: int, size: int, order: str = "dual_chunk") -> np.ndarray:
    """Returns the token of each slot, [length], so that causal attention costs every device the same.

    Args:
      length: of the whole sequence.
      size: devices that share it, each a run of length / size slots.
      order: `dual_chunk` gives a device one chunk of 2 · size from each end; `striped` every size-th token.

    Raises:
      ArgumentError: the order is unknown, or the sequence does not divide.
    """
    if order not in ORDERS:
        raise ArgumentError(f"unknown order {order!r}{nearest(str(order), ORDERS)}")
    pieces = 2 * size if order == "dual_chunk" else size
    if length % pieces:
        raise ArgumentError(
            f"a sequence of {length} tokens cannot be shared out in {order} order: {length} % {pieces}."
        )
    tokens = np.arange(length, dtype=np.int32)
    if order == "striped":
        return tokens.reshape(-1, size).T.reshape(-1)
    chunks = tokens.reshape(pieces, -1)
    return np.concatenate([chunks[[rank, pieces - 1 - rank]].reshape(-1) for rank in range(size)])
