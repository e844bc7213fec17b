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
from kernelry_gpu_pallas.pallas_decode.columns import Columns, end_of
from kernelry_gpu_pallas.slots import Slots, load
from kernelry_gpu_pallas.tile_masks import Along, Read, TileMask


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """The rows that read one key/value head: T queries of G heads each, those of a query together.

    Args:
      q_len, groups: T and G. q_heads: N.
      padded: rows of a tile, a power of two.
      first: of a tile; 0 of the only one.
    """

    q_len: int
    groups: int
    q_heads: int
    padded: int
    first: Any = 0

    @classmethod
    def of(cls, request: Request, block: int | None = None) -> Rows:
        """Those of a request, in tiles of so many; None: in one."""
        padded = block or max(SMALLEST_BLOCK, power_of_two(request.q_len * request.groups))
        return cls(request.q_len, request.groups, request.q_heads, padded)

    @property
    def count(self) -> int:
        """T·G."""
        return self.q_len * self.groups

    @property
    def tiles(self) -> int:
        """How many tiles hold them."""
        return -(-self.count // self.padded)

    def tile(self, number: Any) -> Rows:
        """Those of one tile."""
        return self if self.tiles == 1 else dataclasses.replace(self, first=number * self.padded)

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
        numbers = jnp.arange(self.padded, dtype=jnp.int32)
        return numbers if self.tiles == 1 else self.first + numbers

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
    """Keys or values of a block.

    Args:
      columns: what is held [block_kv, H], in one array or in several that follow one another.
      scale: [block_kv]. absent: which slots have no page.
    """

    columns: tuple[jax.Array, ...]
    scale: jax.Array | None
    absent: jax.Array | None

    def of_dtype(self, dtype: Any) -> tuple[jax.Array, ...]:
        """What is held, as numbers of a product; not multiplied by the scale."""
        return tuple(columns.astype(dtype) for columns in self.columns)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """Keys or values as they are held.

    Args:
      values: [B, S, K, H], or pages [P, page_size, K, H]. scale: [B, S, K or 1], or of pages.
      table: int32 [B, M], −1 where there is no page.
      page_size: slots of a page; None where they are in rows.
      columns: those that are read apart.
    """

    values: jax.Array
    scale: jax.Array | None
    table: jax.Array | None
    page_size: int | None
    columns: tuple[Columns, ...]

    @classmethod
    def of(cls, held: Any, columns: tuple[Columns, ...] = ()) -> Cache:
        """Takes keys or values apart; without `columns` they are read in one piece."""
        table, page_size, columns = None, None, columns or (Columns(0, held.shape[3]),)
        if isinstance(held, PagedArray):
            table, page_size, held = _inside(held), held.page_size, held.pages
        if isinstance(held, QuantizedArray):
            return cls(held.values, held.scale.reshape(held.scale.shape[:-1]), table, page_size, columns)
        return cls(held, None, table, page_size, columns)

    @property
    def operands(self) -> Iterator[tuple[jax.Array, pl.BlockSpec]]:
        """Arrays and what of each a program of the grid (split, head, row) sees."""
        rows, slots, _, _ = self.values.shape
        block = (None if self.table is None else rows, slots, None)
        yield self.values, pl.BlockSpec((*block, end_of(self.columns)), self._place(4, by_head=True))
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

    def read(self, refs: Iterator[Any], slots: Slots, seen: jax.Array | None = None) -> Tile:
        """Reads a block; of slots that are not seen, [block_kv] and False beyond the end, 0 without fetching them."""
        values = next(refs)
        scale = None if self.scale is None else next(refs)
        if self.table is None:
            found = tuple(
                load(values.at[slots.window, pl.ds(each.start, each.padded)], slots, each.width, seen=seen)
                for each in self.columns
            )
            return Tile(found, None if scale is None else _floats(load(scale.at[slots.window], slots, seen=seen)), None)
        table = next(refs)
        size = np.int32(self.page_size or 1)
        wanted = slots.numbers < slots.length if seen is None else seen
        page = plgpu.load(table.at[jax.lax.div(slots.numbers, size)], mask=wanted, other=-1)
        there = wanted & (page >= 0)
        page, place = jnp.maximum(page, 0), jax.lax.rem(slots.numbers, size)
        found = tuple(self._of_pages(values, page, place, there, each) for each in self.columns)
        factor = None if scale is None else _floats(plgpu.load(scale.at[page, place], mask=there, other=0))
        return Tile(found, factor, wanted & ~there)

    def _of_pages(self, values: Any, page: jax.Array, place: jax.Array, there: jax.Array, columns: Columns) -> Any:
        numbers = jnp.arange(columns.padded, dtype=jnp.int32)
        mask = there[:, None] & (numbers < columns.width)[None, :]
        if columns.start:
            numbers = columns.start + numbers
        return plgpu.load(values.at[page[:, None], place[:, None], numbers[None, :]], mask=mask, other=0)


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
