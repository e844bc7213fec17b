"""Masks over array slots, which `.at` does not move: Segments, Lengths, Dense."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.masks.base import Extent, Mask
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.positions import ArrayLike, Axis, Side


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
        object.__setattr__(self, "query_ids", _integers("Segments: query_ids", self.query_ids, (1, 2)))
        if self.kv_ids is not None:
            object.__setattr__(self, "kv_ids", _integers("Segments: kv_ids", self.kv_ids, (1, 2)))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.SEGMENTS if self.kv_ids is None else AtomKind.SEGMENTS_SEPARATE)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        query_ids = query.take(self.query_ids)
        kv_ids = kv.take(self.query_ids if self.kv_ids is None else self.kv_ids)
        return (query_ids == kv_ids) & (query_ids >= 0)

    def check(self, extent: Extent) -> None:
        _check_rows("Segments: query_ids", self.query_ids, extent.batch, extent.q_len)
        if self.kv_ids is not None:
            _check_rows("Segments: kv_ids", self.kv_ids, extent.batch, extent.kv_len)
        elif extent.q_len != extent.kv_len:
            raise ShapeError(
                f"Segments: kv_ids=None means the query's own ids, but T={extent.q_len} and S={extent.kv_len}; "
                "pass Segments(query_ids, kv_ids)."
            )


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
      kv_lengths: integers [B].
      query_lengths: integers [B]; None means every query counts.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash; the form is the key

    kv_lengths: ArrayLike
    query_lengths: ArrayLike | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_lengths", _integers("Lengths: kv_lengths", self.kv_lengths, (1,)))
        if self.query_lengths is not None:
            checked = _integers("Lengths: query_lengths", self.query_lengths, (1,))
            object.__setattr__(self, "query_lengths", checked)

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
            if lengths is not None and lengths.shape != (extent.batch,):
                raise ShapeError(f"Lengths: {name} must be [B] = [{extent.batch}], got shape {lengths.shape}.")


@final
@pytree("visible")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Dense(Mask):
    """A boolean array says which keys each query sees.

    Args:
      visible: booleans that broadcast to B N T S; True where the key may be seen.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash; the form is the key

    visible: ArrayLike

    def __post_init__(self) -> None:
        array = _array(self.visible)
        if array.dtype != np.bool_:
            raise ShapeError(
                f"Dense: visible must be boolean, got {array.dtype}; for 0/1 numbers pass visible > 0, "
                "for additive masks pass bias=."
            )
        if array.ndim > 4:
            raise ShapeError(f"Dense: visible must broadcast to B N T S, got rank {array.ndim}.")
        object.__setattr__(self, "visible", array.reshape((1,) * (4 - array.ndim) + array.shape))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.DENSE)

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        visible = self.visible
        visible = visible.reshape((1,) * (4 - visible.ndim) + visible.shape)
        for side in (query, kv):
            axis = 2 if side.axis is Axis.QUERY else 3
            if not side.whole and visible.shape[axis] > 1:
                xp = np if isinstance(visible, np.ndarray) and isinstance(side.slots, np.ndarray) else jnp
                visible = xp.take(visible, side.slots.reshape(-1), axis=axis)
        return visible

    def check(self, extent: Extent) -> None:
        full = (extent.batch, extent.q_heads, extent.q_len, extent.kv_len)
        shape = (1,) * (4 - self.visible.ndim) + self.visible.shape
        if any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
            raise ShapeError(f"Dense: visible must broadcast to B N T S = {full}, got shape {self.visible.shape}.")


def _array(value: Any) -> ArrayLike:
    return value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)


def _integers(name: str, value: Any, ranks: tuple[int, ...]) -> ArrayLike:
    array = _array(value)
    if array.ndim not in ranks or not jnp.issubdtype(array.dtype, jnp.integer):
        wanted = " or ".join(str(rank) for rank in ranks)
        raise ShapeError(f"{name} must be integers of rank {wanted}, got {array.dtype} of shape {array.shape}.")
    return array


def _check_rows(name: str, ids: ArrayLike, batch: int, length: int) -> None:
    rows = ids.shape[0] if ids.ndim == 2 else 1
    if ids.shape[-1] != length or rows not in (1, batch):
        raise ShapeError(f"{name} must be [{batch}, {length}] or [{length}], got shape {ids.shape}.")
