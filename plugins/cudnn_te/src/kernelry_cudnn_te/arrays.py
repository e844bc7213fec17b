"""What both kernels do to the arrays that cuDNN is handed besides queries, keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def depending_on(array: jax.Array, other: jax.Array) -> jax.Array:
    """Returns an array as something computed from another of as many dimensions or more: mapped and cut as it is.

    JAX and transformer-engine take lengths to be cut as the queries are, and leave them as they find them.
    """
    first = (slice(None),) * array.ndim + (0,) * (other.ndim - array.ndim)
    bits = jax.lax.bitcast_convert_type(other[first].astype(jnp.bfloat16), jnp.uint16).astype(jnp.int32)
    return array + (bits >> 16).astype(array.dtype)  # 0; no simplifier before the partitioner knows that


def rounded(bias: jax.Array, dtype: str) -> jax.Array:
    """Returns a bias in the query's dtype, because cuDNN reads no other; what is beyond its range becomes its limit."""
    if bias.dtype == dtype:
        return bias
    most = float(jnp.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return jnp.clip(bias.astype(jnp.float32), -most, most).astype(dtype)
