"""The grid of blocks over T × S."""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jax import lax

from kernelry.plugin import Axis, Side

_ALIGNED = 8
"""Slots: blocks shorter than asked are a multiple of it, so that rows of a block stay aligned to vectors."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """Blocks of equal size over the queries and the keys; the last ones go beyond the end.

    Args:
      q_len, kv_len: T and S.
      block_q, block_kv: slots of a block.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int

    @classmethod
    def of(cls, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Grid:
        """Blocks of at most the sizes asked, of equal length, so that little lies beyond the end."""
        return cls(q_len, kv_len, _even(q_len, block_q), _even(kv_len, block_kv))

    @property
    def rows(self) -> int:
        """The number of blocks of queries."""
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        """The number of blocks of keys."""
        return -(-self.kv_len // self.block_kv)

    @property
    def q_padding(self) -> int:
        """Slots of the last block of queries beyond T."""
        return self.rows * self.block_q - self.q_len

    @property
    def kv_padding(self) -> int:
        """Slots of the last block of keys beyond S."""
        return self.columns * self.block_kv - self.kv_len

    def query_side(self, row: jax.Array | int, q_heads: int) -> Side:
        """The queries of a block; slots beyond the end repeat the last one."""
        slots = row * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)
        return Side.of_slots(Axis.QUERY, jnp.minimum(slots, self.q_len - 1), q_heads=q_heads)

    def kv_side(self, column: jax.Array | int) -> Side:
        """The keys of a block; slots beyond the end repeat the last one."""
        slots = column * self.block_kv + jnp.arange(self.block_kv, dtype=jnp.int32)
        return Side.of_slots(Axis.KV, jnp.minimum(slots, self.kv_len - 1))

    def kv_inside(self, column: jax.Array | int) -> jax.Array:
        """Whether the slots [block_kv] of a block of keys exist."""
        return column * self.block_kv + jnp.arange(self.block_kv, dtype=jnp.int32) < self.kv_len

    def split_queries(self, array: jax.Array, groups: int, fill: float = 0.0) -> jax.Array:
        """[B, T, N, …] → [rows, B, K, G·block_q, …]: the rows of a block's group stand together."""
        padded = _padded(array, self.q_padding, fill)
        batch, _, heads, *rest = padded.shape
        blocks = padded.reshape(batch, self.rows, self.block_q, heads // groups, groups, *rest)
        order = (1, 0, 3, 4, 2, *range(5, blocks.ndim))
        return blocks.transpose(order).reshape(self.rows, batch, heads // groups, groups * self.block_q, *rest)

    def join_queries(self, blocks: jax.Array, groups: int) -> jax.Array:
        """[rows, B, K, G·block_q, …] → [B, T, N, …], the inverse of `split_queries`."""
        _, batch, kv_heads, _, *rest = blocks.shape
        apart = blocks.reshape(self.rows, batch, kv_heads, groups, self.block_q, *rest)
        order = (1, 0, 4, 2, 3, *range(5, apart.ndim))
        whole = apart.transpose(order).reshape(batch, self.rows * self.block_q, kv_heads * groups, *rest)
        return lax.slice_in_dim(whole, 0, self.q_len, axis=1)

    def split_keys(self, array: jax.Array) -> jax.Array:
        """[B, S, K, H] → [columns, B, K, block_kv, H]."""
        padded = _padded(array, self.kv_padding, 0.0)
        batch, _, heads, width = padded.shape
        return padded.reshape(batch, self.columns, self.block_kv, heads, width).transpose(1, 0, 3, 2, 4)

    def join_keys(self, blocks: jax.Array) -> jax.Array:
        """[columns, B, K, block_kv, H] → [B, S, K, H], the inverse of `split_keys`."""
        _, batch, heads, _, width = blocks.shape
        whole = blocks.transpose(1, 0, 3, 2, 4).reshape(batch, self.columns * self.block_kv, heads, width)
        return lax.slice_in_dim(whole, 0, self.kv_len, axis=1)


def _even(length: int, block: int) -> int:
    if length <= block:
        return length
    blocks = -(-length // block)
    least = -(-length // blocks)
    return min(block, -(-least // _ALIGNED) * _ALIGNED)


def _padded(array: jax.Array, more: int, fill: float) -> jax.Array:
    if not more:
        return array
    return jnp.pad(array, ((0, 0), (0, more), *((0, 0),) * (array.ndim - 2)), constant_values=fill)
