"""Attention on a mesh: which axes cut a call, how queries meet the keys of other devices, and the order of tokens.

    with jax.set_mesh(mesh), kernelry.use(sharding=Sharding(batch="data", heads="tensor", sequence="context")):
        kernelry.attention(query, key, value, mask=masks.Causal())

A load-balanced causal mask is `Causal()` at permuted positions: put the tokens in that order and say so,

    sharding = Sharding(sequence="context", order="dual_chunk")
    query, key, value = (reorder_for_load_balance(array, size) for array in (query, key, value))
    out = undo_reorder(shard_attention(query, key, value, mask=masks.Causal(), sharding=sharding), size)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.api import attention
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks.base import Mask, is_mask
from kernelry.masks.fit import not_a_mask
from kernelry.masks.shard_pairs import best_order
from kernelry.policy.scope import use
from kernelry.request.context_parallel import ContextParallel, load_balanced_order
from kernelry.request.sharding import Sharding

__all__ = [
    "ContextParallel",
    "Sharding",
    "choose_order",
    "load_balanced_order",
    "reorder_for_load_balance",
    "shard_attention",
    "undo_reorder",
]


def shard_attention(query: Any, key: Any, value: Any, *, sharding: Sharding | str | None = None, **options: Any) -> Any:
    """`kernelry.attention` with a sharding for this call alone.

    Args:
      query, key, value: as in `kernelry.attention`, whole arrays of any sharding.
      sharding: how the call is cut over the axes of the active mesh, or its text; None is that of `kernelry.use`.
      options: the other arguments of `kernelry.attention`.

    Returns:
      What `kernelry.attention` returns, cut as query is.

    Raises:
      ShapeError: a size does not divide over its axes; the message has the arithmetic.
      ArgumentError: the mesh has no such axis, or another argument is invalid.
      NoKernelError: no installed kernel serves the shards; the message says why for each.
    """
    with use(sharding=sharding):
        return attention(query, key, value, **options)


def choose_order(mask: Mask, length: int, size: int) -> str:
    """Returns the order of tokens in which a ring of devices waits least for the slowest: what `order="auto"` means.

    A causal mask gets `dual_chunk`; windows and chunks, whose rings end after few steps, and masks that are the same
    for every query get `contiguous`. A pipeline that orders the tokens calls this with the mask and length of the
    layers that follow.

    Args:
      mask: of queries and keys of the same length. What segment ids and other arrays hide counts as visible.
      length: of the whole sequence.
      size: devices of the ring, those along the axes of `sequence` but not of `ulysses`.

    Returns:
      `contiguous`, `dual_chunk` or `striped`; the last two are for `reorder_for_load_balance`.

    Raises:
      ArgumentError: the length or size is not a positive integer.
      ShapeError: the mask is none, or the length does not divide.
    """
    if not is_mask(mask):
        raise ShapeError(f"choose_order takes a kernelry mask, got {not_a_mask(mask)}.")
    for name, number in (("length", length), ("size", size)):
        if type(number) is not int or number < 1:
            raise ArgumentError(f"choose_order: {name} must be a positive integer, got {number!r}.")
    return best_order(mask.form, length, size)


def reorder_for_load_balance(array: jax.Array, size: int, *, axis: int = 1, order: str = "dual_chunk") -> jax.Array:
    """Puts the tokens along an axis into the order of `load_balanced_order`.

    Raises:
      ArgumentError: the order is unknown, or the axis does not divide.
    """
    return jnp.take(array, load_balanced_order(array.shape[axis], size, order), axis=axis)


def undo_reorder(array: jax.Array, size: int, *, axis: int = 1, order: str = "dual_chunk") -> jax.Array:
    """Undoes `reorder_for_load_balance`.

    Raises:
      ArgumentError: the order is unknown, or the axis does not divide.
    """
    return jnp.take(array, np.argsort(load_balanced_order(array.shape[axis], size, order)), axis=axis)
