"""Columns of keys that a program reads apart, because a tile's sides are powers of two.

Absorbed multi-head latent attention has keys of 576 columns, of which the first 512 are the values: tiles of 512 and 64
hold no padding, and the first one is read once for both.
"""

from __future__ import annotations

import dataclasses
from typing import final

from kernelry.plugin import VALUE_IN_KEY, Request
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Neighbouring columns of an array.

    Args:
      start: the first one. width: how many.
    """

    start: int
    width: int

    @property
    def padded(self) -> int:
        """Columns of a tile that holds them: a power of two."""
        return max(SMALLEST_BLOCK, power_of_two(self.width))


def has_value_in_key(request: Request) -> bool:
    """Whether the values are the first columns of the keys."""
    return request.kv_layout == VALUE_IN_KEY


def columns_of_keys(request: Request) -> tuple[Columns, ...]:
    """How keys are read: in one piece, or the columns of the values first and then the others."""
    width, first = request.head_dim, request.value_dim
    if not has_value_in_key(request) or first == width:
        return (Columns(0, width),)
    return Columns(0, first), Columns(first, width - first)


def end_of(columns: tuple[Columns, ...]) -> int:
    """The columns that an array must have for all tiles to lie in it."""
    return max(each.start + each.padded for each in columns)
