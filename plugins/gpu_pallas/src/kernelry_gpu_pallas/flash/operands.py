"""The operands of a call's kernels: how each array is cut into what one program of the grid may read."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernelry.plugin import Inputs, Request
from kernelry_gpu_pallas.flash.runs import Runs
from kernelry_gpu_pallas.tile_masks import Along, Operand, Read, TileMask


@final
class At(enum.Enum):
    """Which of an operand's blocks a program of the grid sees, in one dimension."""

    FIRST = "the only one"
    BLOCK = "its own block of queries, or of keys"
    HEAD = "its query head, or its key/value head where it takes a block of keys"
    KV_HEAD = "the key/value head of its query head"
    ROW = "its row of the batch"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What is known of a call's arrays while tracing.

    Args:
      block_q, block_kv: slots of a tile; powers of two, as Triton has no others.
      by_keys: whether a program of the grid takes a block of keys, and all query heads that read it, or a block of
        queries of one head.
    """

    block_q: int
    block_kv: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    groups: int
    by_keys: bool = False

    @classmethod
    def of(cls, request: Request, block_q: int, block_kv: int, *, by_keys: bool = False) -> Sizes:
        """Those of a request."""
        return cls(
            block_q,
            block_kv,
            request.q_len,
            request.kv_len,
            request.head_dim,
            request.value_dim,
            request.groups,
            by_keys,
        )

    @property
    def heads(self) -> int:
        """Query heads that one program of the grid goes through."""
        return self.groups if self.by_keys else 1


@final
class Operands:
    """Arrays by name, with the part of each that a program of the grid sees."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.names: list[str] = []
        self.arrays: list[jax.Array] = []
        self.specs: list[pl.BlockSpec] = []

    def add(self, name: str, array: jax.Array, block: tuple[int | None, ...], place: tuple[At, ...]) -> None:
        """Adds an array."""
        self.names.append(name)
        self.arrays.append(array)
        self.specs.append(self.spec(block, place))

    def spec(self, block: tuple[int | None, ...], place: tuple[At, ...]) -> pl.BlockSpec:
        """Blocks of an array, and which of them a program of the grid sees."""

        def index(block: Any, head: Any, row: Any) -> tuple[Any, ...]:
            places = {At.FIRST: 0, At.BLOCK: block, At.HEAD: head, At.ROW: row}
            return tuple(head // self.sizes.groups if at is At.KV_HEAD else places[at] for at in place)

        return pl.BlockSpec(block, index)

    def add_queries(self, name: str, array: jax.Array) -> None:
        """[B, T, N, H]: a block of one head, or all of a group's heads."""
        width = pl.next_power_of_2(array.shape[3])
        if self.sizes.by_keys:
            block = (None, array.shape[1], self.sizes.heads, width)
            self.add(name, array, block, (At.ROW, At.FIRST, At.HEAD, At.FIRST))
        else:
            self.add(name, array, (None, self.sizes.block_q, None, width), (At.ROW, At.BLOCK, At.HEAD, At.FIRST))

    def add_rows(self, name: str, array: jax.Array) -> None:
        """[B, N, T]: a block of one head, or all of a group's heads."""
        if self.sizes.by_keys:
            self.add(name, array, (None, self.sizes.heads, array.shape[2]), (At.ROW, At.HEAD, At.FIRST))
        else:
            self.add(name, array, (None, None, self.sizes.block_q), (At.ROW, At.HEAD, At.BLOCK))

    def add_keys(self, name: str, array: jax.Array) -> None:
        """[B, S, K, H]: a block, or all slots of the head that the query head reads."""
        width = pl.next_power_of_2(array.shape[3])
        if self.sizes.by_keys:
            self.add(name, array, (None, self.sizes.block_kv, None, width), (At.ROW, At.BLOCK, At.HEAD, At.FIRST))
        else:
            self.add(name, array, (None, array.shape[1], None, width), (At.ROW, At.FIRST, At.KV_HEAD, At.FIRST))

    def add_pairs(self, name: str, array: jax.Array) -> None:
        """[B or 1, N or 1, T or 1, S or 1]: all of a head, or of a group's heads."""
        row, head = _own(array, 0, At.ROW), _own(array, 1, At.HEAD)
        heads = 1 if head is At.FIRST else self.sizes.heads
        self.add(name, array, (None, heads, *array.shape[2:]), (row, head, At.FIRST, At.FIRST))

    def add_runs(self, runs: Runs) -> None:
        """The runs of the block that a program of the grid stands for."""
        for name, table in (("full", runs.full), ("partial", runs.partial)):
            if table.shape[2]:
                place = (_own(table, 0, At.ROW), At.BLOCK, At.FIRST, At.FIRST)
                self.add(name, table, (None, None, *table.shape[2:]), place)

    def add_mask(self, mask: TileMask) -> None:
        """What a mask carries."""
        for index, operand in enumerate(mask.operands):
            self._add_mask_operand(f"mask{index}", operand)

    def _add_mask_operand(self, name: str, operand: Operand) -> None:
        array, row = operand.array, _own(operand.array, 0, At.ROW)
        if operand.along is Along.PAIRS:
            self.add_pairs(name, array)
        elif operand.along is Along.ROW:
            self.add(name, array, (1,), (row,))
        else:
            self.add(name, array, (None, array.shape[1]), (row, At.FIRST))

    def add_inputs(self, inputs: Inputs, runs: Runs, mask: TileMask) -> None:
        """What every kernel reads."""
        self.add_queries("query", inputs.query)
        self.add_keys("key", inputs.key)
        self.add_keys("value", inputs.value)
        if inputs.bias is not None:
            self.add_pairs("bias", inputs.bias)
        self.add_runs(runs)
        self.add_mask(mask)


def _own(array: jax.Array, axis: int, place: At) -> At:
    """The place of what belongs to each; what all share has one block."""
    return place if array.shape[axis] > 1 else At.FIRST


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Consecutive slots of a tile on one side.

    Args:
      start: the first one.
      block: how many.
      length: those from here on do not exist.
    """

    start: Any
    block: int
    length: int

    @property
    def numbers(self) -> jax.Array:
        """int32 [block]."""
        found: jax.Array = self.start + jnp.arange(self.block, dtype=jnp.int32)
        return found

    @property
    def window(self) -> Any:
        """The index of these slots in an array."""
        return pl.ds(self.start, self.block)

    @property
    def inside(self) -> jax.Array | None:
        """Which of them exist, [block]; None where every tile is whole."""
        return None if self.length % self.block == 0 else self.numbers < self.length


def load(ref: Any, slots: Slots | None = None, width: int | None = None, *, other: float = 0.0) -> Any:
    """Reads a tile, with `other` where the array has nothing: slots beyond its end, or columns beyond its width."""
    inside = None if slots is None else slots.inside
    if width is not None and width < ref.shape[-1]:
        columns = (jnp.arange(ref.shape[-1], dtype=jnp.int32) < width)[None, :]
        inside = columns if inside is None else inside[:, None] & columns
    elif width is not None and inside is not None:
        inside = inside[:, None]
    if inside is None:
        return ref[...]
    return plgpu.load(ref, mask=jnp.broadcast_to(inside, ref.shape), other=other)


def store(ref: Any, tile: jax.Array, slots: Slots, width: int | None = None) -> None:
    """Writes what of a tile the array has a place for."""
    inside = slots.inside
    if width is not None:
        inside = None if inside is None else inside[:, None]
        if width < tile.shape[1]:
            columns = (jnp.arange(tile.shape[1], dtype=jnp.int32) < width)[None, :]
            inside = columns if inside is None else inside & columns
    tile = tile.astype(ref.dtype)
    if inside is None:
        ref[...] = tile
    else:
        plgpu.store(ref, tile, mask=jnp.broadcast_to(inside, tile.shape))


def pairs(ref: Any, head: Any, query: Slots, kv: Slots, *, other: Any) -> Any:
    """A tile's part of an operand of pairs, [block_q or 1, block_kv or 1]."""
    _, q_len, kv_len = ref.shape
    rows = query if q_len > 1 else Slots(0, 1, 1)
    columns = kv if kv_len > 1 else Slots(0, 1, 1)
    part = ref.at[head if ref.shape[0] > 1 else np.int32(0), rows.window, columns.window]
    inside = [None if each.inside is None else each.inside for each in (rows, columns)]
    if inside == [None, None]:
        return part[...]
    down = jnp.ones((rows.block, 1), bool) if inside[0] is None else inside[0][:, None]
    across = jnp.ones((1, columns.block), bool) if inside[1] is None else inside[1][None, :]
    return plgpu.load(part, mask=down & across, other=other)


def reader(mask: TileMask, refs: dict[str, Any], head: Any, query: Slots, kv: Slots) -> Read:
    """Reads a tile's part of what a mask carries, each operand once."""
    held: dict[int, Any] = {}

    def read(index: int) -> Any:
        if index not in held:
            operand, ref = mask.operands[index], refs[f"mask{index}"]
            if operand.along is Along.ROW:
                held[index] = ref[0]
            elif operand.along is Along.PAIRS:
                held[index] = pairs(ref, head, query, kv, other=False)
            else:
                slots = query if operand.along is Along.QUERY else kv
                held[index] = load(ref.at[slots.window], slots, other=0)
        return held[index]

    return read


def over_runs(refs: dict[str, Any], visit: Callable[[bool, Any, Any], Any], carried: Any) -> Any:
    """Visits the blocks of every run of this program's block: those that need no mask first.

    Args:
      refs: the tables of runs, where there are any.
      visit: makes the next `carried` of (masked, block, carried).
      carried: what is carried along.
    """
    for name, masked in (("full", False), ("partial", True)):
        if name in refs:
            carried = _over_table(refs[name], visit, masked, carried)
    return carried


def _over_table(table: Any, visit: Callable[[bool, Any, Any], Any], masked: bool, carried: Any) -> Any:
    def over_run(run: Any, carried: Any) -> Any:
        return jax.lax.fori_loop(table[run, 0], table[run, 1], lambda at, now: visit(masked, at, now), carried)

    count = table.shape[0]
    return over_run(0, carried) if count == 1 else jax.lax.fori_loop(0, count, over_run, carried)


def visible_in(mask: TileMask, refs: dict[str, Any], head: Any, query: Slots, kv: Slots) -> jax.Array | None:
    """What of a tile is visible, [block_q, block_kv]; None where all of it is."""
    visible = mask.visible(query.numbers, kv.numbers, reader(mask, refs, head, query, kv))
    if kv.inside is not None:
        inside = kv.inside[None, :]
        visible = inside if visible is None else visible & inside
    return None if visible is None else jnp.broadcast_to(visible, (query.block, kv.block))
