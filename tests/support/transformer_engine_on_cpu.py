"""Attention in plain JAX behind transformer_engine's fused-attention primitives, so that its Python runs on CPU.

    transformer_engine_stand_in.install(folder)
    transformer_engine_on_cpu.register()
    # from here on fused_attn and DotProductAttention compute, with gradients, also in float32 and on many CPU devices

What is computed follows from what the inner primitives are given and from nothing else: lengths, offsets, the layout,
the kind of mask, the window, the diagonal, the scale, bias, sinks. A wrong one gives wrong numbers. All is done in
float32. Rows that no sequence holds come out 0, gradients too. Dropout is refused.

It proves the plumbing up to cuDNN, and says nothing about what cuDNN does or accepts.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

NOTHING = -5.96e29
"""The logsumexp of a row without keys: finite, so that steps of a ring can be joined; about what the real kernel's
callers fill the buffer with, 0xF0 in each byte."""


class Tokens(NamedTuple):
    """Where each token of one side stands, all (batch, tokens): its sequence or -1, its place there, that length."""

    sequence: jax.Array
    place: jax.Array
    length: jax.Array


def register() -> None:
    """Lowers the inner primitives of transformer_engine's fused attention on CPU by `forward` and `backward`."""
    from transformer_engine.jax.cpp_extensions import attention

    for primitive, compute in ((attention.FusedAttnFwdPrimitive, forward), (attention.FusedAttnBwdPrimitive, backward)):
        mlir.register_lowering(primitive.inner_primitive, _rule(compute), platform="cpu")


def _rule(compute):
    def rule(context, *operands, config):
        if config.dropout_probability and config.is_training:
            raise NotImplementedError(f"dropout_probability={config.dropout_probability}: cuDNN's draws are not copied")

        def run(*operands):
            results = compute(config, context.avals_out, *operands)
            return [
                jnp.reshape(found, aval.shape).astype(aval.dtype)
                for found, aval in zip(results, context.avals_out, strict=True)
            ]

        return mlir.lower_fun(run, multiple_results=True)(context, *operands)

    return rule


def forward(config: Any, avals: Any, q, k, v, bias, sinks, _seed, q_ends, kv_ends, q_starts, kv_starts, *_ids) -> list:
    """Returns (out, softmax_aux, [max_logit from 2.20 on,] rng_state, workspace)."""
    query, key, value = _separate(config, q, k, v)
    visible = _visible(config, query, key, q_ends, kv_ends, q_starts, kv_starts)[0]
    scores = jnp.where(visible, _scores(config, query, key, bias), -jnp.inf)
    columns = jnp.broadcast_to(_sinks(config, sinks, query.shape[2])[None, :, None, None], (*scores.shape[:3], 1))
    logsumexp = jax.nn.logsumexp(jnp.concatenate([scores, columns], -1), axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(logsumexp), logsumexp, 0))
    out = jnp.einsum("bnts,bsnd->btnd", weights, _each_head(value, query))
    largest = jnp.max(scores, axis=-1, keepdims=True)
    rows = [jnp.where(jnp.isfinite(row), row, NOTHING) for row in (logsumexp, largest)]
    if config.qkv_layout.is_thd():
        rows = [jnp.swapaxes(row, 1, 2) for row in rows]
    unused = [jnp.zeros(aval.shape) for aval in avals[-2:]]
    if len(avals) == 4:
        return [out, rows[0], *unused]
    return [out, rows[0], rows[1] if config.return_max_logit else jnp.zeros(0), *unused]


def backward(
    config: Any,
    avals: Any,
    q,
    k,
    v,
    bias,
    sinks,
    logsumexp,
    _rng,
    out,
    d_out,
    q_ends,
    kv_ends,
    q_starts,
    kv_starts,
    *_ids,
) -> list:
    """Returns (d_q, d_k, d_v, d_bias, d_sinks, workspace), from the logsumexp and the output that it is given."""
    query, key, value = _separate(config, q, k, v)
    visible, held = _visible(config, query, key, q_ends, kv_ends, q_starts, kv_starts)
    if d_out.shape != out.shape:  # before 2.20 nothing shards one like the other, and the real kernel would not notice
        raise ValueError(f"the output's gradient is {d_out.shape} beside an output of {out.shape}; shard it alike")
    out, d_out = (x.astype(jnp.float32).reshape(*query.shape[:3], -1) for x in (out, d_out))
    logsumexp = logsumexp[..., 0]
    if config.qkv_layout.is_thd():
        logsumexp = jnp.swapaxes(logsumexp.reshape(query.shape[:3]), 1, 2)
    logsumexp = logsumexp.reshape(query.shape[0], query.shape[2], query.shape[1], 1)
    weights = jnp.where(visible, jnp.exp(_scores(config, query, key, bias) - logsumexp), 0)
    d_weights = jnp.einsum("btnd,bsnd->bnts", d_out, _each_head(value, query))
    spent = jnp.einsum("btnd,btnd->bnt", out, d_out)[..., None]
    d_scores = weights * (d_weights - spent)
    d_products = d_scores * config.scaling_factor
    d_query = jnp.einsum("bnts,bsnd->btnd", d_products, _each_head(key, query))
    d_key = _each_group(jnp.einsum("bnts,btnd->bsnd", d_products, query), key)
    d_value = _each_group(jnp.einsum("bnts,btnd->bsnd", weights, d_out), value)
    d_sinks = jnp.zeros(avals[4].shape)
    if config.softmax_type.name == "LEARNABLE_SOFTMAX":
        weight = jnp.exp(_sinks(config, sinks, query.shape[2])[None, :, None, None] - logsumexp)
        d_sinks = -jnp.sum(jnp.where(held, weight * spent, 0), axis=(0, 2, 3))
    d_bias = jnp.zeros(avals[3].shape)
    if config.attn_bias_type.name != "NO_BIAS":
        d_bias = _summed_to(d_products if config.attn_bias_type.name == "PRE_SCALE_BIAS" else d_scores, bias)
    return [*_together(config, d_query, d_key, d_value), d_bias, d_sinks, jnp.zeros(avals[5].shape)]


