"""Masks as their parts on several devices need them: with positions in arrays, which are cut like any other."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from kernelry.masks.base import Mask
from kernelry.masks.composition import And, At, Not, Or
from kernelry.masks.positions import Positions, StaticOffsets, StaticPositions, TracedOffset, TracedPositions
from kernelry.masks.shard_pairs import load_balanced_order
from kernelry.masks.side import Side
from kernelry.request.request import Request
from kernelry.request.sharding import Sharding


def order_positions(request: Request, sharding: Sharding) -> np.ndarray | None:
    """The positions that an order gives to masks without any, [T]; None where tokens are contiguous."""
    if sharding.order == "contiguous" or request.q_len != request.kv_len:
        return None
    return load_balanced_order(request.q_len, sharding.size(sharding.ordered), sharding.order)


def with_traced_positions(mask: Mask, request: Request, sharding: Sharding) -> Mask:
    """A mask whose arrays tell queries and keys apart, its positional atoms at positions given by arrays."""
    order = order_positions(request, sharding)
    query = np.arange(request.q_len, dtype=np.int32) if order is None else order
    kv = np.arange(request.kv_len, dtype=np.int32) if order is None else order
    return _placed(mask, (TracedPositions(jnp.asarray(query)), TracedPositions(jnp.asarray(kv))), request)


def _placed(mask: Mask, places: tuple[Positions, Positions], request: Request) -> Mask:
    match mask:
        case At(mask=inside, query=query, kv=kv):
            lengths = request.q_len, request.kv_len
            own = (
                place if given is None else _as_array(given, side, length)
                for given, place, side, length in zip((query, kv), places, (Side.query, Side.kv), lengths, strict=True)
            )
            return _placed(inside, tuple(own), request)  # type: ignore[arg-type]
        case And(parts=parts) | Or(parts=parts):
            return type(mask)(tuple(_placed(part, places, request) for part in parts))
        case Not(mask=inside):
            return Not(_placed(inside, places, request))
    spread = mask.spread()
    if not spread.positional:
        return spread
    return At(spread, places[0] if spread.uses_query_positions else None, places[1])


def _as_array(given: Positions, side: Any, length: int) -> TracedPositions:
    placed = side(length).at(given).positions
    return TracedPositions(jnp.asarray(placed, jnp.int32).reshape(-1, length))


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


__all__ = ["order_positions", "with_traced_positions", "with_traced_rows"]
