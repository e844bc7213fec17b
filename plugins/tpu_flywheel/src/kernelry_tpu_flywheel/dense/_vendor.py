"""Everything this kernel takes from flywheel-tpu, in one place.

Written against flywheel-tpu 0.3.0. Its public functions take no blocks and align the last query with the last key
alone, and cannot be differentiated where they return the logsumexp; so kernels are made by `make_flash_attn_mha` and
`flash_attn_bwd`, which those functions call. Neither name is underscored, and neither is in the vendor's documentation.

How much memory a core has, and how XLA tiles arrays, the vendor asks the device of this process, and a CPU answers with
numbers of its own. Its two functions that ask are replaced, once, by ones that answer for the target of the call while
one of ours is traced, and ask on elsewhere.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flywheel_tpu.pallas import bwd_pipeline, flash_bwd, fwd_pipeline, loop_schedule
from flywheel_tpu.pallas.block_sizes import LOG2E, MAX_VMEM_LIMIT_BYTES, BlockSizes
from flywheel_tpu.pallas.flash_fwd import make_flash_attn_mha
from jax.experimental.pallas import tpu as pltpu

from kernelry.plugin import Target

__all__ = ["answering_for", "backward", "forward"]

_CHIPS = {
    "v4": pltpu.ChipVersion.TPU_V4,
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "tpu7x": pltpu.ChipVersion.TPU_7X,
}
"""By the kind of a Target."""

_chip: contextvars.ContextVar[Any] = contextvars.ContextVar("flywheel_chip", default=None)


@contextlib.contextmanager
def answering_for(target: Target) -> Iterator[None]:
    """Has the vendor's questions about the chip answered for a target, in this thread; in interpret mode as ever."""
    known = _CHIPS.get(target.kind or "") if target.platform == "tpu" else None
    token = _chip.set(None if known is None else pltpu.get_tpu_info_for_chip(known, 1))
    try:
        yield
    finally:
        _chip.reset(token)


def _replace(modules: tuple[Any, ...], name: str, answer: Any) -> None:
    for module in modules:
        ask = getattr(module, name)

        def replacement(ask: Any = ask) -> int:
            chip = _chip.get()
            return int(ask() if chip is None else answer(chip))

        setattr(module, name, replacement)


_replace(
    (bwd_pipeline, flash_bwd, fwd_pipeline),
    "vmem_limit_bytes",
    lambda chip: min(MAX_VMEM_LIMIT_BYTES, chip.vmem_capacity_bytes),
)
_replace((fwd_pipeline, loop_schedule), "hbm_bf16_tile_rows", lambda chip: chip.get_sublane_tiling(jnp.bfloat16))


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array | None = None,
    *,
    target: Target,
    scale: float,
    soft_cap: float | None,
    offset: int,
    window: tuple[int | None, int | None],
    blocks: tuple[int, int, int, int],
    statistics: bool,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The output, and the natural logsumexp where statistics are asked for; a row without keys holds anything.

    Args:
      query: [N, T, H]. key: [K, S, H]. value: [K, S, D]. Batch rows count as heads.
      starts: int32 [sequences + 1], where packed sequences begin, the end last; None where there are none.
      target, scale, soft_cap, statistics, interpret: of the call.
      offset: which key the first query is aligned with; 0 for packed sequences.
      window: how many keys back and ahead of that one it sees; None is all.
      blocks: queries and keys of a block, and how many of them are multiplied at once.

    Returns:
      [N, T, D], and float32 [N, T].
    """
    block_q, block_kv, rows, keys = blocks
    attend = make_flash_attn_mha(
        query.shape[0],
        query.shape[1],
        key.shape[1],
        causal=False,  # the window says it
        causal_offset=offset,
        window=window,
        block_sizes=BlockSizes(block_q, block_kv, block_kv_compute=keys, block_q_compute=rows),
        num_kv_heads=key.shape[0],
        interpret=interpret,
        softcap=soft_cap or 0.0,
        return_lse=statistics,
        varlen_max_seqlen_kv=None if starts is None else key.shape[1],
        q_scale=scale * LOG2E if soft_cap is None else scale / soft_cap,
    )
    with answering_for(target):
        found: Any = attend(query, key, value, *(() if starts is None else (starts, starts)))
    return tuple(found) if statistics else (found,)


def backward(
    arrays: tuple[jax.Array, ...],
    *,
    target: Target,
    scale: float,
    offset: int | None,
    blocks: tuple[int, int, int, int],
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of query, key and value.

    Args:
      arrays: query, key and value as in `forward`; the output [N, T, D], its finite natural logsumexp [N, T], and the
        output's cotangent.
      target, scale, interpret: of the call.
      offset: the last key that the first query sees; None where each sees all.
      blocks: as in `forward`.
    """
    block_q, block_kv, rows, keys = blocks
    query, key, value, out, lse, d_out = arrays
    with answering_for(target):
        found: tuple[jax.Array, jax.Array, jax.Array] = flash_bwd.flash_attn_bwd(
            query,
            key,
            value,
            out,
            lse,
            d_out,
            causal=offset is not None,
            causal_offset=offset or 0,
            softmax_scale=scale,
            block=block_q,
            block_kv=block_kv,
            block_q_compute=rows,
            block_kv_compute=keys,
            interpret=interpret,
        )
    return found
