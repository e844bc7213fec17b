"""The largest logits: transformer-engine has one of each head for all rows together, so rows become heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernelry.plugin import Inputs, Partial, Request


def folded(inputs: Inputs, request: Request) -> tuple[Inputs, Request]:
    """Writes the rows of a batch next to one another as heads of a single row; query head n still reads head n // G."""
    if request.batch == 1:
        return inputs, request
    inner = request_of_heads(request)
    batch, bias = request.batch, inputs.bias
    if bias is not None and bias.shape[:2] != (1, 1):
        wide = jnp.broadcast_to(bias, (batch, request.q_heads, *bias.shape[2:]))
        bias = wide.reshape(1, batch * request.q_heads, *bias.shape[2:])
    query, key, value = (_as_heads(array) for array in (inputs.query, inputs.key, inputs.value))
    return dataclasses.replace(inputs, query=query, key=key, value=value, bias=bias), inner


def request_of_heads(request: Request) -> Request:
    """The request of that single row."""
    batch, bias = request.batch, request.bias
    if bias is not None and bias[:2] != (1, 1):
        bias = (1, batch * request.q_heads, *bias[2:])
    return dataclasses.replace(
        request, batch=1, q_heads=batch * request.q_heads, kv_heads=batch * request.kv_heads, bias=bias
    )


def apart(partial: Partial, request: Request) -> Partial:
    """Gives each row its own again."""
    batch, heads = request.batch, request.q_heads
    assert partial.max_logits is not None
    out = partial.out.reshape(request.q_len, batch, heads, request.value_dim).swapaxes(0, 1)
    lse = None if partial.lse is None else partial.lse.reshape(batch, heads, request.q_len)
    largest = partial.max_logits.astype(jnp.float32).reshape(batch, heads)
    return dataclasses.replace(partial, out=out, lse=lse, max_logits=largest)


def joined(d_bias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of a bias that was broadcast along T or S."""
    along = tuple(axis for axis, (wide, own) in enumerate(zip(d_bias.shape, shape, strict=True)) if wide != own)
    return d_bias.astype(jnp.float32).sum(axis=along, keepdims=True) if along else d_bias


def _as_heads(array: Float[Array, "B L N H"]) -> Float[Array, "1 L BN H"]:
    batch, length, heads, dim = array.shape
    return array.swapaxes(0, 1).reshape(1, length, batch * heads, dim)
