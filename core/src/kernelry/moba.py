"""Mixture of block attention: each query attends to the blocks of keys whose mean matches it best."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernelry.errors import ArgumentError, ShapeError
from kernelry.kernel.partial import unchecked
from kernelry.masks import BlockSelection, Mask
from kernelry.request.arguments import known_length


def select_blocks(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    chunk_size: int,
    top_k: int,
    query_positions: Int[Array, "#B T"],
) -> Mask:
    """Chooses blocks of keys by gate[b, n, t, c] = ⟨query, mean of the keys in block c⟩.

    A query's own block is always kept and counts among the `top_k`; blocks after it never are; of
    equal gates the earlier block wins. Key s is at position s. Inside the blocks nothing is
    hidden: MoBA attends to `masks.Causal().at(query_positions=…) & select_blocks(…)`. No gradient
    passes through the choice.

    Args:
      query: [B, T, N, H], floating.
      key: [B, S, K, H], floating; K divides N. The last block averages the keys it has.
      chunk_size: keys per block, ≥ 1.
      top_k: blocks kept per query, ≥ 1.
      query_positions: integers [T] or [B, T].

    Returns:
      A BlockSelection with keep [B, N, T, blocks], already at the query positions.

    Raises:
      ShapeError: an array's rank or shape does not fit.
      ArgumentError: chunk_size or top_k is not a positive integer.

    Source:
      Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, section 2.2.
    """
    _check(query, key, chunk_size, top_k)
    positions = query_positions if isinstance(query_positions, jax.Array) else np.asarray(query_positions)
    if positions.shape not in ((query.shape[1],), query.shape[:2]):
        raise ShapeError(f"query_positions must be [T] or [B, T] of {query.shape[:2]}, got shape {positions.shape}.")
    chunk_size, top_k = int(chunk_size), int(top_k)
    with unchecked():
        keep = _chosen(query, key, positions, chunk_size, top_k)
    return BlockSelection(keep, chunk_size).at(query_positions=positions)


def _chosen(
    query: jax.Array, key: jax.Array, positions: jax.Array | np.ndarray, chunk_size: int, top_k: int
) -> Bool[Array, "B N T blocks"]:
    gate = _gate(lax.stop_gradient(query), lax.stop_gradient(key), chunk_size)
    own = jnp.asarray(positions).reshape(-1, 1, query.shape[1], 1) // chunk_size
    block = jnp.arange(gate.shape[-1]).reshape(1, 1, 1, -1)
    gate = jnp.where(block == own, jnp.inf, jnp.where(block > own, -jnp.inf, gate))
    chosen = lax.top_k(gate, min(top_k, gate.shape[-1]))[1]
    found: jax.Array = (chosen[..., None] == block[..., None, :]).any(axis=-2) & (block <= own)
    return found


def _gate(query: jax.Array, key: jax.Array, chunk_size: int) -> Float[Array, "B N T blocks"]:
    batch, kv_len, kv_heads, head_dim = key.shape
    blocks = -(-kv_len // chunk_size)
    padded = jnp.pad(key.astype(jnp.float32), ((0, 0), (0, blocks * chunk_size - kv_len), (0, 0), (0, 0)))
    sums = padded.reshape(batch, blocks, chunk_size, kv_heads, head_dim).sum(axis=2)
    counts = np.minimum(chunk_size, kv_len - chunk_size * np.arange(blocks)).astype(np.float32)
    means = sums / counts.reshape(1, blocks, 1, 1)
    grouped = query.astype(jnp.float32).reshape(*query.shape[:2], kv_heads, -1, head_dim)
    gate = jnp.einsum("BTKGH,BCKH->BKGTC", grouped, means, precision=lax.Precision.HIGHEST)
    return gate.reshape(batch, query.shape[2], query.shape[1], blocks)


def _check(query: Any, key: Any, chunk_size: Any, top_k: Any) -> None:
    for name, number in (("chunk_size", chunk_size), ("top_k", top_k)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
            raise ArgumentError(f"{name} must be a positive integer, got {number!r}.")
    for name, array, layout in (("query", query, "[B, T, N, H]"), ("key", key, "[B, S, K, H]")):
        if np.ndim(array) != 4:
            raise ShapeError(f"{name} must be {layout}, got shape {np.shape(array)}.")
    known_length("key", key)
    (batch, _, q_heads, head_dim), (kv_batch, _, kv_heads, kv_dim) = query.shape, key.shape
    if (batch, head_dim) != (kv_batch, kv_dim) or not kv_heads or q_heads % kv_heads:
        raise ShapeError(f"key [B, S, K, H] must suit query of shape {query.shape}, got {key.shape}; K divides N.")
