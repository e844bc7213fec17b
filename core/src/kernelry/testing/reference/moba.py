"""Which blocks of keys a query attends to in a mixture of block attention (MoBA), by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from kernelry.errors import ArgumentError


def reference_select_blocks(
    query: Float[Any, "B T N H"],
    key: Float[Any, "B S K H"],
    *,
    chunk_size: int,
    top_k: int,
    query_positions: Int[Any, "B T"] | Int[Any, " T"],
) -> Bool[np.ndarray, "B N T blocks"]:
    """Says which blocks of keys each query keeps.

    Block j holds the keys at positions j · chunk_size … (j + 1) · chunk_size − 1, the last one those
    there are. Its gate is ⟨query, mean of its keys⟩, per query head. A query at position p is
    in block p // chunk_size, which it always keeps and which counts among `top_k`; blocks after
    it are never kept; of those before it the best fill the rest, ties going to the lower index.
    A query beyond the last block fills all of `top_k` with blocks before it.

    Args:
      query: query head n reads key head n // G.
      key: the key of slot s is at position s.
      chunk_size: keys in a block, at least 1.
      top_k: blocks a query keeps at most, at least 1.
      query_positions: of the queries.

    Raises:
      ArgumentError: `chunk_size` or `top_k` below 1.
    """
    if chunk_size < 1 or top_k < 1:
        raise ArgumentError(f"chunk_size and top_k must be at least 1, got {chunk_size} and {top_k}.")
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, q_len, q_heads, _ = q.shape
    positions = np.broadcast_to(np.asarray(query_positions, np.int64), (batch, q_len))
    groups, blocks = q_heads // k.shape[2], -(-k.shape[1] // chunk_size)
    keep = np.zeros((batch, q_heads, q_len, blocks), bool)
    for b, n, t in np.ndindex(batch, q_heads, q_len):
        own = int(positions[b, t]) // chunk_size
        means = [k[b, j * chunk_size : (j + 1) * chunk_size, n // groups].mean(axis=0) for j in range(blocks)]
        gates = [float(q[b, t, n] @ mean) for mean in means]
        before = sorted(range(min(max(own, 0), blocks)), key=lambda j: (-gates[j], j))
        kept = [own, *before] if 0 <= own < blocks else before
        keep[b, n, t, kept[:top_k]] = True
    return keep
