"""Which blocks of keys each block of queries visits, and in which of them the mask must be evaluated.

What a mask says without arrays is known while tracing, from its block map. What depends on arrays (segments, lengths,
traced positions) is decided when the program runs, from the least and the greatest id or position of each block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from kernelry.masks import BlockKind
from kernelry.plugin import Mask, decided_at_run_time, static_block_map
from kernelry_dot_product.blockwise.grid import Grid

Kinds: TypeAlias = "np.ndarray | jax.Array"
"""[batch steps or 1, blocks of queries, blocks of keys] of BlockKind; NumPy where it is known while tracing."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """For each block of one side the blocks of the other that hold anything, FULL ones first.

    Args:
      order: per batch step, or for all: the other side's blocks; those to visit come first.
      full: how many of them need no mask. some: how many hold anything.
      any_full, any_partial: False where it is known while tracing that there are none.
      all_full: True where it is known while tracing that there are no others.
    """

    order: Int32[Array, "... own other"]
    full: Int32[Array, "... own"]
    some: Int32[Array, "... own"]
    any_full: bool
    any_partial: bool
    all_full: bool

    def of_step(self, step: jax.Array, grid: Grid) -> Visits:
        """Those of the batch rows of one step."""

        def own(array: jax.Array) -> jax.Array:
            place = step // grid.head_steps if array.shape[0] != 1 else 0
            found: jax.Array = lax.dynamic_index_in_dim(array, place, keepdims=False)
            return found

        return dataclasses.replace(self, order=own(self.order), full=own(self.full), some=own(self.some))


def visits_of_queries(kinds: Kinds) -> Visits:
    """The blocks of keys that each block of queries visits."""
    return _visits(kinds)


def visits_of_keys(kinds: Kinds) -> Visits:
    """The blocks of queries that visit each block of keys."""
    return _visits(kinds.swapaxes(1, 2))


def _visits(kinds: Kinds) -> Visits:
    xp = np if isinstance(kinds, np.ndarray) else jnp
    order = xp.argsort(-kinds.astype(np.int32), axis=2, stable=True)
    full, some = (kinds == BlockKind.FULL).sum(axis=2), (kinds != BlockKind.EMPTY).sum(axis=2)
    known = isinstance(kinds, np.ndarray)
    return Visits(
        jnp.asarray(order, jnp.int32),
        jnp.asarray(full, jnp.int32),
        jnp.asarray(some, jnp.int32),
        any_full=not known or bool((full > 0).any()),
        any_partial=not known or bool((full < some).any()),
        all_full=known and bool((kinds == BlockKind.FULL).all()),
    )


def kinds_of(masks: tuple[Mask, ...], grid: Grid) -> Kinds:
    """Classifies the blocks of a conjunction; the last blocks of keys are PARTIAL where the grid goes beyond S."""
    static = tuple(mask for mask in masks if mask.form.atoms[0].is_static)
    dynamic = tuple(mask for mask in masks if not mask.form.atoms[0].is_static)
    kinds: Kinds = _static_kinds(static, grid)
    if grid.kv_padding:
        kinds = kinds.copy()
        kinds[:, :, -1] = np.minimum(kinds[:, :, -1], BlockKind.PARTIAL)
    if not dynamic:
        return kinds
    if grid.rows == grid.columns == 1:  # visited anyhow
        return np.minimum(kinds, BlockKind.PARTIAL)
    some = full = jnp.ones((1, grid.rows, grid.columns), bool)
    for mask in dynamic:
        decided = decided_at_run_time(mask, grid.blocks)
        some, full = some & decided.some, full & decided.full
    some, full = _by_step(some, grid, jnp.any), _by_step(full, grid, jnp.all)
    found = jnp.where(some, jnp.where(full, BlockKind.FULL, BlockKind.PARTIAL), BlockKind.EMPTY)
    return jnp.minimum(jnp.asarray(kinds, jnp.int32), found.astype(jnp.int32))


def _by_step(decided: jax.Array, grid: Grid, reduce: Callable[..., jax.Array]) -> jax.Array:
    """[B or 1, rows, columns] → [batch steps or 1, rows, columns]."""
    if decided.shape[0] == 1:
        return decided
    return reduce(decided.reshape(grid.batch_steps, grid.step_batch, grid.rows, grid.columns), axis=1)


def _static_kinds(masks: tuple[Mask, ...], grid: Grid) -> np.ndarray:
    if not masks:
        return np.full((1, grid.rows, grid.columns), BlockKind.FULL, np.int8)
    return static_block_map(masks, grid.q_len, grid.kv_len, grid.block_q, grid.block_kv)[None]
