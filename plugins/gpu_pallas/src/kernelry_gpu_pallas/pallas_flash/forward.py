"""The forward pass: softmax over the blocks of keys as they come, with a running maximum and sum."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kernelry.plugin import Inputs, Request, Tiling, log_sum
from kernelry_gpu_pallas.blocks import power_of_two
from kernelry_gpu_pallas.logits import LOWEST, cleaned
from kernelry_gpu_pallas.pallas_flash.operands import At, Operands, Sizes
from kernelry_gpu_pallas.pallas_flash.tiles import ONE_HEAD, KernelSettings, over_runs
from kernelry_gpu_pallas.runs import Runs
from kernelry_gpu_pallas.slots import Slots, load, store
from kernelry_gpu_pallas.tile_masks import TileMask


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Attention without sinks: out in the dtype of the query, the others float32, None where not asked for."""

    out: Float[Array, "B T N D"]
    lse: Float[Array, "B N T"] | None
    lse_rest: Float[Array, "B N T"] | None
    top: Float[Array, "B N T"] | None


def forward(inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Result:
    """Attends; each program of the grid takes one block of queries of one head."""
    sizes = Sizes.of(request, tiling["block_q"], tiling["block_kv"])
    mask = TileMask.of(inputs.mask, request)
    operands = Operands(sizes)
    operands.add_inputs(inputs, Runs.of_queries(inputs.mask, sizes.grid), mask)
    rows = jax.ShapeDtypeStruct((request.batch, request.q_heads, request.q_len), jnp.float32)  # type: ignore[no-untyped-call]
    out = jax.ShapeDtypeStruct((*inputs.query.shape[:3], request.value_dim), inputs.query.dtype)  # type: ignore[no-untyped-call]
    wanted = {"out": out}
    if statistics:
        wanted["lse"] = wanted["lse_rest"] = rows
    if request.max_logits:
        wanted["top"] = rows
    settings = KernelSettings.of(request, operands, mask, tuple(wanted))
    width = power_of_two(request.value_dim)
    specs = {
        "out": operands.spec((None, sizes.block_q, None, width), (At.ROW, At.BLOCK, At.HEAD, At.FIRST)),
    }
    for name in ("lse", "lse_rest", "top"):
        specs[name] = operands.spec((None, None, sizes.block_q), (At.ROW, At.HEAD, At.BLOCK))
    call = pl.pallas_call(
        functools.partial(_block, settings=settings),
        grid=(sizes.grid.rows, request.q_heads, request.batch),
        in_specs=operands.specs,
        out_specs=tuple(specs[name] for name in wanted),
        out_shape=tuple(wanted.values()),
        compiler_params=plgpu.CompilerParams(num_warps=tiling["num_warps"], num_stages=tiling["num_stages"]),
        interpret=request.is_interpreted,
        name="pallas_flash_forward",
    )
    # Of what `jax.checkpoint` would compute again, JAX eliminates a jitted function whose results are not used, and no
    # `pallas_call`.
    found = jax.jit(call)(*operands.arrays)
    by_name = dict(zip(wanted, found, strict=True))
    return Result(by_name["out"], by_name.get("lse"), by_name.get("lse_rest"), by_name.get("top"))


def _block(*all_refs: Any, settings: KernelSettings) -> None:
    """One block of queries of one head."""
    refs, sizes = settings.named(all_refs), settings.sizes
    query_slots = Slots(pl.program_id(0) * sizes.block_q, sizes.block_q, sizes.q_len)
    query = load(refs["query"], query_slots, sizes.head_dim)

    def visit(masked: bool, column: Any, running: Any) -> Any:
        total, top, weight = running
        kv_slots = Slots(column * sizes.block_kv, sizes.block_kv, sizes.kv_len)
        key = load(refs["key"].at[kv_slots.window, :], kv_slots, sizes.head_dim)
        value = load(refs["value"].at[kv_slots.window, :], kv_slots, sizes.value_dim)
        slots = query_slots, kv_slots
        logits, _ = settings.logits_of(refs, ONE_HEAD, (query, key), slots)
        visible = settings.visible(refs, ONE_HEAD, *slots) if masked else None
        if visible is not None:
            logits = jnp.where(visible, logits, -jnp.inf)
            if settings.hides:
                value = cleaned(value, visible)
        highest = jnp.maximum(top, logits.max(axis=1))
        probability = settings.logits.power_in_kernel(logits - highest[:, None])
        before = settings.logits.power_in_kernel(top - highest)
        more = settings.logits.product(probability.astype(value.dtype), value)
        return total * before[:, None] + more, highest, weight * before + probability.sum(axis=1)

    start = (
        jnp.zeros((sizes.block_q, power_of_two(sizes.value_dim)), jnp.float32),
        jnp.full((sizes.block_q,), LOWEST, jnp.float32),
        jnp.zeros((sizes.block_q,), jnp.float32),
    )
    total, top, weight = over_runs(refs, visit, start)
    empty = weight == 0
    divisor = jnp.where(empty, 1.0, weight)
    largest = jnp.where(empty, 0.0, top * settings.logits.unit)
    store(refs["out"], total / divisor[:, None], query_slots, sizes.value_dim)
    if "lse" in refs:
        lse, rest = log_sum(largest, divisor)
        store(refs["lse"], jnp.where(empty, -jnp.inf, lse), query_slots)
        store(refs["lse_rest"], rest, query_slots)
    if "top" in refs:
        store(refs["top"], jnp.where(empty, -jnp.inf, largest), query_slots)
