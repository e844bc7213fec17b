"""Attention of a few queries over parts of the keys: each program of the grid takes one part of one row's keys."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from kernelry.plugin import BlockGrid, Inputs, Request, Tiling
from kernelry_gpu_pallas.blocks import power_of_two
from kernelry_gpu_pallas.logits import LOWEST, Logits, cleaned
from kernelry_gpu_pallas.pallas_decode.operands import Cache, MaskArrays, Rows, of_row
from kernelry_gpu_pallas.runs import Runs
from kernelry_gpu_pallas.slots import Slots, load
from kernelry_gpu_pallas.tile_masks import TileMask


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Of each part of the keys: Σ p·v, the maximum logit in the unit of `logits`, and Σ p, of R = T·G rows."""

    logits: Logits
    total: Float[Array, "B K parts R D"]
    top: Float[Array, "B K parts R"]
    weight: Float[Array, "B K parts R"]


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _KernelSettings:
    """What is static in the kernel, and the arrays that it reads."""

    rows: Rows
    key: Cache
    value: Cache
    mask: MaskArrays
    logits: Logits
    hides: bool
    splits: int
    block_kv: int
    kv_len: int
    head_dim: int


def attend(inputs: Inputs, request: Request, tiling: Tiling) -> Parts:
    """Attends to each part; what no query of a row sees is neither fetched nor computed."""
    settings = _settings(inputs, request, tiling)
    rows, splits = settings.rows, settings.splits
    query = (None, None, rows.padded, power_of_two(request.head_dim))
    operands = [
        (_visits(inputs, request, settings.block_kv), pl.BlockSpec((None, 2), of_row(2, shared=False))),
        (rows.stacked(inputs.query), pl.BlockSpec(query, _of_head)),
        *settings.key.operands,
        *settings.value.operands,
        *settings.mask.operands,
    ]
    shape = (request.batch, request.kv_heads, splits, rows.padded)
    width = power_of_two(request.value_dim)
    by_part = pl.BlockSpec((None, None, None, rows.padded), _of_part)
    total, top, weight = pl.pallas_call(
        functools.partial(_part, settings=settings),
        grid=(splits, request.kv_heads, request.batch),
        in_specs=[spec for _, spec in operands],
        out_specs=(pl.BlockSpec((None, None, None, rows.padded, width), _of_part_and_width), by_part, by_part),
        out_shape=tuple(
            jax.ShapeDtypeStruct(size, jnp.float32)  # type: ignore[no-untyped-call]
            for size in ((*shape, width), shape, shape)
        ),
        compiler_params=plgpu.CompilerParams(num_warps=tiling["num_warps"], num_stages=tiling["num_stages"]),
        interpret=request.is_interpreted,
        name="pallas_decode",
    )(*(array for array, _ in operands))
    count = rows.count
    return Parts(settings.logits, total[..., :count, : request.value_dim], top[..., :count], weight[..., :count])


def _settings(inputs: Inputs, request: Request, tiling: Tiling) -> _KernelSettings:
    rows = Rows.of(request)
    return _KernelSettings(
        rows,
        Cache.of(inputs.key),
        Cache.of(inputs.value),
        MaskArrays(TileMask.of(inputs.mask, request), rows),
        Logits.of(request),
        request.mask.may_hide_slots(request.q_len, request.kv_len) or request.page_size is not None,
        tiling["splits"],
        tiling["block_kv"],
        request.kv_len,
        request.head_dim,
    )


def _of_head(split: Any, head: Any, row: Any) -> tuple[Any, ...]:
    del split
    return row, head, 0, 0


def _of_part(split: Any, head: Any, row: Any) -> tuple[Any, ...]:
    return row, head, split, 0


def _of_part_and_width(split: Any, head: Any, row: Any) -> tuple[Any, ...]:
    return row, head, split, 0, 0


def _visits(inputs: Inputs, request: Request, block_kv: int) -> Int32[Array, "B 2"]:
    """First and end of the blocks of keys that some query of each row of the batch may see."""
    grid = BlockGrid(q_len=request.q_len, kv_len=request.kv_len, block_q=max(1, request.q_len), block_kv=block_kv)
    runs = Runs.of_queries(inputs.mask, grid)
    every = jnp.concatenate([runs.full, runs.partial], axis=2)[:, 0]
    start, end = every[..., 0], every[..., 1]
    last = jnp.where(end > start, end, 0).max(axis=1, initial=0)
    first = jnp.where(end > start, start, grid.columns).min(axis=1, initial=grid.columns)
    return jnp.broadcast_to(jnp.stack([jnp.minimum(first, last), last], axis=-1), (request.batch, 2))


def _part(*refs: Any, settings: _KernelSettings) -> None:
    """One part of the keys of one row and one key/value head."""
    waiting = iter(refs)
    visits, query_ref = next(waiting), next(waiting)
    key_refs, value_refs = ([next(waiting) for _ in cache.operands] for cache in (settings.key, settings.value))
    mask_refs = [next(waiting) for _ in settings.mask.operands]
    total_ref, top_ref, weight_ref = waiting
    rows, split, head = settings.rows, pl.program_id(0), pl.program_id(1)
    query = load(query_ref, Slots(0, rows.padded, rows.count), settings.head_dim)

    def visit(block: Any, running: Any) -> Any:
        total, top, weight = running
        slots = Slots(block * settings.block_kv, settings.block_kv, settings.kv_len)
        key, value = settings.key.read(iter(key_refs), slots), settings.value.read(iter(value_refs), slots)
        logits, _ = settings.logits(query, key.held.astype(query.dtype), None, key.scale)
        if key.absent is not None:
            logits = jnp.where(key.absent[None, :], jnp.nan, logits)
        visible = settings.mask.visible(mask_refs, head, slots)
        if slots.inside is not None:
            inside = slots.inside[None, :]
            visible = inside if visible is None else visible & inside
        held, scale = value.held.astype(query.dtype), value.scale
        if visible is not None:
            visible = jnp.broadcast_to(visible, logits.shape)
            logits = jnp.where(visible, logits, -jnp.inf)
            if settings.hides:
                held = cleaned(held, visible)
                seen = visible.astype(jnp.int32).max(axis=0) > 0
                scale = None if scale is None else jnp.where(seen, scale, 0.0)
        highest = jnp.maximum(top, logits.max(axis=1))
        probability = settings.logits.power_in_kernel(logits - highest[:, None])
        before = settings.logits.power_in_kernel(top - highest)
        weighted = probability if scale is None else probability * scale[None, :]
        more = settings.logits.product(weighted.astype(held.dtype), held)
        return total * before[:, None] + more, highest, weight * before + probability.sum(axis=1)

    first, end = visits[0], visits[1]
    share = jax.lax.div(end - first + settings.splits - 1, settings.splits)
    start = first + split * share
    width = total_ref.shape[-1]
    nothing = (
        jnp.zeros((rows.padded, width), jnp.float32),
        jnp.full((rows.padded,), LOWEST, jnp.float32),
        jnp.zeros((rows.padded,), jnp.float32),
    )
    total_ref[...], top_ref[...], weight_ref[...] = jax.lax.fori_loop(
        start, jnp.minimum(start + share, end), visit, nothing
    )
