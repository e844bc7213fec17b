"""How long the splash kernels take with which blocks, by the TPU compiler's own schedule. Nothing here was measured.

`predictions.json` holds what libtpu schedules for each chip, dtype, head dim and size of blocks, in cycles of a core;
`tests/aot/splash_tilings.py` writes it. A pass of one head takes

    visited · cycles + steps · step + rows · row

where `visited` are the blocks of logits that the mask leaves, `steps` those of the grid, and `rows` the blocks that
stay while the others come and go.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, final

import numpy as np

from kernelry.plugin import AtomKind, MaskForm, Request, largest_divisor
from kernelry_tpu_splash.lanes import LANES

Blocks = tuple[int, int, int]
"""Queries and keys of a block, and how many of its keys are multiplied at once."""

_HEADS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Dims of queries and values for which the compiler was asked. Others count as the next larger ones in the table."""

_KEYS_STAY = ("dkv", "fused")
"""The passes that meet one block of queries after another."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """One way to cut a pass into blocks.

    Args:
      blocks: that divide the lengths of the call.
      cycles: of one head, on one core; None where no schedule is known.
    """

    blocks: Blocks
    cycles: float | None = None


def predictions(kernel: str, part: str, request: Request, *, walks: bool = False) -> tuple[Prediction, ...]:
    """The ways to cut a pass that fit the vector memory, the fastest first; nothing where no schedule is known.

    Args:
      kernel: its name.
      part: `forward`, `dkv`, `dq`, or `fused` for both in one.
      request: whose target, dtype, dims, lengths and mask are looked at.
      walks: whether the grid has a step for each block that the mask leaves, and for no other.
    """
    found: dict[Blocks, float] = {}
    for block_q, block_kv, compute, *cycles in _rows(kernel, part, request):
        blocks = fitting((block_q, block_kv, compute), (request.q_len, request.kv_len))
        share = blocks[0] / block_q, blocks[1] / block_kv
        scaled = cycles[0] * share[0] * share[1], cycles[1], cycles[2] * share[part in _KEYS_STAY]
        taken = _grid(part, request, blocks, walks).cycles(*scaled)
        found[blocks] = min(taken, found.get(blocks, taken))
    return tuple(Prediction(blocks, found[blocks]) for blocks in sorted(found, key=found.__getitem__))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Grid:
    visited: int
    steps: int
    rows: int

    def cycles(self, visited: float, step: float, row: float) -> float:
        return self.visited * visited + self.steps * step + self.rows * row


def _grid(part: str, request: Request, blocks: Blocks, walks: bool) -> _Grid:
    """The grid of one head: rows of blocks, or columns where keys stay."""
    rows, columns = request.q_len // blocks[0], request.kv_len // blocks[1]
    seen = visited(request.mask, (request.q_len, request.kv_len), *blocks[:2])
    every = {"dkv": columns * seen.in_a_column, "fused": rows * columns}.get(part, rows * seen.in_a_row)
    return _Grid(seen.blocks, seen.blocks if walks else every, columns if part in _KEYS_STAY else rows)


def cycles_to_move(size: float, request: Request) -> float:
    """The cycles in which a core's share of the memory delivers so many bytes; of a known target."""
    rate: float = _table()["bytes_per_cycle"][request.target.kind]
    return size / rate


def source() -> str:
    """Who predicted, as text."""
    return f"predicted by {_table()['compiler']}, not measured"


@functools.lru_cache(maxsize=1024)
def fitting(blocks: Blocks, lengths: tuple[int, int]) -> Blocks:
    """The blocks that divide T and S and are nearest to those wanted."""
    block_q, block_kv = (largest_divisor(*pair, LANES) for pair in zip(lengths, blocks[:2], strict=True))
    compute = blocks[2]
    units = block_kv // LANES
    parts = [LANES * part for part in range(1, units + 1) if units % part == 0]
    return block_q, block_kv, min(parts, key=lambda part: (max(part, compute) / min(part, compute), -part))


class Visited(NamedTuple):
    """The blocks of logits that a mask leaves: all, and the most in a row and in a column of blocks."""

    blocks: int
    in_a_row: int
    in_a_column: int


@functools.lru_cache(maxsize=256)
def visited(mask: MaskForm, lengths: tuple[int, int], block_q: int, block_kv: int) -> Visited:
    """Counts blocks that bands and chunks leave; what else the mask hides is not known here.

    Args:
      mask: its form.
      lengths: T and S.
      block_q, block_kv: divisors of these.
    """
    start = np.arange(0, lengths[0], block_q)
    low, high = np.zeros_like(start), np.full_like(start, lengths[1] - 1)
    for atom in mask.atoms:
        if atom.query.start is None or atom.kv.start is None:
            continue
        first, offset = start + atom.query.start, atom.kv.start
        last = first + (block_q - 1)
        if atom.is_band:
            left, right = atom.params
            low = low if left is None else np.maximum(low, first - left - offset)
            high = high if right is None else np.minimum(high, last + right - offset)
        elif atom.kind is AtomKind.CHUNKED:
            low, high = (
                np.maximum(low, first // atom.params[0] * atom.params[0] - offset),
                np.minimum(high, last - offset),
            )
        elif atom.kind is AtomKind.BLOCK_CAUSAL:
            high = np.minimum(high, (last // atom.params[0] + 1) * atom.params[0] - 1 - offset)
    some = low <= high
    begin, end = low[some] // block_kv, high[some] // block_kv + 1
    columns = lengths[1] // block_kv + 1
    in_columns = np.cumsum(np.bincount(begin, minlength=columns) - np.bincount(end, minlength=columns))
    return Visited(int((end - begin).sum()), int((end - begin).max(initial=0)), int(in_columns.max()))


def _rows(kernel: str, part: str, request: Request) -> Sequence[Sequence[int]]:
    held: Mapping[str, Sequence[Sequence[int]]] = _table()["kernels"].get(kernel, {}).get(part, {})
    fitting_dims = (dims for dims in _HEADS if request.head_dim <= dims[0] and request.value_dim <= dims[1])
    keys = (f"{request.target.kind} {request.dtype} {dims[0]}/{dims[1]}" for dims in fitting_dims)
    return next((held[key] for key in keys if key in held), ())


@functools.cache
def _table() -> Mapping[str, Any]:
    text = resources.files("kernelry_tpu_splash").joinpath("predictions.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return table
