"""The backward pass: probabilities recomputed from lse; one kernel for dQ, one for dK and dV.

Nothing is added up out of order, so that the same call gives the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Request, Tiling
from kernelry_gpu_pallas.blocks import power_of_two
from kernelry_gpu_pallas.logits import Logits, cleaned
from kernelry_gpu_pallas.pallas_flash.operands import At, Operands, Sizes
from kernelry_gpu_pallas.pallas_flash.tiles import ONE_HEAD, KernelSettings, over_runs
from kernelry_gpu_pallas.runs import Runs
from kernelry_gpu_pallas.slots import Slots, load, store
from kernelry_gpu_pallas.tile_masks import TileMask


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """What both kernels read besides the inputs, of the whole attention; lse in the unit of the kernels' logits."""

    d_out: Float[Array, "B T N D"]
    lse: Float[Array, "B N T"]
    delta: Float[Array, "B N T"]


def backward(
    inputs: Inputs,
    request: Request,
    tiling: Tiling,
    out: Float[Array, "B T N D"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N D"],
    d_lse: Float[Array, "B N T"] | None,
) -> Gradients:
    """Returns this part's share of the gradients; see `Kernel.backward`."""
    delta = jnp.einsum("BTND,BTND->BNT", out.astype(jnp.float32), d_out.astype(jnp.float32))
    if d_lse is not None:
        delta = delta - d_lse
    whole = _Whole(d_out.astype(inputs.query.dtype), lse / Logits.of(request).unit, delta)
    d_query = _of_queries(inputs, request, tiling, whole)
    d_key, d_value = _of_keys(inputs, request, tiling, whole)
    return Gradients(d_query, d_key, d_value)


def _of_queries(inputs: Inputs, request: Request, tiling: Tiling, whole: _Whole) -> jax.Array:
    sizes = Sizes.of(request, tiling["block_q_dq"], tiling["block_kv_dq"])
    operands, settings = _operands(inputs, request, whole, Runs.of_queries(inputs.mask, sizes.grid), sizes)
    width = power_of_two(request.head_dim)
    found: jax.Array = pl.pallas_call(
        functools.partial(_query_block, settings=settings),
        grid=(sizes.grid.rows, request.q_heads, request.batch),
        in_specs=operands.specs,
        out_specs=operands.spec((None, sizes.block_q, None, width), (At.ROW, At.BLOCK, At.HEAD, At.FIRST)),
        out_shape=jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype),  # type: ignore[no-untyped-call]
        compiler_params=_compiler_params(tiling),
        interpret=request.is_interpreted,
        name="pallas_flash_backward_q",
    )(*operands.arrays)
    return found


def _of_keys(inputs: Inputs, request: Request, tiling: Tiling, whole: _Whole) -> tuple[jax.Array, jax.Array]:
    sizes = Sizes.of(request, tiling["block_q_dkv"], tiling["block_kv_dkv"], by_keys=True)
    operands, settings = _operands(inputs, request, whole, Runs.of_keys(inputs.mask, sizes.grid), sizes)
    widths = (power_of_two(width) for width in (request.head_dim, request.value_dim))
    d_key, d_value = pl.pallas_call(
        functools.partial(_key_block, settings=settings),
        grid=(sizes.grid.columns, request.kv_heads, request.batch),
        in_specs=operands.specs,
        out_specs=tuple(
            operands.spec((None, sizes.block_kv, None, width), (At.ROW, At.BLOCK, At.HEAD, At.FIRST))
            for width in widths
        ),
        out_shape=tuple(
            jax.ShapeDtypeStruct(array.shape, array.dtype)  # type: ignore[no-untyped-call]
            for array in (inputs.key, inputs.value)
        ),
        compiler_params=_compiler_params(tiling),
        interpret=request.is_interpreted,
        name="pallas_flash_backward_kv",
    )(*operands.arrays)
    return d_key, d_value


def _operands(
    inputs: Inputs, request: Request, whole: _Whole, runs: Runs, sizes: Sizes
) -> tuple[Operands, KernelSettings]:
    mask = TileMask.of(inputs.mask, request)
    operands = Operands(sizes)
    operands.add_inputs(inputs, runs, mask)
    operands.add_queries("d_out", whole.d_out)
    operands.add_rows("lse", whole.lse)
    operands.add_rows("delta", whole.delta)
    outputs = ("d_key", "d_value") if sizes.by_keys else ("d_query",)
    return operands, KernelSettings.of(request, operands, mask, outputs)


def _compiler_params(tiling: Tiling) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=tiling["num_warps_backward"], num_stages=tiling["num_stages_backward"])


