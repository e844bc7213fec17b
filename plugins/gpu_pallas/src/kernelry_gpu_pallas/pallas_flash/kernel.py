"""The kernel `pallas_flash`: flash attention for Triton that honours every mask."""

from __future__ import annotations

import dataclasses
from typing import final

import jax
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling
from kernelry_gpu_pallas.pallas_flash.backward import backward
from kernelry_gpu_pallas.pallas_flash.forward import forward
from kernelry_gpu_pallas.pallas_flash.tilings import check

_SCOPE = "kernelry.pallas_flash"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PallasFlashKernel(Kernel):
    """Tiles in which the mask holds anything are computed, in registers, and never kept."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            check(request, tiling)
            result = forward(inputs, request, tiling, statistics=statistics)
            max_logits = None if result.top is None else result.top.max(axis=2)
            return Partial(
                result.out,
                lse=result.lse,
                max_logits=max_logits,
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
            return backward(inputs, request, tiling, out, lse, d_out, d_lse)
