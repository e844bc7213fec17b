"""What a case takes at least: counted from its request and from the pairs that its mask, with its arrays, shows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kernelry.aot.pairs import PairCounts, count_pairs
from kernelry.aot.work import Work
from kernelry.masks.base import Mask
from kernelry.masks.side import Axis, Side
from kernelry.request.request import Request

_MOST_PAIRS = 2**33
"""Booleans that are evaluated, some ten seconds on one core of a CPU; of more, parts that depend on arrays are left
out, and named."""
_CHUNK = 2**24
"""Booleans in memory at once."""


def work_of(request: Request, mask: Mask) -> Work:
    """Counts the FLOPs of the products over visible pairs, and the bytes of operands and results, each moved once.

    Args:
      request: the call.
      mask: with arrays that hold values.

    Returns:
      The work; `assumed` names the parts of the mask that were left out, which happens only where there are more than
      2**33 pairs.
    """
    found = _evaluated(request, mask) if jax.tree.leaves(mask) else None
    return Work.of_pairs(request, found or count_pairs(mask, request.batch, request.q_len, request.kv_len))


def _evaluated(request: Request, mask: Mask) -> PairCounts | None:
    """Counts by evaluating the mask a few queries at a time; None where that takes too long."""
    held = jax.tree.map(np.asarray, mask)
    rows = _visible(held, request, np.arange(1)).shape[:2]
    width = int(np.prod(rows)) * request.kv_len
    if width * request.q_len > _MOST_PAIRS:
        return None
    step = max(1, _CHUNK // width)
    pairs, queries, keys = 0, 0, np.zeros((*rows, request.kv_len), bool)
    for start in range(0, request.q_len, step):
        visible = _visible(held, request, np.arange(start, min(start + step, request.q_len)))
        pairs, queries = pairs + int(visible.sum()), queries + int(visible.any(axis=-1).sum())
        keys |= visible.any(axis=2)
    share = request.batch / rows[0] / rows[1]  # over the batch, and of one head
    read = keys.reshape(rows[0], -1, request.groups if rows[1] > 1 else 1, request.kv_len).any(axis=2)
    of_kv_heads = request.batch / rows[0] / read.shape[1]
    return PairCounts(pairs * share, queries * share, int(read.sum()) * of_kv_heads)


def _visible(mask: Mask, request: Request, slots: np.ndarray) -> np.ndarray:
    """What some queries see, [B or 1, N or 1, queries, S]."""
    query = Side.of_slots(Axis.QUERY, slots.astype(np.int32), q_heads=request.q_heads)
    with jax.ensure_compile_time_eval():  # a predicate may be written with jax.numpy
        found: Any = np.asarray(mask.evaluate(query, Side.kv(request.kv_len, np)))
    return np.broadcast_to(found, (*found.shape[:2], len(slots), request.kv_len))
