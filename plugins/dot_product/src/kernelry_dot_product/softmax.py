"""Softmax attention over one dense block of logits, with every option of a request.

Shapes inside: queries of one key/value head are together, so B K G T S, with N = K·G.

What every call needs is written in `jax.lax`: most functions of `jax.numpy` are jitted, and each would be a program of
its own while a call is traced, which doubles the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernelry.plugin import Inputs, Mask, Mode, Partial, Request, Side, cast_finite, log_sum, with_sinks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

_FEW_QUERIES = 64
"""N · T up to which a decode step on CPU multiplies all heads at once: benchmarks/decode.py."""


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
      request: what the call asks for; its lengths are not looked at.
      visible: which keys are seen; None means all.
      statistics: whether lse is wanted.
    """
    grouped = None if visible is None else _grouped(visible, request)
    query, key, value = _clean(inputs, request, grouped)
    logits = _logits(query, key, inputs.bias, grouped, request)
    if grouped is not None:
        logits = _where(grouped, logits, -jnp.inf)
    # The maximum starts from a finite number: −inf − top is then −inf in an empty row too, without a guard that
    # would keep XLA from joining maximum, difference and exponential into one pass.
    lowest = jnp.finfo(logits.dtype).min  # type: ignore[no-untyped-call]
    top = lax.stop_gradient(lax.max(lax.reduce_max(logits, (4,)), lowest))
    weights = lax.exp(lax.sub(logits, lax.expand_dims(top, (4,))))
    total = _total(weights)
    empty = lax.eq(total, total.dtype.type(0))  # a row that sees something has a weight of 1
    divisor = lax.select(empty, lax.full_like(total, 1), total)
    weights = lax.convert_element_type(_dropped(weights, inputs, request), value.dtype)
    out = _product("BKGTS,BSKD->BKGTD", weights, value, request, logits.dtype)
    out = lax.div(out, lax.expand_dims(divisor, (4,)))
    if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        out = jnp.where(empty[..., None], 0, out)  # so that a NaN in the cotangent of such a row stops here
    out = lax.transpose(out, (0, 3, 1, 2, 4))
    out = lax.reshape(out, (*query.shape[:2], request.q_heads, value.shape[-1]))
    lse = rest = None
    if statistics or inputs.sinks is not None:
        lse, rest = log_sum(top, divisor)
        lse, rest = _ungrouped(jnp.where(empty, -jnp.inf, lse)), _ungrouped(rest)
    if inputs.sinks is not None:
        out, lse, rest = with_sinks(out, lse, inputs.sinks, rest), None, None
    max_logits = None
    if request.max_logits:
        max_logits = _ungrouped(jnp.where(empty, -jnp.inf, top)).max(axis=-1, initial=-jnp.inf)
    if not statistics:
        out = lax.convert_element_type(out, request.dtype)
    return Partial(out, lse=lse, max_logits=max_logits, dtype=request.dtype, lse_rest=rest)


def _logits(
    query: jax.Array, key: jax.Array, bias: jax.Array | None, visible: jax.Array | None, request: Request
) -> Float[Array, "B K G T S"]:
    batch, length, _, width = query.shape
    grouped = lax.reshape(query, (batch, length, request.kv_heads, request.groups, width))
    dtype = jnp.float64 if request.dtype == "float64" else jnp.float32
    # Heads before time, so that no product has to transpose the logits: twice as fast on CPU.
    rows = lax.transpose(grouped, (0, 2, 3, 1, 4))
    logits = _product("BKGTH,BSKH->BKGTS", rows, key, request, dtype)
    logits = lax.convert_element_type(logits, request.logits_dtype)
    logits = lax.mul(logits, logits.dtype.type(request.scale))
    if bias is not None and not request.bias_after_cap:
        logits = logits + _grouped(cast_finite(bias, logits.dtype), request)
        if visible is not None and request.soft_cap is not None:
            # The derivative of tanh at a hidden NaN is NaN, which no zero from behind can mend.
            logits = jnp.where(visible, logits, 0)
    if request.soft_cap is not None:
        cap = jnp.asarray(request.soft_cap, logits.dtype)
        logits = cap * jnp.tanh(logits / cap)
    if bias is not None and request.bias_after_cap:
        logits = logits + _grouped(cast_finite(bias, logits.dtype), request)
    return logits


