"""Where the blocks of keys and values come from: arrays, quantised arrays, pages; values from the keys, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernelry.plugin import Inputs, Mode, PagedArray, QuantizedArray, Request, ValueInKey
from kernelry_dot_product.blockwise.grid import Grid

_MOST_READS = 4
"""Blocks of queries up to which keys are read in place, and not laid out first: one copy a visit, not a pass
over all slots before anything is attended to."""


class Reader(Protocol):
    """Reads blocks: `of_step` lays out what a step reads, once; `read` takes a block of it."""

    def of_step(self, step: Any) -> Any:
        """Returns what `read` needs in this step."""
        ...

    def read(self, own: Any, step: Any, column: Any) -> tuple[jax.Array, jax.Array]:
        """Returns a block of keys [b, k, block_kv, H] and one of values."""
        ...


def reader_of(inputs: Inputs, request: Request, grid: Grid) -> Reader:
    """Chooses how to read: what is visited once or twice is read in place."""
    in_place = request.mode is not Mode.TRAIN and not request.gradients and grid.rows <= _MOST_READS
    if not in_place:
        inputs = plain(inputs, request)
        return _Split(inputs.key, inputs.value, grid)
    if request.page_size is not None:
        return _InPages(inputs.key, inputs.value, _table(inputs.key, grid), request, grid)
    return _InPlace(inputs.key, inputs.value, request, grid)


def plain(inputs: Inputs, request: Request) -> Inputs:
    """Lays keys and values out as arrays [B, S, K, H], whatever they are held in."""

    def of(keys: Any) -> jax.Array:
        gathered = keys.gather() if isinstance(keys, PagedArray) else keys
        array: jax.Array = gathered.dequantize(request.dtype) if isinstance(gathered, QuantizedArray) else gathered
        return array

    if request.has_plain_kv:
        return inputs
    key = of(inputs.key)
    value = key[..., : inputs.value.width] if isinstance(inputs.value, ValueInKey) else of(inputs.value)
    return dataclasses.replace(inputs, key=key, value=value)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Split(Reader):
    """Blocks laid out at the beginning of a step, [columns, b, k, block_kv, H]."""

    key: jax.Array
    value: jax.Array
    grid: Grid

    def of_step(self, step: Any) -> Any:
        return self.grid.split_keys(self.key, step), self.grid.split_keys(self.value, step)

    def read(self, own: Any, step: Any, column: Any) -> tuple[jax.Array, jax.Array]:
        key, value = (lax.dynamic_index_in_dim(blocks, column, keepdims=False) for blocks in own)
        return key, value


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _InPlace(Reader):
    """Arrays [B, S, K, H], quantised or not. The last block is moved back where it would go beyond the end."""

    key: Any
    value: Any
    request: Request
    grid: Grid

    def of_step(self, step: Any) -> Any:
        return None

    def read(self, own: Any, step: Any, column: Any) -> tuple[jax.Array, jax.Array]:
        grid = self.grid
        size = min(grid.block_kv, grid.kv_len)
        start = jnp.minimum(column * grid.block_kv, grid.kv_len - size)
        shift = column * grid.block_kv - start  # of the last block; its slots are put back in order
        rows = grid.batch_start(step), grid.step_batch

        def part(array: jax.Array) -> jax.Array:
            found = lax.dynamic_slice_in_dim(array, *rows, axis=0)
            found = _heads(lax.dynamic_slice_in_dim(found, start, size, axis=1), step, grid)
            return jnp.roll(found, -shift, axis=1) if grid.kv_padding else found

        return _pair(self.key, self.value, part, self.request)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _InPages(Reader):
    """Pages [P, page_size, K, H], quantised or not; `table` [B, columns · pages of a block] goes beyond the end."""

    key: Any
    value: Any
    table: jax.Array
    request: Request
    grid: Grid

    def of_step(self, step: Any) -> Any:
        return None

    def read(self, own: Any, step: Any, column: Any) -> tuple[jax.Array, jax.Array]:
        grid = self.grid
        pages = grid.block_kv // self.key.page_size
        places = lax.dynamic_slice(
            self.table, (grid.batch_start(step), column * pages), (grid.step_batch, pages)
        )  # [b, pages]

        def part(array: jax.Array) -> jax.Array:
            found = array.at[places].get(mode="fill", fill_value=_absent(array))
            found = found.reshape(grid.step_batch, grid.block_kv, *found.shape[3:])
            return _heads(found, step, grid)

        values = self.value if isinstance(self.value, ValueInKey) else self.value.pages
        return _pair(self.key.pages, values, part, self.request)


def _absent(array: jax.Array) -> float:
    """NaN for a page that is not there; of quantised values the scale's NaN is enough."""
    return float("nan") if jnp.issubdtype(array.dtype, jnp.floating) else 0


def _table(keys: PagedArray, grid: Grid) -> jax.Array:
    """The table as far as the grid goes; where there is no page, a page that no array has."""
    more = grid.columns * (grid.block_kv // keys.page_size) - keys.table.shape[1]
    nowhere = keys.pages.shape[0]
    table = jnp.where(keys.table < 0, nowhere, keys.table)
    return jnp.pad(table, ((0, 0), (0, more)), constant_values=nowhere) if more else table


def _heads(block: jax.Array, step: Any, grid: Grid) -> jax.Array:
    """The heads of a step of [b, block_kv, K or 1, H]."""
    if block.shape[2] in (1, grid.step_heads):
        return block
    return lax.dynamic_slice_in_dim(block, grid.head_start(step), grid.step_heads, axis=2)


def _pair(
    keys: Any, values: Any, part: Callable[[jax.Array], jax.Array], request: Request
) -> tuple[Float[Array, "b k S H"], Float[Array, "b k S D"]]:
    """A block of keys and one of values, which may be the keys' first columns: then it is read once."""
    key = _block(jax.tree.map(part, keys), request)
    if isinstance(values, ValueInKey):
        return key, key[..., : values.width]
    return key, _block(jax.tree.map(part, values), request)


def _block(stored: Any, request: Request) -> Float[Array, "b k S H"]:
    """[b, S, k, H] → [b, k, S, H], dequantised."""
    array = stored.dequantize(request.dtype) if isinstance(stored, QuantizedArray) else stored
    turned: jax.Array = array.swapaxes(1, 2)
    return turned
