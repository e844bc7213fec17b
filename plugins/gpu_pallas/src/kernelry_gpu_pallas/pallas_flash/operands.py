"""The operands of a call's kernels: how each array is cut into what one program of the grid may read."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, final

import jax
from jax.experimental import pallas as pl

from kernelry.plugin import BlockGrid, Inputs, Request
from kernelry_gpu_pallas.blocks import power_of_two
from kernelry_gpu_pallas.runs import Runs
from kernelry_gpu_pallas.tile_masks import Along, Operand, TileMask


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
    def grid(self) -> BlockGrid:
        """The blocks."""
        return BlockGrid(q_len=self.q_len, kv_len=self.kv_len, block_q=self.block_q, block_kv=self.block_kv)

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
        width = power_of_two(array.shape[3])
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
        width = power_of_two(array.shape[3])
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
        """The runs of the block of a program of the grid."""
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
