"""What a mask shows at given lengths: its booleans, its blocks, and the positions of its slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Int8

from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks.base import Extent, Mask
from kernelry.masks.composition import At, children, walk
from kernelry.masks.fit import check_fits
from kernelry.masks.positions import Positions, StaticOffsets, StaticPositions, TracedOffset, TracedPositions
from kernelry.masks.run_time import BlockKind
from kernelry.masks.side import Axis, Side

_DEFAULT_LENGTH = 8
"""Tokens, where neither the caller nor an array of the mask says how many."""
_LONGEST = 2**16
"""Tokens a side; the blocks of a longer one take minutes and gigabytes."""
_MOST_BLOCKS = 1024
"""Blocks a side; more cannot be told apart in any picture."""
_MOST_EVALUATED = 2**26
"""Elements of B N T S, about a second; of larger masks only the static part is looked at."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a mask.

    Args:
      kinds: BlockKinds [B or 1, N or 1, blocks of queries, blocks of keys].
      exact: False where arrays were not looked into, so that FULL blocks show as PARTIAL.
    """

    kinds: Int8[np.ndarray, "rows heads q kv"]
    exact: bool


@final
@dataclasses.dataclass(frozen=True, slots=True)
class DrawnMask:
    """A mask and the sizes at which it is looked at."""

    mask: Mask
    extent: Extent

    @classmethod
    def of(cls, mask: Mask, q_len: int | None = None, kv_len: int | None = None) -> DrawnMask:
        """Takes lengths that are not given from the longest array of the mask, else from the other side, else 8.

        Raises:
          ArgumentError: that many tokens cannot be drawn.
          ShapeError: the mask's arrays do not fit, or a positional mask meets T ≠ S without `.at`.
        """
        extent = _extent(mask, q_len, kv_len)
        for name, length in (("q_len", extent.q_len), ("kv_len", extent.kv_len)):
            if not 1 <= length <= _LONGEST:
                raise ArgumentError(f"a picture of {name}={length} tokens cannot be drawn; choose 1 … {_LONGEST}.")
        check_fits(mask, extent)
        return cls(mask, extent)

    @property
    def size(self) -> int:
        """Elements of B N T S."""
        extent = self.extent
        return extent.batch * extent.q_heads * extent.q_len * extent.kv_len

    def visible(self) -> Bool[np.ndarray, "rows heads T S"]:
        """Returns the whole mask; rows and heads are 1 where all are alike."""
        return self._visible(np.arange(self.extent.q_len, dtype=np.int32))

    def _visible(self, slots: np.ndarray) -> np.ndarray:
        xp: ModuleType = jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self.mask)) else np
        query = Side.of_slots(Axis.QUERY, xp.asarray(slots), q_heads=self.extent.q_heads)
        shown = np.asarray(self.mask.evaluate(query, Side.kv(self.extent.kv_len, xp)))
        return np.broadcast_to(shown, (*shown.shape[:2], len(slots), self.extent.kv_len))

    def blocks(self, block_q: int, block_kv: int) -> Blocks:
        """Classifies the blocks, by every element where that is affordable, else like `Mask.block_map`.

        Raises:
          ArgumentError: a block is smaller than 1, or there are too many blocks.
        """
        q_len, kv_len = self.extent.q_len, self.extent.kv_len
        for name, block, length in (("block_q", block_q, q_len), ("block_kv", block_kv, kv_len)):
            least = -(-length // _MOST_BLOCKS)
            if block < least:
                raise ArgumentError(f"{name}={block} is too small for {length} tokens; choose at least {least}.")
        if self.size > _MOST_EVALUATED:
            static = all(atom.is_static for atom in self.mask.form.atoms)
            return Blocks(self.mask.block_map(q_len, kv_len, block_q, block_kv)[None, None], static)
        bands = [
            _kinds(self._visible(np.arange(first, min(first + block_q, q_len), dtype=np.int32)), block_kv)
            for first in range(0, q_len, block_q)
        ]
        return Blocks(np.stack(bands, axis=2), exact=True)

    def positions(self) -> tuple[Int[np.ndarray, "rows T"] | None, Int[np.ndarray, "rows S"] | None]:
        """The positions of the queries and of the keys; None for a side on which parts of the mask differ."""
        sides = (Side.query(self.extent.q_len, np), Side.kv(self.extent.kv_len, np))
        placed = [(atom, places) for atom, *places in _placed(self.mask, None, None) if atom.positional]
        query = [_numbers(sides[0], places[0]) for atom, places in placed if atom.uses_query_positions]
        return _common(query, sides[0]), _common([_numbers(sides[1], places[1]) for _, places in placed], sides[1])


def _kinds(visible: np.ndarray, block_kv: int) -> np.ndarray:
    """Kinds [rows, heads, blocks of keys] of one row of blocks."""
    starts = np.arange(0, visible.shape[3], block_kv)
    counts = np.add.reduceat(visible.sum(axis=2), starts, axis=2)
    full = visible.shape[2] * np.diff(starts, append=visible.shape[3])
    kinds = np.where(counts == 0, BlockKind.EMPTY, np.where(counts == full, BlockKind.FULL, BlockKind.PARTIAL))
    return kinds.astype(np.int8)


def _numbers(side: Side, where: Positions | None) -> np.ndarray:
    positions = np.asarray(side.at(where).positions)
    return positions.reshape(positions.shape[0], -1)


def _common(found: list[np.ndarray], side: Side) -> np.ndarray | None:
    if not found:
        return _numbers(side, None)
    return found[0] if all(np.array_equal(found[0], other) for other in found) else None


def _placed(mask: Mask, query: Positions | None, kv: Positions | None) -> Iterator[tuple[Any, ...]]:
    """Yields the atoms with their places; the innermost `.at` wins."""
    if isinstance(mask, At):
        query, kv = mask.query or query, mask.kv or kv
    inside = children(mask)
    for part in inside:
        yield from _placed(part, query, kv)
    if not inside:
        yield mask, query, kv


def _extent(mask: Mask, q_len: int | None, kv_len: int | None) -> Extent:
    sizes = [_sizes(inside) for inside in walk(mask)]
    rows, heads, queries, keys = (max((size.get(letter, 0) for size in sizes), default=0) for letter in "BNTS")
    rows, heads = max(rows, 1), max(heads, 1)
    q_len = (queries or None) if q_len is None else q_len
    kv_len = (keys or None) if kv_len is None else kv_len
    either = next((length for length in (q_len, kv_len) if length is not None), _DEFAULT_LENGTH)
    kv_heads = min((size["K"] for size in sizes if size.get("K", 1) > 1), default=heads)
    if heads % kv_heads:
        raise ShapeError(f"mask={mask!r} has arrays of {heads} heads and of {kv_heads}; one must divide the other.")
    return Extent(
        batch=rows,
        q_heads=heads,
        kv_heads=kv_heads,
        q_len=either if q_len is None else q_len,
        kv_len=either if kv_len is None else kv_len,
    )


def _sizes(mask: Mask) -> dict[str, int]:
    """The sizes that arrays and positions of one mask tell, by letter; composites tell those of their positions."""
    if not isinstance(mask, At):
        return mask.sizes()
    found = {}
    for letter, where in (("T", mask.query), ("S", mask.kv)):
        if where is not None:
            rows, found[letter] = _rows_of_places(where)
            found["B"] = max(rows, found.get("B", 0))
    return found


def _rows_of_places(where: Positions) -> tuple[int, int]:
    match where:
        case StaticPositions():
            return _rows(where.array)
        case TracedPositions(value=value):
            return _rows(value)
        case StaticOffsets(values=values):
            return len(values), 0
        case TracedOffset(value=value):
            return value.size, 0
    return 1, 0


def _rows(array: Any) -> tuple[int, int]:
    return (array.shape[0], array.shape[1]) if array.ndim == 2 else (1, array.shape[0])
