"""The kernel `ragged`: decode whose work follows the length of each row, over arrays and pages."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernelry.plugin import Inputs, Kernel, PagedArray, Partial, QuantizedArray, Request, Tiling, round_up
from kernelry_tpu_splash.operands import visible
from kernelry_tpu_splash.ragged.joined import attend_joined
from kernelry_tpu_splash.ragged.layout import Blocks
from kernelry_tpu_splash.ragged.pallas import KernelSettings, Operands, attend, block_at

_SCOPE = "kernelry.ragged"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class RaggedKernel(Kernel):
    """Reads the blocks between the first and the last slot that a row sees; has no derivative."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            blocks = Blocks.of(request, tiling)
            settings = KernelSettings(
                blocks,
                request.value_dim,
                request.scale,
                request.soft_cap,
                request.mask.may_hide_slots(request.q_len, request.kv_len) or bool(request.kv_len % blocks.slots),
                request.is_interpreted,
            )
            through = attend_joined if blocks.joined else attend
            out, top, total = through(_operands(inputs, request, blocks), settings)
            max_logits = _by_head(top, request).max(axis=2) if request.max_logits else None
            if statistics:
                unnormalised = _by_query(out, request)
                return Partial(
                    unnormalised,
                    max=_by_head(top, request),
                    sum=_by_head(total, request),
                    max_logits=max_logits,
                    dtype=request.dtype,
                )
            divided = out / jnp.where(total == 0, 1.0, total)[..., None]
            return Partial(
                _by_query(divided, request).astype(request.dtype), max_logits=max_logits, dtype=request.dtype
            )


def _operands(inputs: Inputs, request: Request, blocks: Blocks) -> Operands:
    seen = visible(inputs, request)
    padded = round_up(request.kv_len, blocks.slots)
    seen = _lengthened(seen, padded)
    any_row = jnp.broadcast_to(seen.any(axis=(1, 2)), (request.batch, padded))
    first, end = _bounds(any_row)
    first_block = first // blocks.slots
    count = jnp.where(end > first, (end + blocks.slots - 1) // blocks.slots - first_block, 0)
    by_group = _by_group(seen, request)
    whole = jnp.broadcast_to(by_group.any(axis=2).all(axis=1), (request.batch, padded))
    table = None
    key, value = inputs.key, inputs.value
    key_scale = value_scale = None
    if isinstance(key, PagedArray):
        inside = (key.table >= 0) & (key.table < key.pages.shape[0])
        table = _lengthened(jnp.where(inside, key.table, -1).astype(jnp.int32), padded // key.page_size, fill=-1)
        whole = whole & jnp.repeat(table >= 0, key.page_size, axis=1)
    whole_first, whole_end = _first_run(whole.reshape(request.batch, -1, blocks.slots).all(axis=2))
    if request.kv_quantization is not None:
        key_scale = _lengthened(_scale(key), padded)
        value_scale = None if blocks.value_in_key else _lengthened(_scale(value), padded)
    return Operands(
        _grouped(inputs.query, request),
        blocks.key.turn(_plain(key)),
        None if blocks.value_in_key else blocks.value.turn(_plain(value)),
        key_scale,
        value_scale,
        by_group.astype(jnp.int32),
        first_block,
        count,
        whole_first,
        whole_end,
        None if table is None else _read(table, first_block, count, blocks.pages),
    )


def _read(
    table: Int32[Array, "B M"], first: Int32[Array, " B"], count: Int32[Array, " B"], pages: int
) -> Int32[Array, " B*M"]:
    """The pages in the order in which a row's steps read them: of its first block on, and of its last one again.

    A kernel that looked them up itself would spend more scalar instructions on a page than on starting its copy.
    """
    by_block = table.reshape(table.shape[0], -1, pages)
    row, step = jnp.arange(table.shape[0])[:, None], jnp.arange(by_block.shape[1])[None]
    return by_block[row, block_at(row, step, first, count)].reshape(-1)


def _bounds(seen: Bool[Array, "B S"]) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """The first slot of each row that is seen, and one behind the last; 0 and 0 where none is."""
    slots = jnp.arange(seen.shape[1], dtype=jnp.int32)[None]
    end = jnp.where(seen, slots + 1, 0).max(axis=1)
    first = jnp.where(seen, slots, seen.shape[1]).min(axis=1)
    return jnp.minimum(first, end), end


def _first_run(whole: Bool[Array, "B blocks"]) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """The first block of each row that is whole, and the next one that is not; the number of blocks where none is."""
    blocks = jnp.arange(whole.shape[1], dtype=jnp.int32)[None]
    first = jnp.where(whole, blocks, whole.shape[1]).min(axis=1)
    return first, jnp.where(whole | (blocks < first[:, None]), whole.shape[1], blocks).min(axis=1)


def _lengthened(array: jax.Array, length: int, fill: Any = 0) -> jax.Array:
    """Puts entries behind the last dimension, as far as the blocks go."""
    more = length - array.shape[-1]
    widths = [(0, 0)] * (array.ndim - 1) + [(0, more)]
    return jnp.pad(array, widths, constant_values=fill) if more else array


def _plain(keys: Any) -> jax.Array:
    """The values of rows or pages as they are held."""
    held = keys.pages if isinstance(keys, PagedArray) else keys
    array: jax.Array = held.values if isinstance(held, QuantizedArray) else held
    return array


def _scale(keys: Any) -> Float[Array, " B #K S"]:
    """The scales of every slot, slots last; of pages gathered, since they are few compared with the values."""
    if isinstance(keys, PagedArray):
        assert isinstance(keys.pages, QuantizedArray)
        gathered = PagedArray(keys.pages.scale, keys.table).gather()
        assert isinstance(gathered, jax.Array)
        scale = gathered
    else:
        scale = keys.scale
    return scale[..., 0].swapaxes(1, 2).astype(jnp.float32)


def _grouped(query: Float[Array, "B T N H"], request: Request) -> Float[Array, "B K R H"]:
    """Puts the rows that read one key/value head together."""
    batch, q_len, _, width = query.shape
    split = query.reshape(batch, q_len, request.kv_heads, request.groups, width)
    return split.transpose(0, 2, 1, 3, 4).reshape(batch, request.kv_heads, q_len * request.groups, width)


def _by_group(seen: Bool[Array, "#B #N #T S"], request: Request) -> Bool[Array, "#B #K #R S"]:
    """Lays a mask out as the rows; what holds for every head and query stays one row."""
    batch, heads, length, slots = seen.shape
    if heads == 1 and length == 1:
        return seen
    length = request.q_len
    whole = jnp.broadcast_to(seen, (batch, heads, length, slots))
    if heads == 1:
        rows = jnp.broadcast_to(whole[:, :, :, None], (batch, 1, length, request.groups, slots))
    else:
        rows = whole.reshape(batch, request.kv_heads, request.groups, length, slots).swapaxes(2, 3)
    return rows.reshape(batch, rows.shape[1], length * request.groups, slots)


def _by_query(out: Float[Array, "B K R D"], request: Request) -> Float[Array, "B T N D"]:
    batch, kv_heads, _, width = out.shape
    split = out.reshape(batch, kv_heads, request.q_len, request.groups, width)
    return split.transpose(0, 2, 1, 3, 4).reshape(batch, request.q_len, request.q_heads, width)


def _by_head(statistic: Float[Array, "B K R"], request: Request) -> Float[Array, "B N T"]:
    return _by_query(statistic[..., None], request)[..., 0].swapaxes(1, 2)