def _product(equation: str, rows: jax.Array, columns: jax.Array, request: Request, dtype: DTypeLike) -> jax.Array:
    """Multiplies rows B K G T … by keys or values; G is left out of the product where it is 1.

    The gradients of keys and values sum over G and T. Sums over two axes make XLA write a transposed copy of the
    logits first; over T alone it needs none, and the backward pass on CPU takes two thirds of the time:
    benchmarks/dot_product.py. A larger G is not merged with T, though as fast: where T is sharded, XLA would
    gather the logits.
    """
    if _few_queries(request):
        return _product_by_slot(equation, rows, columns, request, dtype)
    alone = request.groups == 1
    rows = lax.squeeze(rows, (2,)) if alone else rows
    contracted = (rows.ndim - 1,), (3 if equation.startswith("BKGTH") else 1,)
    numbers = contracted, ((0, 1), (0, 2))
    product = lax.dot_general(rows, columns, numbers, precision=request.precision, preferred_element_type=dtype)
    return lax.expand_dims(product, (2,)) if alone else product


def _few_queries(request: Request) -> bool:
    """Whether transposing the keys, head by head, would take longer than the products."""
    rows = request.q_heads * request.q_len
    if "q_len" in request.symbolic_sizes:
        return False
    on_cpu = request.target.platform == "cpu"
    return on_cpu and request.mode is Mode.DECODE and request.kv_heads > 1 and rows <= _FEW_QUERIES


def _product_by_slot(
    equation: str, rows: jax.Array, columns: jax.Array, request: Request, dtype: DTypeLike
) -> jax.Array:
    """The same product with keys or values read once, in the order in which they lie: [B, S, K·H].

    A decode step is bound by memory, and XLA on CPU copies [B, S, K, H] to [B, K, S, H] before it multiplies head by
    head. Here each query meets the columns of all K heads, with zeros where they are not its own.
    """
    heads = jnp.arange(request.kv_heads)
    batch, slots, _, width = columns.shape
    flat = columns.reshape(batch, slots, request.kv_heads * width)
    _, _, groups, length, _ = rows.shape
    count = request.kv_heads * groups * length
    if equation.startswith("BKGTH"):
        own = heads[:, None] == heads[None]
        spread = jnp.where(own[None, :, None, None, :, None], rows[:, :, :, :, None], 0)  # B K G T K H
        spread = spread.reshape(batch, count, request.kv_heads * width)
        product = _matmul("BRC,BSC->BRS", spread, flat, request, dtype)
        return product.reshape(batch, request.kv_heads, groups, length, slots)
    product = _matmul("BRS,BSC->BRC", rows.reshape(batch, count, slots), flat, request, dtype)
    every = product.reshape(batch, request.kv_heads, groups, length, request.kv_heads, width)
    return jnp.moveaxis(jnp.diagonal(every, axis1=1, axis2=4), -1, 1)  # B K G T D


def _matmul(equation: str, one: jax.Array, other: jax.Array, request: Request, dtype: DTypeLike) -> jax.Array:
    return jnp.einsum(equation, one, other, precision=request.precision, preferred_element_type=dtype)


def _where(condition: jax.Array, array: jax.Array, other: float) -> jax.Array:
    """`jnp.where(condition, array, other)` of arrays of one rank, whose result has the array's shape."""
    return lax.select(jnp.broadcast_to(condition, array.shape), array, lax.full_like(array, other))


def _total(weights: jax.Array) -> jax.Array:
    """Sums over the last axis, in float32 or wider, as `jnp.sum` does."""
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    total = lax.reduce_sum(lax.convert_element_type(weights, wide), (weights.ndim - 1,))
    return lax.convert_element_type(total, weights.dtype)


def _grouped(array: jax.Array, request: Request) -> jax.Array:
    """[B, N or 1, T, S] → [B, K or 1, G or 1, T, S]."""
    heads = (1, 1) if array.shape[1] == 1 else (request.kv_heads, request.groups)
    return lax.reshape(array, (array.shape[0], *heads, *array.shape[2:]))


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
        by_head = sees.reshape(sees.shape[0], heads, sees.shape[3])
        query = jnp.where(by_head.swapaxes(1, 2)[..., None], query, 0)
    return query, key, value


def _dropped(weights: jax.Array, inputs: Inputs, request: Request) -> jax.Array:
    if not request.dropout_rate:
        return weights
    assert inputs.dropout_rng is not None
    kept = jax.random.bernoulli(inputs.dropout_rng, 1.0 - request.dropout_rate, weights.shape)
    return jnp.where(kept, weights / (1.0 - request.dropout_rate), 0.0)
