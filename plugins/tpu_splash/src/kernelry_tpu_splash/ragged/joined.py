"""The Pallas kernel for few queries: one product with the keys of all heads, instead of one per head.

Keys [B, S, K, H] are read as [B, S · K, H], the same bytes. To take one head from them would be to take every K-th
sublane, which costs more than the matrix unit spends on the products that are thrown away: a row of queries reads all
S · K keys of a block, and those of other heads count as hidden.

Law: what a slot holds that a row does not see changes nothing. A value that is seen and not finite, however, makes the
outputs of all heads NaN, since 0 · ∞ is NaN, and not of its own head alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from kernelry_tpu_splash.lanes import LANES, SUBLANES
from kernelry_tpu_splash.ragged.layout import Blocks, Order
from kernelry_tpu_splash.ragged.pallas import (
    KernelSettings,
    Operands,
    block_at,
    cleaned,
    over_slots,
    product,
    step,
)


def attend_joined(
    operands: Operands, settings: KernelSettings
) -> tuple[Float[Array, "B K R D"], Float[Array, "B K R"], Float[Array, "B K R"]]:
    """Returns the unnormalised output, the largest logits and the sums, in float32; −inf and 0 of nothing."""
    batch, kv_heads, rows, _ = operands.query.shape
    scalars = operands.scalars()
    given, specs = _given(operands, settings.blocks)
    sizes = tuple((rows * kv_heads, width) for width in (settings.value_dim, LANES, LANES))
    out, top, total = pl.pallas_call(
        functools.partial(step, attend=_attend, settings=settings, pages_of_row=operands.pages_of_row),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, 1, jnp.maximum(operands.count.max(), 1)),
            in_specs=specs,
            out_specs=[_whole_row(*size) for size in sizes],
            scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in sizes],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, *size), jnp.float32) for size in sizes],  # type: ignore[no-untyped-call]
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=settings.interpret,
        name="kernelry_ragged",
    )(*scalars, *given)
    return _by_head(out, kv_heads), _by_head(top, kv_heads)[..., 0], _by_head(total, kv_heads)[..., 0]


def _given(operands: Operands, blocks: Blocks) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """The arrays that are read, and which part of each in a step."""
    _, kv_heads, rows, head_dim = operands.query.shape
    given, specs = [_rows_first(operands.query)], [_whole_row(rows * kv_heads, head_dim)]
    for array in (operands.key, operands.value):
        if array is None:
            continue
        width = array.shape[-1]
        for page in range(blocks.pages):
            given.append(array.reshape(array.shape[0], -1, width))
            slots = blocks.slots // blocks.pages
            in_pages = functools.partial(_place_of_page, page, blocks.pages, operands.pages_of_row)
            place = _place_of_row if operands.pages is None else in_pages
            specs.append(pl.BlockSpec((1, slots * kv_heads, width), place))
    for scale in (operands.key_scale, operands.value_scale):
        if scale is not None:
            given.append(scale)
            specs.append(pl.BlockSpec((1, scale.shape[1], blocks.slots), over_slots(scale.shape[1:2])))
    shared = operands.visible.shape
    given.append(operands.visible)
    specs.append(pl.BlockSpec((1, *shared[1:3], blocks.slots), over_slots(shared)))
    return given, specs


def _rows_first(query: Float[Array, "B K R H"]) -> Float[Array, "B R*K H"]:
    """Row r · K + k is row r of head k, as key s · K + k is slot s of it."""
    batch, _, _, width = query.shape
    return query.swapaxes(1, 2).reshape(batch, -1, width)


def _by_head(rows: Float[Array, "B R*K D"], kv_heads: int) -> Float[Array, "B K R D"]:
    batch, _, width = rows.shape
    return rows.reshape(batch, -1, kv_heads, width).swapaxes(1, 2)


def _whole_row(rows: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, rows, width), _row_alone)


def _row_alone(b: Any, h: Any, i: Any, *scalars: Any) -> tuple[Any, ...]:
    return (b, 0, 0)


def _place_of_row(b: Any, h: Any, i: Any, first: Any, count: Any, *scalars: Any) -> tuple[Any, ...]:
    return (b, block_at(b, i, first, count), 0)


def _place_of_page(page: int, pages: int, pages_of_row: int, b: Any, h: Any, i: Any, *scalars: Any) -> tuple[Any, ...]:
    return (jnp.maximum(scalars[-1][b * pages_of_row + i * pages + page], 0), 0, 0)


def _attend(
    inputs: list[Any],
    carried: tuple[Any, Any, Any],
    settings: KernelSettings,
    absent: Any,
    *,
    is_whole: bool,
) -> None:
    """Adds a block to what is carried; of a whole one some row sees every slot, and nothing has to be cleaned."""
    sums, maxima, totals = carried
    query, keys, values, scales, visible = settings.split(inputs)
    heads = settings.blocks.heads
    factors = [_factor(scale[0], heads) for scale in scales]
    key = _joined(keys, query.dtype)
    logits = product(query[0], key, by_columns=False) * settings.scale
    if factors:
        logits = logits * factors[0]
    if settings.soft_cap is not None:
        logits = settings.soft_cap * jnp.tanh(logits / settings.soft_cap)
    if absent is not None:
        logits = jnp.where(absent, jnp.nan, logits)
    own = _own(logits.shape, heads)
    seen = None if is_whole and visible.shape[1:3] == (1, 1) else _seen(visible, heads)
    if seen is not None:
        own = own & _by_row(seen, logits.shape[0], heads)
    logits = jnp.where(own, logits, -jnp.inf)
    before = maxima[:, :1]
    now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
    # A row that has seen nothing yet has −inf, of which a difference is NaN.
    shift = jnp.where(now == -jnp.inf, 0.0, now)
    weights = jnp.exp(logits - shift)
    shrink = jnp.exp(before - shift)
    totals[...] = jnp.broadcast_to(shrink * totals[:, :1] + weights.sum(axis=1, keepdims=True), totals.shape)
    maxima[...] = jnp.broadcast_to(now, maxima.shape)
    value = _joined(values, query.dtype) if values else settings.value_in(key)
    if seen is not None and not is_whole:
        value = cleaned(value, seen > 0, Order.AS_IT_IS)
    if factors:
        weights = weights * (factors[-1] if seen is None else jnp.where(own, factors[-1], 0))
    sums[...] = shrink * sums[...] + product(weights.astype(value.dtype), value, by_columns=True)


def _joined(pages: list[Any], dtype: Any) -> jax.Array:
    """The keys of a block, [S · K, H]. int8 is exact in bfloat16."""
    found = [page[0].astype(dtype) for page in pages]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=0)


def _own(shape: tuple[int, ...], heads: int) -> Bool[Array, "R*K S*K"]:
    """Whether a key is of the row's head; `heads` is a power of two."""
    row, key = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    return ((row ^ key) & (heads - 1)) == 0


