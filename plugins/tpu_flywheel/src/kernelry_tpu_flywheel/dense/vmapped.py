"""What `jax.vmap` makes of a call: its axis joins the batch. The vendor's kernels have no batching rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def batched(function: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function of arrays that begin with the batch, under `jax.vmap` called once with a larger batch.

    Args:
      function: takes arrays [B, …] and returns arrays [B, …], each row of which depends on the same row alone.
    """
    once: Any = jax.custom_batching.custom_vmap(function)

    def join(size: int, mapped: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        wide = (
            array if has_axis else jnp.broadcast_to(array, (size, *array.shape))
            for array, has_axis in zip(arrays, mapped, strict=True)
        )
        found = once(*(array.reshape(-1, *array.shape[2:]) for array in wide))
        parted = tuple(array.reshape(size, -1, *array.shape[1:]) for array in found)
        return parted, (True,) * len(parted)

    once.def_vmap(join)
    call: Callable[..., tuple[jax.Array, ...]] = once
    return call
