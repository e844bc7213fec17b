"""The grid of blocks over T × S, and the steps over batch and heads.

A step takes some batch rows and some key/value heads through all their blocks: as many as keep a tile of logits in the
caches of a core. With all rows and heads in one tile, its logits would go to memory and back for every operation.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self, final

import jax
import jax.numpy as jnp
from jax import lax

from kernelry.plugin import Axis, BlockGrid, Mode, Request, Side, largest_divisor, round_up

_ALIGNED = 8
"""Slots: blocks shorter than asked are a multiple of it, so that rows of a block stay aligned to vectors."""

_TILE_BYTES = 1 << 20
"""Of a float32 tile of logits: two cores with 512 KiB of second-level cache each. benchmarks/blockwise.py."""

_WIDE_TILE_BYTES = 1 << 21
"""The same where a block of keys is all of them: most rows of tiles see fewer. benchmarks/blockwise.py."""


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Blocks of equal size over the queries and the keys; the last ones go beyond the end.

    Args:
      q_len, kv_len: T and S.
      block_q, block_kv: slots of a block.
      kv_start: the slot of the arrays at which the keys begin.
      batch, kv_heads, groups: B, K and G.
      step_batch, step_heads: the batch rows and the key/value heads of a step; they divide B and K.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    kv_start: int = 0
    batch: int = 1
    kv_heads: int = 1
    groups: int = 1
    step_batch: int = 1
    step_heads: int = 1

    @classmethod
    def of(cls, request: Request, batch: int, block_q: int, block_kv: int) -> Self:
        """Blocks of at most the sizes asked, of equal length, so that little lies beyond the end.

        Args:
          request: what the call asks for. batch: B, of the arrays, where it may be symbolic.
          block_q, block_kv: the sizes asked.
        """
        block_q, block_kv = _even(request.q_len, block_q), _even(request.kv_len, block_kv)
        if request.page_size is not None:
            block_kv = max(1, block_kv // request.page_size) * request.page_size
        most = _WIDE_TILE_BYTES if block_kv >= request.kv_len else _TILE_BYTES
        room = max(1, most // max(1, 4 * request.groups * block_q * block_kv))
        heads = largest_divisor(request.kv_heads, room)
        # Rows of a decoding batch are of all lengths: each goes through its own blocks.
        by_row = request.mode is Mode.DECODE or "batch" in request.symbolic_sizes
        together = heads == request.kv_heads and not by_row
        return cls(
            q_len=request.q_len,
            kv_len=request.kv_len,
            block_q=block_q,
            block_kv=block_kv,
            batch=batch,
            kv_heads=request.kv_heads,
            groups=request.groups,
            step_batch=largest_divisor(batch, room // heads) if together else 1,
            step_heads=heads,
        )

    @property
    def blocks(self) -> BlockGrid:
        """The blocks alone."""
        return BlockGrid(q_len=self.q_len, kv_len=self.kv_len, block_q=self.block_q, block_kv=self.block_kv)

    @property
    def rows(self) -> int:
        """The number of blocks of queries."""
        return self.blocks.rows

    @property
    def columns(self) -> int:
        """The number of blocks of keys."""
        return self.blocks.columns

    @property
    def batch_steps(self) -> int:
        """The steps over the batch, the outer ones."""
        return self.batch // self.step_batch

    @property
    def head_steps(self) -> int:
        """The steps over the heads."""
        return self.kv_heads // self.step_heads

    @property
    def steps(self) -> int:
        """All steps."""
        return self.batch_steps * self.head_steps

    @property
    def q_padding(self) -> int:
        """Slots of the last block of queries beyond T."""
        return self.rows * self.block_q - self.q_len

    @property
    def kv_padding(self) -> int:
        """Slots of the last block of keys beyond S."""
        return self.columns * self.block_kv - self.kv_len

    def batch_start(self, step: Any) -> Any:
        """The first batch row of a step."""
        return step // self.head_steps * self.step_batch

    def head_start(self, step: Any) -> Any:
        """The first key/value head of a step."""
        return step % self.head_steps * self.step_heads

    def keys(self, start: int, stop: int) -> Self:
        """The same blocks of queries with one block of keys, the slots from `start` up to `stop`."""
        return dataclasses.replace(self, kv_start=start, kv_len=stop - start, block_kv=stop - start)

    def of_step(self, array: jax.Array, step: Any) -> jax.Array:
        """[B or 1, N or 1, …] → what a step sees of it."""
        return self._part(array, step, 1, self.groups)

    def _part(self, array: jax.Array, step: Any, axis: int, groups: int) -> jax.Array:
        """The batch rows of a step, and its heads, which are along `axis`."""
        for at, start, size in (
            (0, self.batch_start(step), self.step_batch),
            (axis, self.head_start(step) * groups, self.step_heads * groups),
        ):
            if array.shape[at] not in (1, size):
                array = lax.dynamic_slice_in_dim(array, start, size, at)
        return array

    def query_side(self, row: jax.Array | int, q_heads: int) -> Side:
        """The queries of a block; slots beyond the end repeat the last one."""
        slots = row * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)
        return Side.of_slots(Axis.QUERY, jnp.minimum(slots, self.q_len - 1), q_heads=q_heads)

    def kv_side(self, column: jax.Array | int) -> Side:
        """The keys of a block; slots beyond the end repeat the last one."""
        slots = self.kv_start + jnp.minimum(self._kv_slots(column), self.kv_len - 1)
        return Side.of_slots(Axis.KV, slots)

    def kv_inside(self, column: jax.Array | int) -> jax.Array:
        """Whether the slots [block_kv] of a block of keys exist."""
        return self._kv_slots(column) < self.kv_len

    def _kv_slots(self, column: jax.Array | int) -> jax.Array:
        return column * self.block_kv + jnp.arange(self.block_kv, dtype=jnp.int32)

    def split_queries(self, array: jax.Array, step: Any, fill: float = 0.0) -> jax.Array:
        """[B, T, N, …] → [rows, b, k, G·block_q, …] of a step: the rows of a block's group are together.

        A step's part is copied once. All of it at once would be copied twice, and to memory that is new to the process.
        """
        padded = _padded(self._part(array, step, 2, self.groups), self.q_padding, fill)
        sizes = (self.step_batch, self.rows, self.block_q, self.step_heads, self.groups)
        apart = padded.reshape(*sizes, *padded.shape[3:])
        blocks = apart.transpose(1, 0, 3, 4, 2, *range(5, apart.ndim))
        together = (self.rows, self.step_batch, self.step_heads, self.groups * self.block_q)
        return blocks.reshape(*together, *padded.shape[3:])

    def put_queries(self, whole: jax.Array, blocks: jax.Array, step: Any) -> jax.Array:
        """Writes [rows, b, k, G·block_q, …] of a step into [B, T, N, …], the inverse of `split_queries`."""
        sizes = (self.rows, self.step_batch, self.step_heads, self.groups, self.block_q)
        apart = blocks.reshape(*sizes, *blocks.shape[4:])
        order = apart.transpose(1, 0, 4, 2, 3, *range(5, apart.ndim))
        part = order.reshape(self.step_batch, self.rows * self.block_q, -1, *blocks.shape[4:])
        return self._put(whole, lax.slice_in_dim(part, 0, self.q_len, axis=1), step, self.groups)

    def split_keys(self, array: jax.Array, step: Any) -> jax.Array:
        """[B, S, K, H] → [columns, b, k, block_kv, H] of a step."""
        padded = _padded(self._part(array, step, 2, 1), self.kv_padding, 0.0)
        apart = padded.reshape(self.step_batch, self.columns, self.block_kv, self.step_heads, padded.shape[3])
        return apart.transpose(1, 0, 3, 2, 4)

    def put_keys(self, whole: jax.Array, blocks: jax.Array, step: Any) -> jax.Array:
        """Writes [columns, b, k, block_kv, H] of a step into [B, S, K, H], the inverse of `split_keys`."""
        sizes = (self.step_batch, self.columns * self.block_kv, self.step_heads, blocks.shape[-1])
        part = blocks.transpose(1, 0, 3, 2, 4).reshape(sizes)
        return self._put(whole, lax.slice_in_dim(part, 0, self.kv_len, axis=1), step, 1)

    def _put(self, whole: jax.Array, part: jax.Array, step: Any, groups: int) -> jax.Array:
        if part.shape == whole.shape:
            return part
        starts = (self.batch_start(step), 0, self.head_start(step) * groups, *(0 for _ in whole.shape[3:]))
        return lax.dynamic_update_slice(whole, part, tuple(jnp.asarray(start, jnp.int32) for start in starts))


def _even(length: int, block: int) -> int:
    if length <= block:
        return length
    blocks = -(-length // block)
    least = -(-length // blocks)
    return min(block, round_up(least, _ALIGNED))


def _padded(array: jax.Array, more: int, fill: float) -> jax.Array:
    if not more:
        return array
    return jnp.pad(array, ((0, 0), (0, more), *((0, 0),) * (array.ndim - 2)), constant_values=fill)
