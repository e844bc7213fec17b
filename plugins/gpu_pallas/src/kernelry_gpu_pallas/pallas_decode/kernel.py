"""The kernel `pallas_decode`: decode whose work follows the length of each row, over arrays and pages."""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp

from kernelry.plugin import Inputs, Kernel, Partial, Request, Tiling
from kernelry_gpu_pallas.pallas_decode.operands import Rows
from kernelry_gpu_pallas.pallas_decode.splits import Parts, attend
from kernelry_gpu_pallas.pallas_decode.tilings import check

_SCOPE = "kernelry.pallas_decode"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PallasDecodeKernel(Kernel):
    """The keys of a row are split among programs, whose parts are merged; there is no derivative."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            check(request, tiling)
            rows = Rows.of(request)  # together, whatever tiles they were in
            total, top, weight = _merged(attend(inputs, request, tiling))
            by_head = rows.apart(top).swapaxes(1, 2)
            max_logits = by_head.max(axis=2) if request.max_logits else None
            if statistics:
                return Partial(
                    rows.apart(total),
                    max=by_head,
                    sum=rows.apart(weight).swapaxes(1, 2),
                    max_logits=max_logits,
                    dtype=request.dtype,
                )
            out = rows.apart(total / jnp.where(weight == 0, 1.0, weight)[..., None])
            return Partial(out.astype(request.dtype), max_logits=max_logits, dtype=request.dtype)


def _merged(parts: Parts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ p·v [B, K, R, D], the maximum logit [B, K, R] (−inf where nothing is seen), and Σ p [B, K, R]."""
    top = parts.top.max(axis=2, keepdims=True)
    share = parts.logits.power(parts.top - top)
    total = (parts.total * share[..., None]).sum(axis=2)
    weight = (parts.weight * share).sum(axis=2)
    return total, jnp.where(weight == 0, -jnp.inf, top[:, :, 0] * parts.logits.unit), weight
