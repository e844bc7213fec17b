"""The kernel `cudnn_jax`.

Source: what `jax.nn.dot_product_attention(implementation="cudnn")` leads to, jax 0.10 … 0.12; see `_vendor`.
"""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Kernel, Operand, Partial, Request, Tiling
from kernelry_cudnn_te.cudnn_jax import _vendor
from kernelry_cudnn_te.cudnn_jax.operands import attributes_of, empty_rows, operands_of

_SCOPE = "kernelry.cudnn_jax"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CudnnJaxKernel(Kernel):
    """cuDNN's fused attention; without statistics, JAX's own derivative is kept."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            operands, attributes = operands_of(inputs, request), attributes_of(request)
            if not statistics:
                return Partial(_vendor.attend(operands, attributes), dtype=request.dtype)
            out, lse = _vendor.attend_with_statistics(operands, attributes)
            empty = empty_rows(inputs, request)
            if empty is not None:
                lse = jnp.where(empty[:, None, :], -jnp.inf, lse)
            return Partial(out, lse=lse, dtype=request.dtype)

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
            dtype = inputs.query.dtype
            gradients = _vendor.differentiate(
                operands_of(inputs, request),
                attributes_of(request),
                lse,
                out.astype(dtype),
                d_out.astype(dtype),
                bias_gradient=Operand.BIAS in request.gradients,
            )
            return Gradients(*gradients)
