"""The kernel `blockwise`: its forward pass with a derivative of its own, and the backward pass that core calls."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernelry.plugin import (
    Gradients,
    Inputs,
    Kernel,
    Partial,
    Request,
    Tiling,
    checked,
    lse_with_sinks,
    unchecked,
    with_sinks,
)
from kernelry_dot_product.blockwise.backward import backward
from kernelry_dot_product.blockwise.forward import forward
from kernelry_dot_product.blockwise.grid import Grid

_SCOPE = "kernelry.blockwise"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class BlockwiseKernel(Kernel):
    """Attention with memory O(T·block): tiles are computed where the mask holds anything, and never kept."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        grid = _grid(inputs, request, tiling)
        if not statistics:
            return _attend(request, grid, inputs)
        with jax.named_scope(_SCOPE):
            result = forward(inputs, request, grid)
        return Partial(
            result.out,
            lse=result.lse,
            max_logits=result.max_logits,
            dtype=request.dtype,
            lse_rest=result.lse_rest,
        )

    def backward(
        self,
        inputs: Inputs,
        request: Request,
        tiling: Tiling,
        out: Float[Array, "B T N D"],
        lse: Float[Array, "B N T"],
        d_out: Float[Array, "B T N D"],
        d_lse: Float[Array, "B N T"] | None,
    ) -> Gradients:
        with jax.named_scope(_SCOPE):
            delta = _delta(out, d_out)
            delta = delta if d_lse is None else delta - d_lse
            return backward(inputs, request, _grid(inputs, request, tiling), lse, delta, d_out)


def _grid(inputs: Inputs, request: Request, tiling: Tiling) -> Grid:
    return Grid.of(request, inputs.query.shape[0], tiling["block_q"], tiling["block_kv"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(request: Request, grid: Grid, inputs: Inputs) -> Partial:
    return _attend_forward(request, grid, inputs)[0]


_Residuals = tuple[Inputs, jax.Array, jax.Array, jax.Array]


def _attend_forward(request: Request, grid: Grid, inputs: Inputs) -> tuple[Partial, _Residuals]:
    with jax.named_scope(_SCOPE):
        result = forward(inputs, request, grid)
        out = result.out if inputs.sinks is None else with_sinks(result.out, result.lse, inputs.sinks, result.lse_rest)
        out = out.astype(request.dtype)
    residuals = inputs, out, result.lse, result.lse_rest
    return Partial(out, max_logits=result.max_logits, dtype=request.dtype), residuals


def _attend_backward(request: Request, grid: Grid, residuals: _Residuals, d_partial: Partial) -> tuple[Inputs]:
    with unchecked():
        found = _cotangents(request, grid, residuals, d_partial)
    return (checked(found),)


def _cotangents(request: Request, grid: Grid, residuals: _Residuals, d_partial: Partial) -> Inputs:
    inputs, out, lse, rest = residuals
    with jax.named_scope(_SCOPE):
        empty = jnp.isneginf(lse)
        d_out = jnp.where(empty.swapaxes(1, 2)[..., None], 0, d_partial.out)
        delta = _delta(out, d_out)
        whole, d_sinks = lse, None
        if inputs.sinks is not None:
            sinks = inputs.sinks.astype(jnp.float32)[None, :, None]
            whole, rest = lse_with_sinks(jnp.where(empty, 0.0, lse), rest, inputs.sinks)
            share_of_sink = jnp.where(empty, 0.0, jnp.exp(sinks - whole - rest) * delta)
            d_sinks = -share_of_sink.sum(axis=(0, 2)).astype(inputs.sinks.dtype)
        # Probabilities of exp(logits − lse) are too large by exp(rest); the gradients are linear in delta and d_out.
        factor = jnp.exp(-rest)
        d_out = d_out.astype(jnp.float32) * factor.swapaxes(1, 2)[..., None]
        share = backward(inputs, request, grid, jnp.where(empty, jnp.inf, whole), delta * factor, d_out)
    return _cotangent(inputs, share, d_sinks)


def _delta(out: jax.Array, d_out: jax.Array) -> Float[Array, "B N T"]:
    return jnp.einsum("BTND,BTND->BNT", out.astype(jnp.float32), d_out.astype(jnp.float32))


def _cotangent(inputs: Inputs, share: Gradients, d_sinks: jax.Array | None) -> Inputs:
    return Inputs(
        query=share.query.astype(inputs.query.dtype),
        key=_like(inputs.key, share.key),
        value=_like(inputs.value, share.value),
        mask=None,  # type: ignore[arg-type]
        bias=None if inputs.bias is None or share.bias is None else share.bias.astype(inputs.bias.dtype),
        sinks=d_sinks,
    )


def _like(held: Any, share: jax.Array) -> jax.Array | None:
    """Quantised and paged keys and values have no gradient."""
    return share.astype(held.dtype) if isinstance(held, jax.Array) else None


_attend.defvjp(_attend_forward, _attend_backward)
