"""The work of each device of a ring, in blocks of its mask, and how the order of tokens shares it out."""

from __future__ import annotations

import dataclasses
import functools
from typing import final

import numpy as np

from kernelry.kernel.common import largest_divisor
from kernelry.masks.blocks import Grid, decided_blocks
from kernelry.masks.form import MaskForm
from kernelry.masks.positions import ORDERS
from kernelry.masks.shard_pairs import ShardGrid, lockstep, lockstep_efficiency
from kernelry.request.request import Request
from kernelry.resolution.shards import Shards, grid_of


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Balance:
    """How an order of the tokens shares out the work of a ring.

    Args:
      order: `contiguous`, `dual_chunk` or `striped`.
      least, most: blocks of the devices that have least and most to do.
      waited: blocks that all wait for: of each step those of the slowest device.
      efficiency: the blocks of the mean device by `waited`.
    """

    order: str
    least: int
    most: int
    waited: int
    efficiency: float

    def __str__(self) -> str:
        blocks = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{self.order} {blocks}, waits for {self.waited} ({self.efficiency:.2f})"


_ORDERS = ("contiguous", *ORDERS)


def balances(request: Request, shards: Shards) -> tuple[tuple[Balance, ...], int]:
    """The work of each order of tokens, in blocks, and the slots of a block; empty where there is no choice."""
    grid = grid_of(request, shards.sharding)
    is_ring = shards.table is not None and grid.q_shards > 1
    if not is_ring or request.q_len != request.kv_len:
        return (), 0
    whole = [order for order in _ORDERS if order != "dual_chunk" or request.q_len % (2 * grid.q_shards) == 0]
    counts = {order: blocks_by_pair(request.mask, dataclasses.replace(grid, order=order)) for order in whole}
    found = [
        Balance(order, int(by.sum(1).min()), int(by.sum(1).max()), lockstep(by), lockstep_efficiency(by))
        for order, (by, _) in counts.items()
    ]
    return tuple(found), counts["contiguous"][1][1]


LEAST_BLOCKS = 512
"""Of a side of the mask where orders are compared, and where tokens are striped; more would take seconds."""

MOST_BLOCKS = 2048
"""The same where compute is counted: at a million tokens blocks of 512 slots, as kernels have them."""


@functools.lru_cache(maxsize=64)
def blocks_by_pair(
    form: MaskForm, grid: ShardGrid, most_blocks: int = LEAST_BLOCKS
) -> tuple[np.ndarray, tuple[int, int]]:
    """Counts the blocks of each pair of shards that may hold something, and says how many slots a block has.

    Blocks have 128 slots, or more where these would be too many, and divide the shards.
    """
    rows, columns = grid.shard_lengths
    shape = grid.q_shards, grid.kv_shards
    if 0 in (rows, columns):
        return np.zeros(shape, np.int64), (0, 0)
    most = max(128, max(grid.q_len, grid.kv_len) // max(most_blocks, 4 * max(shape)))
    block = _block_of(rows, most), _block_of(columns, most)
    kept = ~decided_blocks(form, Grid((grid.q_len, grid.kv_len), block, tokens=grid.tokens)).empty
    counts = kept.reshape(shape[0], rows // block[0], shape[1], columns // block[1]).sum(axis=(1, 3))
    return counts.astype(np.int64), block


def _block_of(length: int, most: int) -> int:
    """A divisor of a length that is near `most`; the length where there is none."""
    block = largest_divisor(length, most)
    return block if 8 * block >= min(most, length) else length
