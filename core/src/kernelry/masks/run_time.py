"""What a block of a mask holds, and what masks that depend on arrays say of whole blocks when the program runs."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, final

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

    from kernelry.masks.base import Mask
    from kernelry.masks.composition import Conjunct


@final
class BlockKind(enum.IntEnum):
    """What a block of the mask holds."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockGrid:
    """Blocks of equal size over the queries and the keys; the last ones may reach beyond the end.

    Args:
      q_len, kv_len: T and S.
      block_q, block_kv: slots of a block.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return self.rows, self.columns

    @property
    def rows(self) -> int:
        """The number of blocks of queries."""
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        """The number of blocks of keys."""
        return -(-self.kv_len // self.block_kv)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Decided:
    """For each batch row and block whether it may hold anything, and whether it certainly holds everything.

    Both err on the safe side: `some` may be True of an empty block, `full` False of a full one. The batch is 1 where
    all its rows are alike.
    """

    some: Bool[Array, "#B rows columns"]
    full: Bool[Array, "#B rows columns"]

    @classmethod
    def unknown(cls, grid: BlockGrid) -> Decided:
        """Nothing is certain."""
        shape = (1, grid.rows, grid.columns)
        return cls(jnp.ones(shape, bool), jnp.zeros(shape, bool))

    @classmethod
    def spread(cls, some: jax.Array, full: jax.Array, grid: BlockGrid) -> Decided:
        """Of arrays that have one row, or one column, for all that are alike."""
        shape = (some.shape[0], grid.rows, grid.columns)
        return cls(jnp.broadcast_to(some, shape), jnp.broadcast_to(full, shape))


def decided_at_run_time(mask: Mask, grid: BlockGrid) -> Decided:
    """Classifies the blocks of one atom of a conjunction from the least and the greatest id or position of each."""
    return _of_conjunct(mask.conjuncts()[0], grid)


def _of_conjunct(conjunct: Conjunct, grid: BlockGrid) -> Decided:
    if not conjunct.branches:
        return conjunct.mask.decide(conjunct, grid)
    some = full = jnp.zeros((1, grid.rows, grid.columns), bool)
    for branch in conjunct.branches:
        branch_some, branch_full = jnp.ones_like(some), jnp.ones_like(full)
        for inside in branch:
            part = _of_conjunct(inside, grid)
            branch_some, branch_full = branch_some & part.some, branch_full & part.full
        some, full = some | branch_some, full | branch_full
    return Decided(some, full)


def tiles(values: jax.Array, block: int, blocks: int) -> jax.Array:
    """[rows, L] → [rows, blocks, block]; the last value is repeated beyond the end."""
    more = blocks * block - values.shape[1]
    return jnp.pad(values, ((0, 0), (0, more)), mode="edge").reshape(values.shape[0], blocks, block)
