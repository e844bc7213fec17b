"""Which blocks each block visits: runs of neighbours that need no mask, and runs in which it must be evaluated.

What a mask says without arrays is known while tracing, from its block map. Segments, lengths and traced positions
narrow the runs when the program runs: to the first and the last block that may hold anything. A kernel's tables
are as long as T, not T²: there are as many runs in a row as the mask has gaps there, one or two for most.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from kernelry.masks import BlockKind
from kernelry.plugin import BlockGrid, Mask, decided_at_run_time, static_block_map


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """For each block of one side, in each batch row or in all: first and end of runs of blocks of the other side.

    Args:
      full: runs of blocks in which everything is visible.
      partial: runs in which the mask must be evaluated.
    """

    full: Int32[Array, "#B own runs 2"]
    partial: Int32[Array, "#B own runs 2"]

    @classmethod
    def of_queries(cls, masks: tuple[Mask, ...], grid: BlockGrid) -> Runs:
        """The blocks of keys that each block of queries visits."""
        return _narrowed(_static_kinds(_without_arrays(masks), grid), _with_arrays(masks), grid, by_keys=False)

    @classmethod
    def of_keys(cls, masks: tuple[Mask, ...], grid: BlockGrid) -> Runs:
        """The blocks of queries that visit each block of keys."""
        return _narrowed(_static_kinds(_without_arrays(masks), grid).T, _with_arrays(masks), grid, by_keys=True)


def _without_arrays(masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    return tuple(mask for mask in masks if mask.form.atoms[0].is_static)


def _with_arrays(masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    return tuple(mask for mask in masks if not mask.form.atoms[0].is_static)


def _static_kinds(masks: tuple[Mask, ...], grid: BlockGrid) -> np.ndarray:
    """[rows, columns] of BlockKind; the last column is PARTIAL where it goes beyond S."""
    kinds = np.full((grid.rows, grid.columns), BlockKind.FULL, np.int8)
    if masks:
        kinds = static_block_map(masks, grid.q_len, grid.kv_len, grid.block_q, grid.block_kv).copy()
    if grid.kv_len % grid.block_kv:
        kinds[:, -1] = np.minimum(kinds[:, -1], BlockKind.PARTIAL)
    return kinds


def _narrowed(kinds: np.ndarray, masks: tuple[Mask, ...], grid: BlockGrid, *, by_keys: bool) -> Runs:
    full, partial = (jnp.asarray(_runs(kinds == kind))[None] for kind in (BlockKind.FULL, BlockKind.PARTIAL))
    if not masks:
        return Runs(full, partial)
    some, every = _hulls(masks, grid, by_keys=by_keys)
    full, partial = (jnp.broadcast_to(runs, (some.shape[0], *runs.shape[1:])) for runs in (full, partial))
    before = jnp.stack([full[..., 0], jnp.minimum(full[..., 1], every[..., 0])], axis=-1)
    after = jnp.stack([jnp.maximum(full[..., 0], every[..., 1]), full[..., 1]], axis=-1)
    return Runs(_within(full, every), _within(jnp.concatenate([partial, before, after], axis=2), some))


def _within(runs: jax.Array, hull: jax.Array) -> jax.Array:
    """The part of runs [.., own, R, 2] inside the hulls [.., own, 1, 2]; an empty run ends where it starts."""
    start, end = jnp.maximum(runs[..., 0], hull[..., 0]), jnp.minimum(runs[..., 1], hull[..., 1])
    return jnp.stack([start, jnp.maximum(start, end)], axis=-1)


def _hulls(masks: tuple[Mask, ...], grid: BlockGrid, *, by_keys: bool) -> tuple[jax.Array, jax.Array]:
    """From the first to the last block that may hold anything, and blocks that hold everything; [B or 1, own, 1, 2]."""
    decided = [decided_at_run_time(mask, grid) for mask in masks]
    some = functools.reduce(operator.and_, (each.some for each in decided))
    every = functools.reduce(operator.and_, (each.full for each in decided))
    axis = 1 if by_keys else 2
    outer, inner = _hull(some, axis), _hull(every, axis)
    without_gaps = inner[..., 1] - inner[..., 0] == every.sum(axis=axis)
    return outer[:, :, None], jnp.where(without_gaps[..., None], inner, 0)[:, :, None]


def _hull(found: jax.Array, axis: int) -> jax.Array:
    """First and end of what is True along an axis, [B, own, 2]; 0 and 0 where nothing is."""
    count = found.shape[axis]
    shape = (1, count, 1) if axis == 1 else (1, 1, count)
    places = jnp.arange(count, dtype=jnp.int32).reshape(shape)
    end = jnp.where(found, places + 1, 0).max(axis=axis)
    first = jnp.where(found, places, count).min(axis=axis)
    return jnp.stack([jnp.minimum(first, end), end], axis=-1)


def _runs(found: np.ndarray) -> np.ndarray:
    """Runs of True in each row of [own, other]: int32 [own, most runs of a row, 2]."""
    edges = np.diff(np.pad(found.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    counts = np.bincount(rows, minlength=len(found))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    runs = np.zeros((len(found), counts.max(initial=0), 2), np.int32)
    runs[rows, place] = np.stack([starts, ends], axis=1)
    return runs
