"""Arrays in the layout of the vendors' kernels, and back; masks as booleans."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kernelry.plugin import Inputs, Partial, Request, Side

MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
"""What both vendors put in place of a hidden logit."""

_NOTHING_SEEN = 0.5 * MASK_VALUE
"""A row that sees nothing keeps the mask value, about −2.4e38, as the largest of its logits."""


def heads_first(inputs: Inputs, request: Request) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The vendors' layout, [B, heads, length, dim], with the scale in the queries: they take none."""
    return swapped(scaled(inputs.query, request)), swapped(inputs.key), swapped(inputs.value)


def scaled(query: jax.Array, request: Request) -> jax.Array:
    """The query, or its gradient, times the scale."""
    # In float32: as a bfloat16 number the scale itself would be off by up to 0.4 %.
    return (query.astype(jnp.float32) * request.scale).astype(query.dtype)


def swapped(array: jax.Array) -> jax.Array:
    """Swaps heads and length."""
    return array.swapaxes(1, 2)


def visible(inputs: Inputs, request: Request, *, batch: int = 1, q_len: int = 1) -> Bool[Array, "#B #N #T S"]:
    """Evaluates the whole mask beforehand; batch, heads and T stay 1 where it does not differ by them.

    Args:
      inputs, request: of the call.
      batch, q_len: the least of B and T in the result.
    """
    query, kv = Side.query(request.q_len, q_heads=request.q_heads), Side.kv(request.kv_len)
    found: jax.Array = jnp.ones((batch, 1, q_len, request.kv_len), bool)
    for mask in inputs.mask:
        found = found & mask.evaluate(query, kv)
    return found


def with_empty_rows(
    out: Float[Array, "B T N D"],
    lse: Float[Array, "B N T"],
    request: Request,
    max_logits: Float[Array, "B N"] | None = None,
) -> Partial:
    """Gives rows that see nothing their meaning, 0 and −inf; the vendors report NaN or nonsense there."""
    if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        empty = lse < _NOTHING_SEEN
        out = jnp.where(swapped(empty[..., None]), jnp.zeros((), out.dtype), out)
        lse = jnp.where(empty, -jnp.inf, lse)
    return Partial(out, lse=lse, max_logits=max_logits, dtype=request.dtype)


def largest(tops: Float[Array, "B N T"]) -> Float[Array, "B N"]:
    """The largest of the rows' largest logits; −inf where no row sees anything."""
    top = tops.max(axis=2)
    return jnp.where(top < _NOTHING_SEEN, -jnp.inf, top)
