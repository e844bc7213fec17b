"""Softmax attention over one dense block of logits, with everything section 3 of the design asks.

Shapes inside: queries of one key/value head stand together, so B K G T S, with N = K·G.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernelry.plugin import Inputs, Mask, Partial, Request, Side, with_sinks


def visible_of(masks: tuple[Mask, ...], query: Side, kv: Side) -> Bool[Array, "#B #N T S"] | None:
    """Evaluates a conjunction; None where everything is visible."""
    visible = None
    for mask in masks:
        part = mask.evaluate(query, kv)
        visible = part if visible is None else visible & part
    return visible


def attend_dense(
    inputs: Inputs,
    request: Request,
    visible: Bool[Array, "#B #N #T #S"] | None,
    *,
    statistics: bool,
) -> Partial:
    """Attends over all keys at once.

    Args:
      inputs: query [B, T, N, H], key [B, S, K, H], value [B, S, K, D]; T and S may be a block's.
      request: what the call wants; its lengths are not looked at.
      visible: which keys are seen; None means all.
      statistics: whether lse is wanted.
    """
    grouped = None if visible is None else _grouped(visible, request)
    query, key, value = _clean(inputs, request, grouped)
    logits = _logits(query, key, inputs.bias, grouped, request)
    if grouped is not None:
        logits = jnp.where(grouped, logits, -jnp.inf)
    top = lax.stop_gradient(logits.max(axis=-1, initial=-jnp.inf))
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top)[..., None])
    total = weights.sum(axis=-1)
    may_be_empty = visible is not None or key.shape[1] == 0
    divisor = jnp.where(total > 0, total, 1.0) if may_be_empty else total
    weights = _dropped(weights, inputs, request)
    out = jnp.einsum(
        "BKGTS,BSKD->BKGTD",
        weights.astype(value.dtype),
        value,
        precision=request.precision,
        preferred_element_type=logits.dtype,
    )
    out = jnp.moveaxis(out / divisor[..., None], 3, 1)
    out = out.reshape(*query.shape[:2], request.q_heads, value.shape[-1])
    lse = None
    if statistics or inputs.sinks is not None:
        finite = jnp.where(jnp.isneginf(top), 0.0, top) + jnp.log(divisor)
        lse = _ungrouped(jnp.where(total > 0, finite, -jnp.inf) if may_be_empty else finite)
    if inputs.sinks is not None:
        out, lse = with_sinks(out, lse, inputs.sinks), None
    max_logits = _ungrouped(top).max(axis=-1, initial=-jnp.inf) if request.max_logits else None
    if not statistics:
        out = out.astype(request.dtype)
    return Partial(out, lse=lse, max_logits=max_logits, dtype=request.dtype)


def _logits(
    query: jax.Array, key: jax.Array, bias: jax.Array | None, visible: jax.Array | None, request: Request
) -> Float[Array, "B K G T S"]:
    grouped = query.reshape(*query.shape[:2], request.kv_heads, request.groups, query.shape[-1])
    # Heads before time, so that no product has to transpose the logits: twice as fast on CPU.
    logits = jnp.einsum(
        "BKGTH,BSKH->BKGTS",
        jnp.moveaxis(grouped, 1, 3),
        key,
        precision=request.precision,
        preferred_element_type=jnp.float64 if request.dtype == "float64" else jnp.float32,
    ).astype(request.logits_dtype)
    logits = logits * jnp.asarray(request.scale, logits.dtype)
    if bias is not None:
        logits = logits + _grouped(bias, request).astype(logits.dtype)
    if bias is not None and visible is not None and request.soft_cap is not None:
        # The derivative of tanh at a hidden NaN is NaN, which no zero from behind can mend.
        logits = jnp.where(visible, logits, 0)
    if request.soft_cap is not None:
        cap = jnp.asarray(request.soft_cap, logits.dtype)
        logits = cap * jnp.tanh(logits / cap)
    return logits


def _grouped(array: jax.Array, request: Request) -> jax.Array:
    """[B, N or 1, T, S] → [B, K or 1, G or 1, T, S]."""
    heads = (1, 1) if array.shape[1] == 1 else (request.kv_heads, request.groups)
    return array.reshape(array.shape[0], *heads, *array.shape[2:])


def _ungrouped(statistic: jax.Array) -> jax.Array:
    """[B, K, G, T] → [B, N, T]."""
    batch, kv_heads, groups, length = statistic.shape
    return statistic.reshape(batch, kv_heads * groups, length)


def _clean(inputs: Inputs, request: Request, visible: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Zeroes keys and values that no row may see, and queries that see nothing.

    0 · NaN is NaN, in P·V and in every product of the backward pass, so what is hidden must be
    replaced before it is multiplied. Masks whose form shows that nothing is hidden cost nothing.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if visible is None:
        return query, key, value
    if request.mask.may_hide_slots(request.q_len, request.kv_len):
        seen = visible.any(axis=(2, 3)).swapaxes(1, 2)[..., None]  # [B, S, K or 1, 1]
        key, value = jnp.where(seen, key, 0), jnp.where(seen, value, 0)
    if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        sees = visible.any(axis=4)  # [B, K or 1, G or 1, T]
        heads = sees.shape[1] * sees.shape[2]
        query = jnp.where(sees.reshape(sees.shape[0], heads, -1).swapaxes(1, 2)[..., None], query, 0)
    return query, key, value


def _dropped(weights: jax.Array, inputs: Inputs, request: Request) -> jax.Array:
    if not request.dropout_rate:
        return weights
    assert inputs.dropout_rng is not None
    kept = jax.random.bernoulli(inputs.dropout_rng, 1.0 - request.dropout_rate, weights.shape)
    return jnp.where(kept, weights / (1.0 - request.dropout_rate), 0.0)