def _factor(scale: Float[Array, "#K S"], heads: int) -> Float[Array, "1 S*K"]:
    """The scale of each key."""
    repeated = _by_key(scale, heads)
    if scale.shape[0] == 1:
        return repeated
    return jnp.where(_own(repeated.shape, heads), repeated, 0.0).sum(axis=0, keepdims=True)


def _seen(visible: Any, heads: int) -> Float[Array, "#R S*K"]:
    """1 where row r of a key's head sees it, else 0."""
    found = _by_key(visible[0, 0].astype(jnp.float32), heads)
    for head in range(1, visible.shape[1]):
        of = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1) & (heads - 1)
        found = jnp.where(of == head, _by_key(visible[0, head].astype(jnp.float32), heads), found)
    return found


def _by_key(rows: Float[Array, "R S"], heads: int) -> Float[Array, "R S*K"]:
    """Repeats each slot once per head, one register of keys after another."""
    held = jnp.broadcast_to(rows, (SUBLANES, rows.shape[1])) if rows.shape[0] == 1 else rows
    lane = jax.lax.broadcasted_iota(jnp.int32, (held.shape[0], LANES), 1) >> _bits(heads)
    found = []
    for start in range(0, rows.shape[1], LANES // heads):
        register = start // LANES * LANES
        slots = held[:, register : register + LANES]
        found.append(jnp.take_along_axis(slots, lane + (start - register), axis=1, mode="promise_in_bounds"))
    return jnp.concatenate(found, axis=1)[: rows.shape[0]]


def _bits(heads: int) -> int:
    """The logarithm of a power of two."""
    return heads.bit_length() - 1


def _by_row(seen: Float[Array, "#R S*K"], rows: int, heads: int) -> Bool[Array, "#R*K S*K"]:
    """Repeats what holds for row r of every head; by a product, since sublanes are not moved as easily."""
    if seen.shape[0] == 1:
        return seen > 0
    row, of = (jax.lax.broadcasted_iota(jnp.int32, (rows, seen.shape[0]), axis) for axis in range(2))
    chosen = jnp.where(row >> _bits(heads) == of, 1.0, 0.0).astype(jnp.bfloat16)
    return product(chosen, seen.astype(jnp.bfloat16), by_columns=True) > 0.5
