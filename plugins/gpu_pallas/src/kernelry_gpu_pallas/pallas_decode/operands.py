"""The operands of decode: the queries of a key/value head, keys and values as they are held, what a mask carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from kernelry.plugin import PagedArray, QuantizedArray, Request
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two
from kernelry_gpu_pallas.slots import Slots, load
from kernelry_gpu_pallas.tile_masks import Along, Read, TileMask


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """The rows that read one key/value head: T queries of G heads each, those of a query together.

    Args:
      q_len, groups: T and G. q_heads: N.
    """

    q_len: int
    groups: int
    q_heads: int

    @classmethod
    def of(cls, request: Request) -> Rows:
        """Those of a request."""
        return cls(request.q_len, request.groups, request.q_heads)

    @property
    def count(self) -> int:
        """T·G."""
        return self.q_len * self.groups

    @property
    def padded(self) -> int:
        """Rows of a tile: a power of two."""
        return max(SMALLEST_BLOCK, power_of_two(self.count))

    @property
    def queries(self) -> Int32[Array, " rows"]:
        """The query slot of each row of a tile; rows that do not exist repeat the last one."""
        return jnp.minimum(jax.lax.div(self._numbers, np.int32(self.groups)), np.int32(self.q_len - 1))

    def heads(self, head: Any) -> Int32[Array, " rows"]:
        """The query head of each row of a key/value head's tile."""
        found: jax.Array = head * self.groups + jax.lax.rem(self._numbers, np.int32(self.groups))
        return found

    @property
    def _numbers(self) -> jax.Array:
        return jnp.arange(self.padded, dtype=jnp.int32)

    def stacked(self, query: Float[Array, "B T N H"]) -> Float[Array, "B K R H"]:
        """The rows of each key/value head together."""
        batch, q_len, heads, width = query.shape
        apart = query.reshape(batch, q_len, heads // self.groups, self.groups, width)
        return apart.swapaxes(1, 2).reshape(batch, heads // self.groups, self.count, width)

    def apart(self, rows: Float[Array, "B K R *D"]) -> Float[Array, "B T N *D"]:
        """The inverse of `stacked`."""
        batch, kv_heads, _, *rest = rows.shape
        split = rows.reshape(batch, kv_heads, self.q_len, self.groups, *rest)
        return split.swapaxes(1, 2).reshape(batch, self.q_len, self.q_heads, *rest)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Keys or values of a block: what is held [block_kv, H], its scale [block_kv], and which slots have no page."""

    held: jax.Array
    scale: jax.Array | None
    absent: jax.Array | None


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """Keys or values as they are held.

    Args:
      values: [B, S, K, H], or pages [P, page_size, K, H]. scale: [B, S, K or 1], or of pages.
      table: int32 [B, M], −1 where there is no page.
      page_size: slots of a page; None where they are in rows.
    """

    values: jax.Array
    scale: jax.Array | None
    table: jax.Array | None
    page_size: int | None

    @classmethod
    def of(cls, held: Any) -> Cache:
        """Takes keys or values apart."""
        table, page_size = None, None
        if isinstance(held, PagedArray):
            table, page_size, held = _inside(held), held.page_size, held.pages
        if isinstance(held, QuantizedArray):
            return cls(held.values, held.scale.reshape(held.scale.shape[:-1]), table, page_size)
        return cls(held, None, table, page_size)

    @property
    def operands(self) -> Iterator[tuple[jax.Array, pl.BlockSpec]]:
        """Arrays and what of each a program of the grid (split, head, row) sees."""
        rows, slots, _, width = self.values.shape
        block = (None if self.table is None else rows, slots, None)
        yield self.values, pl.BlockSpec((*block, power_of_two(width)), self._place(4, by_head=True))
        if self.scale is not None:
            yield self.scale, pl.BlockSpec(block, self._place(3, by_head=self.scale.shape[2] > 1))
        if self.table is not None:
            yield self.table, pl.BlockSpec((None, self.table.shape[1]), of_row(2, shared=False))

    def _place(self, rank: int, *, by_head: bool) -> Any:
        def place(split: Any, head: Any, row: Any) -> tuple[Any, ...]:
            del split
            first = row if self.table is None else 0
            return (first, 0, head if by_head else 0, 0)[:rank]

        return place

    def read(self, refs: Iterator[Any], slots: Slots) -> Tile:
        """Reads a block."""
        values = next(refs)
        scale = None if self.scale is None else next(refs)
        width = self.values.shape[3]
        if self.table is None:
            held = load(values.at[slots.window, :], slots, width)
            return Tile(held, None if scale is None else _floats(load(scale.at[slots.window], slots)), None)
        table = next(refs)
        size = np.int32(self.page_size or 1)
        exists = slots.numbers < slots.length
        page = plgpu.load(table.at[jax.lax.div(slots.numbers, size)], mask=exists, other=-1)
        there = exists & (page >= 0)
        page, place = jnp.maximum(page, 0), jax.lax.rem(slots.numbers, size)
        columns = jnp.arange(values.shape[-1], dtype=jnp.int32)
        mask = there[:, None] & (columns < width)[None, :]
        held = plgpu.load(values.at[page[:, None], place[:, None], columns[None, :]], mask=mask, other=0)
        factor = None if scale is None else _floats(plgpu.load(scale.at[page, place], mask=there, other=0))
        return Tile(held, factor, exists & ~there)


def _floats(scale: jax.Array) -> jax.Array:
    return scale.astype(jnp.float32)


def _inside(held: PagedArray) -> jax.Array:
    """The table, −1 where it names no page."""
    known = (held.table >= 0) & (held.table < held.pages.shape[0])
    return jnp.where(known, held.table, -1).astype(jnp.int32)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MaskArrays:
    """What a mask carries, and how the rows of a tile read it."""

    mask: TileMask
    rows: Rows

    @property
    def operands(self) -> Iterator[tuple[jax.Array, pl.BlockSpec]]:
        """Arrays and what of each a program of the grid (split, head, row) sees."""
        for operand in self.mask.operands:
            shape, batch = operand.array.shape, operand.array.shape[0]
            block = (1,) if operand.along is Along.ROW else (None, *shape[1:])
            yield operand.array, pl.BlockSpec(block, of_row(len(shape), shared=batch == 1))

    def visible(self, refs: list[Any], head: Any, slots: Slots) -> jax.Array | None:
        """What the rows of a tile see of a block, [rows or 1, block_kv or 1]; None where all of it."""
        return self.mask.visible(self.rows.queries, slots.numbers, self._reader(refs, head, slots))

    def _reader(self, refs: list[Any], head: Any, slots: Slots) -> Read:
        held: dict[int, Any] = {}

        def read(index: int) -> Any:
            if index not in held:
                held[index] = self._read(index, refs[index], head, slots)
            return held[index]

        return read

    def _read(self, index: int, ref: Any, head: Any, slots: Slots) -> Any:
        operand = self.mask.operands[index]
        if operand.along is Along.ROW:
            return ref[0]
        if operand.along is Along.QUERY:
            return ref[self.rows.queries]
        if operand.along is Along.KV:
            return load(ref.at[slots.window], slots)
        _, heads, q_len, kv_len = operand.array.shape
        zeros = jnp.zeros_like(self.rows.queries)
        by_head = self.rows.heads(head) if heads > 1 else zeros
        by_query = self.rows.queries if q_len > 1 else zeros
        by_key = jnp.minimum(slots.numbers, kv_len - 1)
        return ref[by_head[:, None], by_query[:, None], by_key[None, :]]


def of_row(rank: int, *, shared: bool) -> Any:
    """The place of a block of the program's row of the batch, or of what all rows share."""

    def place(split: Any, head: Any, row: Any) -> tuple[Any, ...]:
        del split, head
        return (0 if shared else row, *(0,) * (rank - 1))

    return place
