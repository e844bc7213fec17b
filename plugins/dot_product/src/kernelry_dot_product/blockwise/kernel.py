"""The kernel `blockwise`: its forward pass, and the backward pass by which core differentiates it."""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling, ValueInKey, with_sinks
from kernelry_dot_product.blockwise.backward import backward
from kernelry_dot_product.blockwise.forward import forward
from kernelry_dot_product.blockwise.grid import Grid

_SCOPE = "kernelry.blockwise"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class BlockwiseKernel(Kernel):
    """Attention with memory O(T·block): tiles are computed where the mask holds anything, and never kept."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            found = forward(inputs, request, _grid(inputs, request, tiling))
            if statistics:
                return found
            out = found.out
            if inputs.sinks is not None:
                out = with_sinks(out, found.lse, inputs.sinks, found.lse_rest)
            return Partial(out.astype(request.dtype), max_logits=found.max_logits, dtype=request.dtype)

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
            # A sum of products: XLA on CPU takes several times as long for an einsum of vectors.
            delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
            delta = delta if d_lse is None else delta - d_lse
            found = backward(inputs, request, _grid(inputs, request, tiling), lse, delta, d_out)
            if isinstance(inputs.value, ValueInKey):  # the keys have both shares
                key = found.key.at[..., : request.value_dim].add(found.value)
                return dataclasses.replace(found, key=key)
            return found


def _grid(inputs: Inputs, request: Request, tiling: Tiling) -> Grid:
    return Grid.of(request, inputs.query.shape[0], tiling["block_q"], tiling["block_kv"])
