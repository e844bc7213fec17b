"""How much shared memory `pallas_decode` takes, so that a tiling that cannot fit is refused before it is compiled.

The formulas follow what the Triton compiler of jax 0.10 asks for. Queries and probabilities stay; keys and values come
and go, once per stage of the pipeline of loads but the last; a pipeline through a table of pages is one stage shorter.
From Hopper on, 64 rows or more go through the multipliers of a warp group, which read keys and values out of shared
memory: they are held once more, where they are quantised also as they are multiplied.

Keys that hold the values are held once. Where they are quantised, they are held as they are multiplied, too, and on
Blackwell the pipeline of a warp group's products is two blocks deeper.
"""

from __future__ import annotations

from typing import final

import jax.numpy as jnp

from kernelry.plugin import Quantization, Request, Tiling
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two
from kernelry_gpu_pallas.generations import BLACKWELL, HOPPER, multiplies_as
from kernelry_gpu_pallas.pallas_decode.columns import columns_of_keys, has_value_in_key
from kernelry_gpu_pallas.shared_memory import Need
from kernelry_gpu_pallas.tile_masks import dense_masks

_WARP_GROUP_ROWS = 64

_FEW_BYTES = 2048
"""Of whatever is small."""

_SLOT_BYTES = 32
"""Of ids, scales and numbers of pages, for each slot of a block, in all stages."""

_PAIR_COPIES = 4
"""Of a dense mask's booleans: Blackwell holds them as int32."""


def need(request: Request, tiling: Tiling) -> Need:
    """What a program asks for."""
    return _Sizes(request, tiling).need


@final
class _Sizes:
    """Bytes of what one program of the grid holds."""

    def __init__(self, request: Request, tiling: Tiling) -> None:
        self.block, self.stages = tiling["block_kv"], tiling["num_stages"]
        self.in_key = has_value_in_key(request)
        self.generation = multiplies_as(request)
        all_rows = max(SMALLEST_BLOCK, power_of_two(request.q_len * request.groups))
        self.rows = tiling["block_rows"] if self.in_key else all_rows
        of_keys, self.of_values = [each.padded for each in columns_of_keys(request)], power_of_two(request.value_dim)
        self.of_queries, self.widest = sum(of_keys), max(*of_keys, self.of_values)
        self.of_slot = self.of_queries + (0 if self.in_key else self.of_values)
        self.itemsize = jnp.dtype(request.dtype).itemsize
        how = request.kv_quantization
        self.held_itemsize = self.itemsize if how is None else jnp.dtype(Quantization.parse(how).dtype).itemsize
        self.parts = 2 if request.dtype == "float32" else 1  # multiplied in three parts, held apart
        self.in_pages = request.page_size is not None
        self.in_warp_groups = self.rows >= _WARP_GROUP_ROWS and self.generation >= HOPPER
        self.pairs = self.rows * self.block * dense_masks(request.mask)

    @property
    def need(self) -> Need:
        """At least and at most; `most` is larger where a warp group may, or may not, multiply."""
        queries = self.rows * self.of_queries * self.itemsize
        moved = self.block * self.of_slot * self.held_itemsize
        multiplied = self.block * self.of_slot * self.itemsize
        # What is certain of float32 is little: Blackwell keeps the queries elsewhere.
        least = (queries if self.parts == 1 else 0) + max(0, self.stages - 1 - self.in_pages) * moved
        stay = self.parts * (queries + self.rows * self.block * self.itemsize)
        sizes = [stay + self._of_warps(moved), self.rows * self.of_values * 4]
        if self.in_warp_groups or (self.in_key and self.held_itemsize < self.itemsize):
            sizes.append(stay + multiplied + max(1, self.stages - 1) * moved)
        if self.in_key and self.in_warp_groups and self.generation >= BLACKWELL:
            sizes.append(stay + 2 * multiplied + max(1, self.stages) * moved)
        few = _FEW_BYTES + _SLOT_BYTES * self.block + max(_PAIR_COPIES, self.stages) * self.pairs
        return Need(least, max(sizes) + few)

    def _of_warps(self, moved: int) -> int:
        return self.block * self.widest * self.itemsize if self.stages == 1 else (self.stages - 1) * moved