def _query_block(*all_refs: Any, settings: KernelSettings) -> None:
    """Computes dQ of one block of queries of one head."""
    refs, sizes = settings.named(all_refs), settings.sizes
    query_slots = Slots(pl.program_id(0) * sizes.block_q, sizes.block_q, sizes.q_len)
    rows = _Rows.read(refs, ONE_HEAD, query_slots, sizes)

    def visit(masked: bool, column: Any, d_query: Any) -> Any:
        kv_slots = Slots(column * sizes.block_kv, sizes.block_kv, sizes.kv_len)
        key = load(refs["key"].at[kv_slots.window, :], kv_slots, sizes.head_dim)
        value = load(refs["value"].at[kv_slots.window, :], kv_slots, sizes.value_dim)
        _, d_logits, visible = _tile(settings, refs, ONE_HEAD, rows, (query_slots, kv_slots), (key, value), masked)
        if visible is not None and settings.hides:
            key = cleaned(key, visible)
        return d_query + settings.logits.product(d_logits.astype(key.dtype), key)

    start = jnp.zeros((sizes.block_q, power_of_two(sizes.head_dim)), jnp.float32)
    store(refs["d_query"], over_runs(refs, visit, start) * settings.logits.scale, query_slots, sizes.head_dim)


def _key_block(*all_refs: Any, settings: KernelSettings) -> None:
    """Computes dK and dV of one block of keys of one head: the sum over the query heads that read it."""
    refs, sizes = settings.named(all_refs), settings.sizes
    kv_slots = Slots(pl.program_id(0) * sizes.block_kv, sizes.block_kv, sizes.kv_len)
    key = load(refs["key"], kv_slots, sizes.head_dim)
    value = load(refs["value"], kv_slots, sizes.value_dim)

    def over_head(head: Any, sums: Any) -> Any:
        def visit(masked: bool, row: Any, sums: Any) -> Any:
            d_key, d_value = sums
            query_slots = Slots(row * sizes.block_q, sizes.block_q, sizes.q_len)
            rows = _Rows.read(refs, head, query_slots, sizes)
            probability, d_logits, _ = _tile(settings, refs, head, rows, (query_slots, kv_slots), (key, value), masked)
            d_value = d_value + settings.logits.product(probability.astype(value.dtype), rows.d_out)
            query = rows.alive if masked and settings.empties else rows.query
            d_key = d_key + settings.logits.product(d_logits.astype(key.dtype), query)
            return d_key, d_value

        return over_runs(refs, visit, sums)

    start = tuple(
        jnp.zeros((sizes.block_kv, power_of_two(width)), jnp.float32) for width in (sizes.head_dim, sizes.value_dim)
    )
    d_key, d_value = (
        jax.lax.fori_loop(0, sizes.heads, over_head, start) if sizes.heads > 1 else over_head(ONE_HEAD, start)
    )
    store(refs["d_key"], d_key * settings.logits.scale, kv_slots, sizes.head_dim)
    store(refs["d_value"], d_value, kv_slots, sizes.value_dim)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What the backward pass reads of a block of queries; lse is +inf beyond T, so that nothing comes of it."""

    query: Float[Array, "block_q H"]
    d_out: Float[Array, "block_q D"]
    lse: Float[Array, " block_q"]
    delta: Float[Array, " block_q"]

    @property
    def alive(self) -> jax.Array:
        """The queries that see a key, the others 0: what they hold must not reach a product."""
        return jnp.where(jnp.isposinf(self.lse)[:, None], jnp.zeros_like(self.query), self.query)

    @classmethod
    def read(cls, refs: dict[str, Any], head: Any, slots: Slots, sizes: Sizes) -> _Rows:
        """Those of a head; a kernel over queries has references to one block of one head alone."""

        def part(name: str) -> Any:
            if not sizes.by_keys:
                return refs[name]
            return refs[name].at[slots.window, head, :] if refs[name].ndim == 3 else refs[name].at[head, slots.window]

        return cls(
            load(part("query"), slots, sizes.head_dim),
            load(part("d_out"), slots, sizes.value_dim),
            load(part("lse"), slots, other=float("inf")),
            load(part("delta"), slots),
        )


def _tile(
    settings: KernelSettings,
    refs: dict[str, Any],
    head: Any,
    rows: _Rows,
    slots: tuple[Slots, Slots],
    kv: tuple[jax.Array, jax.Array],
    masked: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Probabilities of a tile, the cotangents of its logits, and what of it is visible; as a tile of the kernel is."""
    key, value = kv
    logits, slope = settings.logits_of(refs, head, (rows.query, key), slots)
    visible = settings.visible(refs, head, *slots) if masked else None
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    # At most 1, though a logit as large as 1e9 may round to more than it did in the forward pass.
    probability = settings.logits.power_in_kernel(jnp.minimum(logits - settings.tile_of_rows(rows.lse), 0.0))
    one, other = (value, rows.d_out) if settings.sizes.by_keys else (rows.d_out, value)
    d_probability = settings.logits.product(one, other, turn_other=True)
    d_logits = probability * (d_probability - settings.tile_of_rows(rows.delta))
    if slope is not None:
        d_logits = d_logits * slope
    if visible is not None:
        d_logits = jnp.where(visible, d_logits, 0.0)
    return probability, d_logits, visible
