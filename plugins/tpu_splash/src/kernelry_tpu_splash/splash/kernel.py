"""Splash attention: block-sparse flash attention for TPUs.

Source: jax.experimental.pallas.ops.tpu.splash_attention, jax 0.10 … 0.12.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import numpy as np
from jaxtyping import Array, Float

from kernelry.plugin import REMAT_NAME, Gradients, Inputs, Kernel, Partial, Request, Tiling
from kernelry_tpu_splash.blocks import LAYOUTS, checked_sizes, one_of
from kernelry_tpu_splash.computed_masks import ComputedMask, query_positions, segment_rows
from kernelry_tpu_splash.operands import MASK_VALUE, heads_first, scaled, swapped, with_empty_rows
from kernelry_tpu_splash.splash import _vendor
from kernelry_tpu_splash.splash.mask_info import of_columns, of_rows

_SCOPE = "kernelry.splash"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class SplashKernel(Kernel):
    """JAX's splash attention. Without statistics, the vendor's own derivative is kept."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            query, key, value = heads_first(inputs, request)
            kernel, positions = _kernel_for(inputs, request, tiling, statistics), query_positions(inputs, request)

            def one_row(q: Any, k: Any, v: Any, ids: Any, where: Any) -> Any:
                return _at(kernel, where)(q, k, v, ids)

            result: Any = jax.vmap(one_row)(query, key, value, _segments(inputs), positions)
            if not statistics:
                return Partial(swapped(result), dtype=request.dtype)
            out, (lse,) = result
            return with_empty_rows(swapped(out), lse, request)

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
        kernel, positions = _kernel_for(inputs, request, tiling, False), query_positions(inputs, request)

        def one_row(q: Any, k: Any, v: Any, ids: Any, where: Any, o: Any, total: Any, d_o: Any) -> Any:
            placed = _at(kernel, where)
            residuals = (q, k, v, ids, None, o, total, placed.dq_mask_info, placed.dkv_mask_info)
            return _vendor.splash_attention_bwd(**kernel.kwargs, res=residuals, do=d_o)[3:6]

        with jax.named_scope(_SCOPE):
            query, key, value = heads_first(inputs, request)
            d_query, d_key, d_value = jax.vmap(one_row)(
                query, key, value, _segments(inputs), positions, swapped(out), lse, swapped(d_out.astype(query.dtype))
            )
            return Gradients(scaled(swapped(d_query), request), swapped(d_key), swapped(d_value))


def _at(kernel: _vendor.SplashAttentionKernel, positions: jax.Array | None) -> _vendor.SplashAttentionKernel:
    """The kernel whose queries stand at positions [T]; None leaves them where they are."""
    if positions is None:
        return kernel
    infos: Any = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    placed = (None if info is None else info._replace(q_sequence=positions) for info in infos)
    return _vendor.SplashAttentionKernel(*placed, **kernel.kwargs)  # type: ignore[arg-type]


def _segments(inputs: Inputs) -> _vendor.SegmentIds | None:
    rows = segment_rows(inputs)
    return None if rows is None else _vendor.SegmentIds(*rows)


def _kernel_for(inputs: Inputs, request: Request, tiling: Tiling, statistics: bool) -> _vendor.SplashAttentionKernel:
    """The vendor's kernel for everything but the arrays; where queries stand may still be missing."""
    mask = ComputedMask.of(inputs, request)
    return mask.build(_built, request.soft_cap, tiling, statistics, request.is_interpreted)


@functools.lru_cache(maxsize=256)
def _built(
    mask: ComputedMask, soft_cap: float | None, tiling: Tiling, statistics: bool, interpret: bool
) -> _vendor.SplashAttentionKernel:
    blocks = _block_sizes(tiling, mask.lengths)

    @functools.cache
    def kinds(block_q: int, block_kv: int) -> np.ndarray:
        return mask.kinds(block_q, block_kv)

    fused = bool(blocks.use_fused_bwd_kernel)
    # The arrays are NumPy's: they belong to no device, no mesh and no trace, so the cache outlives them all.
    return _vendor.SplashAttentionKernel(
        of_rows(kinds(blocks.block_q, blocks.block_kv), mask.asked),
        None if fused else of_rows(kinds(blocks.block_q_dq, blocks.block_kv_dq), mask.asked),
        of_columns(kinds(blocks.block_q_dkv, blocks.block_kv_dkv), mask.asked, shrink=not fused),
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=statistics,
        mask_value=MASK_VALUE,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=REMAT_NAME,
        mask_function=mask.function,
        interpret=interpret,
    )


def _block_sizes(tiling: Tiling, lengths: tuple[int, int]) -> _vendor.BlockSizes:
    sizes: dict[str, Any] = dict(checked_sizes("splash", tiling, lengths))
    known = tuple(int(layout) for layout in _vendor.QKVLayout)
    layouts = {name: _vendor.QKVLayout(one_of("splash", tiling, name, known)) for name in LAYOUTS}
    fused = one_of("splash", tiling, "backward_kernels", (1, 2)) == 1
    if fused:
        sizes["block_q_dq"] = sizes["block_kv_dq"] = None
    return _vendor.BlockSizes(**sizes, **layouts, use_fused_bwd_kernel=fused)
