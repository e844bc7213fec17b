"""Packed rows as the vendor takes them: the starts of sequences that follow one another."""

from __future__ import annotations

import dataclasses
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


def most_runs(ids: object, stated: int) -> int:
    """The most runs of a row: counted where the ids are NumPy's, else as stated.

    Raises:
      KernelRefusedError: NumPy's ids have an id in two runs.
    """
    if not isinstance(ids, np.ndarray):
        return stated
    rows = np.atleast_2d(ids)
    begins = np.concatenate([np.ones((len(rows), 1), bool), rows[:, 1:] != rows[:, :-1]], axis=1)
    for place, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        runs = row[begin & (row >= 0)]
        if len(runs) != len(np.unique(runs)):
            again = next(int(run) for run in runs if np.count_nonzero(runs == run) > 1)
            raise KernelRefusedError(
                f"flywheel: id {again} of row {place} of the mask's segments stands in more than one run; sort the "
                "tokens by segment, or let another kernel serve the call."
            )
    return int(begins.sum(axis=1).max())


def as_rows(ids: object, batch: int) -> jax.Array:
    """Ids as int32 [B, T], all that see nothing as −1."""
    array = jnp.asarray(ids)
    array = jnp.broadcast_to(array, (batch, array.shape[-1]))
    return jnp.where(array < 0, -1, array.astype(jnp.int32))
