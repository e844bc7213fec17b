"""Slots of a tile, and tiles read from and written to references."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


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


def load(
    ref: Any, slots: Slots | None = None, width: int | None = None, *, seen: jax.Array | None = None, other: float = 0
) -> Any:
    """Reads a tile, with `other` where the array has nothing: slots beyond its end, or columns beyond its width.

    Args:
      seen: booleans [block], False beyond the end too, of the slots to read; None: all that exist.
    """
    inside = seen if seen is not None or slots is None else slots.inside
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
