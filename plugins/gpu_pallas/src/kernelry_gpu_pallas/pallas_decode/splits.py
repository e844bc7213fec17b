"""Attention of a few queries over parts of the keys: each program of the grid takes one part of one row's keys."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from kernelry.plugin import BlockGrid, Inputs, Request, Tiling
from kernelry_gpu_pallas.blocks import power_of_two
from kernelry_gpu_pallas.logits import LOWEST, Logits, cleaned
from kernelry_gpu_pallas.pallas_decode.columns import columns_of_keys, end_of, has_value_in_key
from kernelry_gpu_pallas.pallas_decode.operands import Cache, MaskArrays, Rows, Tile, of_row
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
    """What is static in the kernel, and the arrays that it reads; no `value` where the values are in the keys."""

    rows: Rows
    key: Cache
    value: Cache | None
    mask: MaskArrays
    logits: Logits
    hides: bool
    splits: int
    block_kv: int
    kv_len: int


def attend(inputs: Inputs, request: Request, tiling: Tiling) -> Parts:
    """Attends to each part; what no query of a row sees is neither fetched nor computed."""
    settings = _settings(inputs, request, tiling)
    rows, splits = settings.rows, settings.splits
    query = (None, None, rows.padded, end_of(settings.key.columns))
    operands = [
        (_visits(inputs, request, settings.block_kv), pl.BlockSpec((None, 2), of_row(2, shared=False))),
        (rows.stacked(inputs.query), pl.BlockSpec(query, functools.partial(_of_queries, rows=rows))),
        *settings.key.operands,
        *(() if settings.value is None else settings.value.operands),
        *settings.mask.operands,
    ]
    shape = (request.batch, request.kv_heads, splits, rows.tiles * rows.padded)
    width = power_of_two(request.value_dim)
    place = functools.partial(_of_part, rows=rows)
    by_part = pl.BlockSpec((None, None, None, rows.padded), place)
    total, top, weight = pl.pallas_call(
        functools.partial(_part, settings=settings),
        grid=(splits * rows.tiles, request.kv_heads, request.batch),
        in_specs=[spec for _, spec in operands],
        out_specs=(
            pl.BlockSpec((None, None, None, rows.padded, width), lambda *at: (*place(*at), 0)),
            by_part,
            by_part,
        ),
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
    in_key = has_value_in_key(request)
    rows = Rows.of(request, tiling["block_rows"] if in_key else None)
    return _KernelSettings(
        rows,
        Cache.of(inputs.key, columns_of_keys(request)),
        None if in_key else Cache.of(inputs.value),
        MaskArrays(TileMask.of(inputs.mask, request), rows),
        Logits.of(request),
        request.mask.may_hide_slots(request.q_len, request.kv_len) or request.page_size is not None,
        tiling["splits"],
        tiling["block_kv"],
        request.kv_len,
    )


def _split_and_tile(program: Any, rows: Rows) -> tuple[Any, Any]:
    """Of the grid's first axis: the part of the keys and the tile of rows; tiles of a part are neighbours.

    They run at about the same time, so that all but one find the keys in the device's cache.
    """
    if rows.tiles == 1:
        return program, 0
    return jax.lax.div(program, np.int32(rows.tiles)), jax.lax.rem(program, np.int32(rows.tiles))


def _of_queries(program: Any, head: Any, row: Any, *, rows: Rows) -> tuple[Any, ...]:
    return row, head, _split_and_tile(program, rows)[1], 0


def _of_part(program: Any, head: Any, row: Any, *, rows: Rows) -> tuple[Any, ...]:
    return row, head, *_split_and_tile(program, rows)


def _visits(inputs: Inputs, request: Request, block_kv: int) -> Int32[Array, "B 2"]:
    """First and end of the blocks of keys that some query of each row of the batch may see."""
    grid = BlockGrid(q_len=request.q_len, kv_len=request.kv_len, block_q=max(1, request.q_len), block_kv=block_kv)
    runs = Runs.of_queries(inputs.mask, grid)
    every = jnp.concatenate([runs.full, runs.partial], axis=2)[:, 0]
    start, end = every[..., 0], every[..., 1]
    last = jnp.where(end > start, end, 0).max(axis=1, initial=0)
    first = jnp.where(end > start, start, grid.columns).min(axis=1, initial=grid.columns)
    return jnp.broadcast_to(jnp.stack([jnp.minimum(first, last), last], axis=-1), (request.batch, 2))


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Refs:
    """What a program of the grid reads, apart from its queries."""

    key: list[Any]
    value: list[Any]
    mask: list[Any]


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """What the rows of a tile find in a block of keys.

    Args:
      logits: −inf where hidden. value: without what is hidden from all rows. scale: of the values, [block_kv].
    """

    logits: Float[Array, "rows block_kv"]
    value: Float[Array, "block_kv D"]
    scale: Float[Array, " block_kv"] | None


def _part(*refs: Any, settings: _KernelSettings) -> None:
    """One part of the keys of one row of the batch and one key/value head, for a tile of the rows that read it."""
    waiting = iter(refs)
    visits, query_ref = next(waiting), next(waiting)
    caches = (settings.key, settings.value)
    key_refs, value_refs = ([next(waiting) for _ in cache.operands] if cache else [] for cache in caches)
    arrays = _Refs(key_refs, value_refs, [next(waiting) for _ in settings.mask.operands])
    total_ref, top_ref, weight_ref = waiting
    program, head = pl.program_id(0), pl.program_id(1)
    split, number = _split_and_tile(program, settings.rows)
    rows = settings.rows.tile(number)
    mask = dataclasses.replace(settings.mask, rows=rows)
    query = tuple(
        load(query_ref.at[:, pl.ds(each.start, each.padded)], Slots(rows.first, rows.padded, rows.count), each.width)
        for each in settings.key.columns
    )
    found_in = _value_in_key if settings.value is None else _separate

    def visit(block: Any, running: Any) -> Any:
        total, top, weight = running
        slots = Slots(block * settings.block_kv, settings.block_kv, settings.kv_len)
        found = found_in(settings, mask, arrays, query, head, slots)
        highest = jnp.maximum(top, found.logits.max(axis=1))
        probability = settings.logits.power_in_kernel(found.logits - highest[:, None])
        before = settings.logits.power_in_kernel(top - highest)
        weighted = probability if found.scale is None else probability * found.scale[None, :]
        more = settings.logits.product(weighted.astype(found.value.dtype), found.value)
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


def _separate(
    settings: _KernelSettings, mask: MaskArrays, refs: _Refs, query: tuple[jax.Array, ...], head: Any, slots: Slots
) -> _Block:
    """Of keys and values in arrays of their own."""
    assert settings.value is not None
    key, value = settings.key.read(iter(refs.key), slots), settings.value.read(iter(refs.value), slots)
    logits = _logits(settings, query, key, key.of_dtype(query[0].dtype))
    visible = _visible(mask, refs, head, slots)
    (held,), scale = value.of_dtype(query[0].dtype), value.scale
    if visible is None:
        return _Block(logits, held, scale)
    visible = jnp.broadcast_to(visible, logits.shape)
    logits = jnp.where(visible, logits, -jnp.inf)
    if settings.hides:
        held = cleaned(held, visible)
        seen = visible.astype(jnp.int32).max(axis=0) > 0
        scale = None if scale is None else jnp.where(seen, scale, 0.0)
    return _Block(logits, held, scale)


def _value_in_key(
    settings: _KernelSettings, mask: MaskArrays, refs: _Refs, query: tuple[jax.Array, ...], head: Any, slots: Slots
) -> _Block:
    """Of keys whose first columns are the values, which are read once; what no row of the tile sees is not read."""
    visible = _visible(mask, refs, head, slots)
    key = settings.key.read(iter(refs.key), slots, None if visible is None else _by_any(visible, slots.block))
    columns = key.of_dtype(query[0].dtype)
    logits = _logits(settings, query, key, columns)
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    return _Block(logits, columns[0], key.scale)


def _logits(settings: _KernelSettings, query: tuple[jax.Array, ...], key: Tile, columns: tuple[jax.Array, ...]) -> Any:
    """Before the mask; NaN where there is no page."""
    products = (settings.logits.product(*each, turn_other=True) for each in zip(query, columns, strict=True))
    logits, _ = settings.logits.of_products(functools.reduce(operator.add, products), None, key.scale)
    return logits if key.absent is None else jnp.where(key.absent[None, :], jnp.nan, logits)


def _visible(mask: MaskArrays, refs: _Refs, head: Any, slots: Slots) -> jax.Array | None:
    """What the rows of a tile see of the slots that exist, [rows or 1, block_kv or 1]; None where all of it."""
    visible = mask.visible(refs.mask, head, slots)
    if slots.inside is None:
        return visible
    inside = slots.inside[None, :]
    return inside if visible is None else visible & inside


def _by_any(visible: jax.Array, block: int) -> jax.Array:
    """What any row sees, [block_kv]."""
    if visible.shape[0] > 1:
        visible = visible.astype(jnp.int32).max(axis=0, keepdims=True) > 0
    return jnp.broadcast_to(visible.reshape(visible.shape[1:]), (block,))
