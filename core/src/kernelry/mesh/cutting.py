"""Masks as their parts on several devices need them: with positions in arrays, which are cut like any other."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kernelry.masks.base import Mask
from kernelry.masks.composition import And, At, Not, Or
from kernelry.masks.positions import (
    Positions,
    StaticOffsets,
    StaticPositions,
    TracedOffset,
    TracedPositions,
    load_balanced_order,
)
from kernelry.request.request import Request
from kernelry.request.sharding import Sharding


def order_positions(request: Request, sharding: Sharding) -> np.ndarray | None:
    """The positions that an order gives to masks without any, [T]; None where tokens are contiguous."""
    if sharding.order == "contiguous" or request.q_len != request.kv_len:
        return None
    return load_balanced_order(request.q_len, sharding.size(sharding.ordered), sharding.order)


def with_traced_rows(mask: Mask, sharding: Sharding) -> Mask:
    """A mask whose static positions of several batch rows are arrays, where the batch is cut."""
    if not sharding.batch:
        return mask
    match mask:
        case At(mask=inside, query=query, kv=kv):
            return At(with_traced_rows(inside, sharding), _rows(query), _rows(kv))
        case And(parts=parts) | Or(parts=parts):
            return type(mask)(tuple(with_traced_rows(part, sharding) for part in parts))
        case Not(mask=inside):
            return Not(with_traced_rows(inside, sharding))
    return mask


def _rows(where: Positions | None) -> Positions | None:
    if isinstance(where, StaticOffsets) and len(where.values) > 1:
        return TracedOffset(jnp.asarray(where.values, jnp.int32))
    if isinstance(where, StaticPositions) and len(where.runs) > 1:
        return TracedPositions(jnp.asarray(where.array))
    return where
