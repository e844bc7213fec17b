"""Attention across devices: how sequences are shared out, and in which order.

A load-balanced causal mask is `Causal()` at permuted positions:

    order = load_balanced_order(T, size)
    with kernelry.use(context_parallel=ContextParallel("context", "ring")):
        kernelry.attention(
            reorder_for_load_balance(query, size), …, mask=masks.Causal().at(query_positions=order, kv_positions=order)
        )
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.request.context_parallel import ContextParallel, load_balanced_order

__all__ = ["ContextParallel", "load_balanced_order", "reorder_for_load_balance", "undo_reorder"]


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
