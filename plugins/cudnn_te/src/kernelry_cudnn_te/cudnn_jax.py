"""cuDNN's fused attention as JAX calls it.

Source: jax.nn.dot_product_attention(implementation="cudnn"), jax 0.10 … 0.12.
"""

from __future__ import annotations

import dataclasses
from typing import final

import jax

from kernelry.plugin import Inputs, Kernel, Partial, Request, Tiling
from kernelry_cudnn_te import _vendor


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CudnnJaxKernel(Kernel):
    """cuDNN's fused attention; differentiated by JAX's own rule."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope("kernelry.cudnn_jax"):
            out = _vendor.dot_product_attention(
                inputs.query,
                inputs.key,
                inputs.value,
                scale=request.scale,
                is_causal=bool(request.mask.atoms),
                local_window_size=_window(request),
                implementation="cudnn",
            )
            return Partial(out, dtype=request.dtype)


def _window(request: Request) -> tuple[int, int] | None:
    """The vendor's window, both ends included as in ours; None where the mask is full or causal."""
    bounds = [atom.params for atom in request.mask.atoms if atom.params[0] is not None]
    return bounds[0] if bounds else None
