"""Packed rows as the vendor takes them: the starts of sequences that follow one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernelry.errors import KernelRefusedError


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The runs of equal ids of all rows, one after another.

    Args:
      starts: int32 [B · most + 1], where each run begins, counted over all rows; behind the last the end.
      live: which queries see some key: those whose id is not negative.
      in_order: which rows hold an id in one run alone, and no more runs than were said.
    """

    starts: Int[Array, " starts"]
    live: Bool[Array, "B T"]
    in_order: Bool[Array, " B"]

    @classmethod
    def of(cls, ids: Int[Array, "B T"], most: int) -> Sequences:
        """Finds the runs of each row's ids; a row has at most so many."""
        batch, length = ids.shape
        begins = jnp.concatenate([jnp.ones((batch, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
        slots = jnp.arange(length, dtype=jnp.int32)
        # Each row's starts in order, then its end as often as it has fewer runs than the most.
        found = jnp.sort(jnp.where(begins, slots, length), axis=1)[:, : min(most, length)]
        found = found + length * jnp.arange(batch, dtype=jnp.int32)[:, None]
        starts = jnp.concatenate([found.reshape(-1), jnp.full(1, batch * length)]).astype(jnp.int32)
        live = ids >= 0
        runs = jnp.sum(begins, axis=1)
        in_order = (runs <= most) & (jnp.sum(begins & live, axis=1) == _distinct(ids))
        return cls(starts, live, in_order)


def _distinct(ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many ids of each row are not negative."""
    ordered = jnp.sort(ids, axis=1)
    first = jnp.concatenate([jnp.ones_like(ordered[:, :1], bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    return jnp.sum(first & (ordered >= 0), axis=1)


def most_runs(ids: object, stated: int, *, movable: bool) -> int:
    """The most runs of a row: counted where the ids are NumPy's, else as stated.

    Args:
      ids: integers [T] or [B, T], NumPy's or JAX's.
      stated: the number to return where they are JAX's.
      movable: whether tokens of a segment may be put side by side.

    Raises:
      KernelRefusedError: NumPy's ids have an id in two runs, and tokens may not be moved.
    """
    if not isinstance(ids, np.ndarray):
        return stated
    rows = np.where(np.atleast_2d(ids) < 0, -1, np.atleast_2d(ids))
    begins = np.concatenate([np.ones((len(rows), 1), bool), rows[:, 1:] != rows[:, :-1]], axis=1)
    again = [_again(row[begin]) for row, begin in zip(rows, begins, strict=True)]
    place = next((place for place, found in enumerate(again) if found is not None), None)
    if place is None:
        return int(begins.sum(axis=1).max())
    if movable:
        return max(len(np.unique(row)) for row in rows)
    raise KernelRefusedError(
        f"flywheel: id {again[place]} of row {place} of the mask's segments is in more than one run; sort the "
        "tokens by segment, or let another kernel serve the call."
    )


def _again(runs: np.ndarray) -> int | None:
    """The first id of several runs, None where there is none."""
    known, counts = np.unique(runs[runs >= 0], return_counts=True)
    return next((int(number) for number, count in zip(known, counts, strict=True) if count > 1), None)


def with_segments_together(
    function: Callable[..., tuple[jax.Array, ...]], most: int, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Calls a function with tokens moved so that those of a segment follow one another, in their order.

    Where they do so already, no token moves: the running program looks.

    Args:
      function: of arrays [B, T, …], the last of which are ids, to such arrays.
      most: runs of a row that the function takes.
      arrays: what it is given.
    """
    right = Sequences.of(arrays[-1], most).in_order.all()
    *moved, places = jax.lax.cond(right, _as_they_are, _side_by_side, *arrays)
    back: tuple[jax.Array, ...] = jax.lax.cond(right, _left, _put_back, places, *function(*moved))
    return back


def _as_they_are(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    ids = arrays[-1]
    return *arrays, jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)


def _side_by_side(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, sorted by the ids, and where each token went."""
    order = jnp.argsort(arrays[-1], axis=1, stable=True)
    return *(_taken(array, order) for array in arrays), jnp.argsort(order, axis=1).astype(jnp.int32)


def _left(places: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


def _put_back(places: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(_taken(array, places) for array in arrays)


def _taken(array: Array, order: Int[Array, "B T"]) -> Array:
    return jnp.take_along_axis(array, order.reshape(*order.shape, *(1,) * (array.ndim - 2)), axis=1)


def as_rows(ids: object, batch: int) -> jax.Array:
    """Ids as int32 [B, T], all that see nothing as −1."""
    array = jnp.asarray(ids)
    array = jnp.broadcast_to(array, (batch, array.shape[-1]))
    return jnp.where(array < 0, -1, array.astype(jnp.int32))
