"""One query a row: the vendor's decode kernel over a pool of pages that it reads and does not own."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float32, Int32

from kernelry.plugin import Request, Tiling
from kernelry_tpu_flywheel.lanes import LANES
from kernelry_tpu_flywheel.paged import _vendor
from kernelry_tpu_flywheel.paged.layout import STAGES, vector_limit

_LOG2_E = math.log2(math.e)
_SEMAPHORES = 6
"""Kinds of copies that the vendor's kernel tells apart."""


def attend(
    query: BFloat16[Array, "B N H"],
    pages: BFloat16[Array, "P page_size twice_K H"],
    table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    left: int | None,
    request: Request,
    tiling: Tiling,
) -> tuple[BFloat16[Array, "B N H"], Float32[Array, "B N"]]:
    """The last token of each row to its first `lengths` slots, or to the last `left + 1` of them.

    Args:
      query: not scaled.
      pages: keys and values by turns along the heads.
      table: no entry is negative; M is a multiple of the pages of a block.
      lengths: 0 for a row without keys, whose result is 0 and −inf.
      left: of the window; None means no window.
      request, tiling: of the call.

    Returns:
      The output, and the logarithm of the sum of exponentials.
    """
    rows, heads, width = query.shape
    _, page_size, twice, _ = pages.shape
    # The softmax works with powers of 2; under a soft cap the factor comes after the tanh.
    factor = request.scale * _LOG2_E if request.soft_cap is None else request.scale / request.soft_cap
    scaled = (query.astype(jnp.float32) * factor).astype(query.dtype)
    block = tiling["block_kv"]
    in_hbm, in_vmem = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.VMEM)
    kernel = functools.partial(
        _reading,
        batch=rows,
        num_query_heads=heads,
        num_kv_heads=twice // 2,
        head_dim=width,
        block_kv=block,
        block_kv_compute=tiling["block_kv_compute"],
        num_kv_stages=STAGES,
        is_cache_head_major=False,
        is_bitcast_load=not request.is_interpreted,
        return_lse=True,
        has_new=False,
        left=left,
        log2_softcap=(request.soft_cap or 0.0) * _LOG2_E,
        guard_threshold=_vendor.overflow_guard_threshold(table.shape[1] * page_size),
        page_size=page_size,
        pages_per_seq=table.shape[1],
        is_merged_cache=True,
    )
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=(in_hbm, in_hbm),
            out_specs=(in_hbm, in_vmem),
            scratch_shapes=(
                pltpu.VMEM(staging_shape(block, twice, width, request.is_interpreted), pages.dtype),
                pltpu.VMEM((STAGES, heads, width), query.dtype),
                pltpu.VMEM((STAGES, heads, width), query.dtype),
                pltpu.VMEM((heads, LANES), jnp.float32),
                pltpu.VMEM((heads, LANES), jnp.float32),
                pltpu.VMEM((heads, width), query.dtype),
                pltpu.SemaphoreType.DMA((_SEMAPHORES, STAGES, twice // 2)),
            ),
        ),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),  # type: ignore[no-untyped-call]
            jax.ShapeDtypeStruct((rows, heads, LANES), jnp.float32),  # type: ignore[no-untyped-call]
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vector_limit(request.target),
            disable_bounds_checks=True,
        ),
        name="flywheel_paged_decode",
        interpret=pltpu.InterpretParams() if request.is_interpreted else False,
    )(
        lengths,
        jnp.arange(rows, dtype=jnp.int32),
        jnp.full(1, rows, jnp.int32),
        table.reshape(-1),
        scaled,
        pages,
    )
    return out, lse[:, :, 0]


def staging_shape(slots: int, twice: int, width: int, is_interpreted: bool) -> tuple[int, ...]:
    """The buffers into which a block of slots is copied: a head's key and value are one word of 32 bits.

    Args:
      slots: of a block.
      twice: 2 · K, the rows of a slot.
      width: H.
      is_interpreted: whether the words are read as two numbers, since interpret mode has no words.
    """
    if is_interpreted:
        return (STAGES, slots, twice, width)
    return (STAGES, slots, _vendor.bank_safe_word_stride(twice // 2), 2, width)


def _reading(
    lengths: Any,
    rows: Any,
    active: Any,
    table: Any,
    query: Any,
    pages: Any,
    out: Any,
    lse: Any,
    staging: Any,
    *scratch: Any,
    **settings: Any,
) -> None:
    """The vendor's kernel without new tokens.

    It touches neither these, nor the pool as its output, nor buffers for writing, nor buffers of values, which come
    with the keys: other references are passed in their places.
    """
    *sides, semaphores = scratch
    _vendor.kvcache_kernel(
        lengths, rows, active, table,
        query, query, pages, out, pages, lse,
        staging, staging, staging, staging, *sides, semaphores,
        **settings,
    )  # fmt: skip