def _separate(config, q, k, v) -> list[jax.Array]:
    """query, key and value in float32, (batch, tokens, heads, head_dim); packed rows become one row."""
    if config.qkv_layout.is_qkvpacked():
        parts = [q[..., part, :, :] for part in range(3)]
    elif config.qkv_layout.is_kvpacked():
        parts = [q, k[..., 0, :, :], k[..., 1, :, :]]
    else:
        parts = [q, k, v]
    if config.qkv_layout.is_thd():
        return [part.astype(jnp.float32).reshape(1, -1, *part.shape[-2:]) for part in parts]
    return [part.astype(jnp.float32).reshape(-1, *part.shape[-3:]) for part in parts]


def _together(config, d_query, d_key, d_value) -> list[jax.Array]:
    """The gradients as the layout has them; the caller gives each its batch again."""
    if config.qkv_layout.is_qkvpacked():
        return [jnp.stack([d_query, d_key, d_value], axis=2), jnp.zeros(0), jnp.zeros(0)]
    if config.qkv_layout.is_kvpacked():
        return [d_query, jnp.stack([d_key, d_value], axis=2), jnp.zeros(0)]
    return [d_query, d_key, d_value]


def _visible(config, query, key, q_ends, kv_ends, q_starts, kv_starts) -> tuple[jax.Array, jax.Array]:
    """(batch, 1, queries, keys): which keys each query sees; (batch, 1, queries, 1): which queries exist."""
    queries, keys = _tokens(config, query, q_ends, q_starts), _tokens(config, key, kv_ends, kv_starts)
    mask_type = config.attn_mask_type
    held = queries.sequence[:, :, None] >= 0
    visible = held & (queries.sequence[:, :, None] == keys.sequence[:, None, :])
    ahead = keys.place[:, None, :] - queries.place[:, :, None]
    later = keys.length[:, None, :] - queries.length[:, :, None]  # how far the bottom-right diagonal lies ahead
    if mask_type.is_causal():
        visible &= ahead <= (later if mask_type.is_bottom_right() else 0)
    left, right = getattr(config, "cp_striped_window_size", None) or config.window_size or (-1, -1)
    diagonal = later if getattr(config, "bottom_right_diagonal", mask_type.is_bottom_right()) else 0
    if left >= 0:
        visible &= ahead - diagonal >= -left
    if right >= 0:
        visible &= ahead - diagonal <= right
    return visible[:, None], held[:, None]


def _tokens(config, array, ends, starts) -> Tokens:
    batch, count = array.shape[:2]
    if config.qkv_layout.is_thd():
        lengths, starts = jnp.diff(ends.reshape(-1)), starts.reshape(-1)[: ends.size - 1]
        places = jnp.arange(count)[:, None] - starts[None]
        inside = (places >= 0) & (places < lengths[None])
        sequence = jnp.where(inside.any(-1), jnp.argmax(inside, -1), -1)
        place = jnp.take_along_axis(places, sequence[:, None], axis=1)[:, 0]
        return Tokens(sequence[None], place[None], lengths[sequence][None])
    place = jnp.broadcast_to(jnp.arange(count), (batch, count))
    if not config.attn_mask_type.is_padding():
        return Tokens(jnp.zeros_like(place), place, jnp.full_like(place, count))
    length = jnp.broadcast_to(jnp.diff(ends.reshape(-1))[:, None], place.shape)
    return Tokens(jnp.where(place < length, 0, -1), place, length)


def _scores(config, query, key, bias) -> jax.Array:
    products = jnp.einsum("btnd,bsnd->bnts", query, _each_head(key, query))
    if config.attn_bias_type.name == "NO_BIAS":
        return products * config.scaling_factor
    bias = bias.astype(jnp.float32).reshape(-1, *bias.shape[-3:])
    if config.attn_bias_type.name == "PRE_SCALE_BIAS":
        return (products + bias) * config.scaling_factor
    return products * config.scaling_factor + bias


def _sinks(config, sinks, heads: int) -> jax.Array:
    """The score of one more key, whose value is 0, for each head."""
    fixed = {"VANILLA_SOFTMAX": -jnp.inf, "OFF_BY_ONE_SOFTMAX": 0.0}.get(config.softmax_type.name)
    return sinks.reshape(heads) if fixed is None else jnp.full((heads,), fixed)


def _each_head(grouped, query) -> jax.Array:
    return jnp.repeat(grouped, query.shape[2] // grouped.shape[2], axis=2)


def _each_group(of_heads, grouped) -> jax.Array:
    return of_heads.reshape(*grouped.shape[:3], -1, of_heads.shape[-1]).sum(3)


def _summed_to(d_scores, bias) -> jax.Array:
    """The gradient of a bias that was broadcast to the scores."""
    shape = (math.prod(bias.shape[:-3]), *bias.shape[-3:])
    return d_scores.sum([axis for axis in range(4) if shape[axis] == 1 < d_scores.shape[axis]], keepdims=True)
