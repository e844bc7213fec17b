"""A mask given as booleans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

import jax
import jax.numpy as jnp

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.masks.arrays import (
    as_booleans,
    filled,
    missing_axes,
    module_of,
    read_booleans,
    with_rank_4,
)
from kernelry.masks.base import Extent, Mask, Placeholder
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.run_time import BlockGrid, Decided
from kernelry.masks.side import ArrayLike, Side

if TYPE_CHECKING:
    from kernelry.masks.composition import Conjunct
    from kernelry.masks.padding import Padding


@final
@pytree("visible")
@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Dense(Mask):
    """A boolean array says which keys each query sees, e.g. those an indexer has picked.

    Args:
      visible: booleans that broadcast to B N T S; True where the key may be seen.
    """

    visible: ArrayLike

    word: ClassVar[str] = "dense"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.DENSE,)
    axes: ClassVar[Mapping[str, str]] = {"visible": "BNTS"}

    def __post_init__(self) -> None:
        instead = "for 0/1 numbers pass visible > 0, for additive masks pass bias=."
        object.__setattr__(self, "visible", as_booleans("Dense: visible", self.visible, instead))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return kv.cut(query.cut(with_rank_4(self.visible)))

    def check(self, extent: Extent) -> None:
        full = (extent.batch, extent.q_heads, extent.q_len, extent.kv_len)
        shape = with_rank_4(self.visible).shape
        if any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
            found = f"{self.visible.shape}{missing_axes('array', self.visible.shape, full)}"
            raise ShapeError(f"Dense: visible must broadcast to B N T S = {full}, got shape {found}.")

    @classmethod
    def placeholders(cls) -> dict[str, Placeholder]:
        return {
            "dense": Placeholder(
                lambda at: Dense(filled(True, (at.batch, 1, at.q_len, at.kv_len))), "dense([[1, 0], [1, 1]])"
            )
        }

    @classmethod
    def read(cls, *values: Any, **named: Any) -> Mask:
        return cls(*map(read_booleans, values), **{name: read_booleans(value) for name, value in named.items()})

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        visible = with_rank_4(jnp.asarray(self.visible))
        for axis, (block, blocks) in ((2, (grid.block_q, grid.rows)), (3, (grid.block_kv, grid.columns))):
            if visible.shape[axis] != 1:
                more = [(0, 0)] * 4
                more[axis] = (0, blocks * block - visible.shape[axis])
                visible = jnp.pad(visible, more, mode="edge")
        return Decided.spread(_over_tiles(visible, grid, jnp.any), _over_tiles(visible, grid, jnp.all), grid)

    def padded(self, padding: Padding) -> Mask:
        visible = with_rank_4(self.visible)
        for axis, length, more in ((2, padding.q_len, padding.more_queries), (3, padding.kv_len, padding.more_keys)):
            if more and (visible.shape[axis] > 1 or axis == 3 or padding.hide_rows):
                shape = tuple(length if place == axis else size for place, size in enumerate(visible.shape))
                whole = module_of(visible).broadcast_to(visible, shape)  # each slot has its own entry
                visible = module_of(visible).pad(whole, [(0, more if place == axis else 0) for place in range(4)])
        return Dense(visible)

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        return True

    @classmethod
    def hides_rows_behind(cls, atom: Atom) -> bool:
        return True


def _over_tiles(visible: jax.Array, grid: BlockGrid, reduce: Callable[..., jax.Array]) -> jax.Array:
    rows = (grid.rows, grid.block_q) if visible.shape[2] > 1 else (1, 1)
    columns = (grid.columns, grid.block_kv) if visible.shape[3] > 1 else (1, 1)
    tiles = visible.reshape(*visible.shape[:2], *rows, *columns)
    return reduce(tiles, axis=(1, 3, 5))
