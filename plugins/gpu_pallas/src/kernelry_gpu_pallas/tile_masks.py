"""Masks that a kernel evaluates in registers, one tile of queries and keys at a time.

A kernel holds no array that is not its operand, so what a mask carries (ids, lengths, traced positions, booleans) is
taken out of it beforehand and handed to the kernel, which reads the part of each tile.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from kernelry.masks import BidirectionalSpans, Dense, Lengths, PrefixLM, Segments
from kernelry.plugin import AtomKind, Axis, Mask, MaskForm, PositionForm, Refusal, Request, Side, array_refusals

ATOMS = frozenset(AtomKind) - {AtomKind.BLOCK_SELECTION, AtomKind.CUSTOM}
"""Atoms that can be evaluated so; of predicates those without arrays."""


def mask_refusals(form: MaskForm) -> Iterator[Refusal]:
    """Atoms that only look as if they could be evaluated so: predicates that are handed arrays, or hold some."""
    for atom in form.walk():
        yield from array_refusals(atom)


def dense_masks(form: MaskForm) -> int:
    """How many masks a tile reads a boolean of each query and key from."""
    return sum(atom.kind is AtomKind.DENSE for atom in form.walk())


@final
@enum.unique
class Along(enum.Enum):
    """What an operand's elements belong to, and so which of them a tile reads."""

    QUERY = "query"
    KV = "kv"
    ROW = "row"
    PAIRS = "pairs"


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """An array out of a mask.

    Args:
      along: QUERY [B or 1, T], KV [B or 1, S], ROW [B or 1], all int32; PAIRS [B or 1, N or 1, T or 1, S or 1], bool.
    """

    along: Along
    array: jax.Array


Read: TypeAlias = Callable[[int], Any]
"""Returns a tile's part of an operand: [block_q], [block_kv], a number, or [block_q or 1, block_kv or 1]."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Tile:
    """A block of queries [block_q, 1] and one of keys [1, block_kv]; or [1, block_q] and [block_kv, 1]."""

    query: Side
    kv: Side
    read: Read


_Evaluate: TypeAlias = Callable[[_Tile], Any]


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TileMask:
    """A conjunction of masks; `operands` is what the kernel must be given."""

    operands: tuple[Operand, ...]
    parts: tuple[_Evaluate, ...]

    @classmethod
    def of(cls, masks: Sequence[Mask], request: Request) -> TileMask:
        """Takes the masks apart."""
        taken = _Taken(request)
        parts = tuple(taken.conjunction(mask) for mask in masks)
        return cls(tuple(taken.operands), parts)

    def visible(
        self, query_slots: jax.Array, kv_slots: jax.Array, read: Read, *, by_keys: bool = False
    ) -> Bool[Array, "#block_q #block_kv"] | None:
        """Evaluates the masks for int32 slots [block_q] and [block_kv]; None where nothing is ever hidden.

        Args:
          by_keys: whether the result is [block_kv, block_q], and `read` returns pairs so.
        """
        down, across = (kv_slots, query_slots) if by_keys else (query_slots, kv_slots)
        down, across = down[:, None], across[None, :]
        query_slots, kv_slots = (across, down) if by_keys else (down, across)
        query = Side(Axis.QUERY, query_slots, query_slots, whole=False)
        kv = Side(Axis.KV, kv_slots, kv_slots, whole=False)
        tile = _Tile(query, kv, read)
        found = [part(tile) for part in self.parts]
        return functools.reduce(operator.and_, found) if found else None


@final
class _Taken:
    """Takes masks apart; `operands` grows."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.operands: list[Operand] = []

    def conjunction(self, mask: Mask) -> _Evaluate:
        """All that the mask says."""
        return self._all(mask.conjuncts())

    def _all(self, conjuncts: Sequence[Any]) -> _Evaluate:
        parts = [self._atom(conjunct) for conjunct in conjuncts]
        return lambda tile: functools.reduce(operator.and_, [part(tile) for part in parts])

    def _atom(self, conjunct: Any) -> _Evaluate:
        mask, kind = conjunct.mask, conjunct.atom.kind
        if kind is AtomKind.ANY_OF:
            branches = [self._all(branch) for branch in conjunct.branches]
            return lambda tile: functools.reduce(operator.or_, [branch(tile) for branch in branches])
        if kind is AtomKind.NOT:
            hidden = self.conjunction(~mask)
            return lambda tile: ~hidden(tile)
        if isinstance(mask, Segments):
            return self._same_ids(mask.query_ids, mask.kv_ids)
        if isinstance(mask, BidirectionalSpans):
            return self._same_ids(mask.query_spans, mask.kv_spans)
        if isinstance(mask, Lengths):
            return self._lengths(mask)
        if isinstance(mask, Dense):
            pairs = jnp.asarray(mask.visible)
            index = self._take(Along.PAIRS, pairs.reshape((1,) * (4 - pairs.ndim) + pairs.shape))
            return lambda tile: tile.read(index)
        return self._positional(mask, conjunct)

    def _positional(self, mask: Mask, conjunct: Any) -> _Evaluate:
        query_at = self._positions(Along.QUERY, conjunct.query, conjunct.atom.query)
        kv_at = self._positions(Along.KV, conjunct.kv, conjunct.atom.kv)
        if not isinstance(mask, PrefixLM):
            return lambda tile: mask.evaluate(query_at(tile), kv_at(tile))
        index = self._take(Along.ROW, mask.prefix_lengths)

        def after_prefix(tile: _Tile) -> Any:
            kv = kv_at(tile).positions
            return (kv < tile.read(index)) | (kv <= query_at(tile).positions)

        return after_prefix

    def _positions(self, along: Along, where: Any, form: PositionForm) -> Callable[[_Tile], Side]:
        """How a side comes to stand where it should: by arithmetic, or by an operand."""

        def side_of(tile: _Tile) -> Side:
            return tile.query if along is Along.QUERY else tile.kv

        if where is None:
            return side_of
        if form.is_arithmetic:
            return lambda tile: side_of(tile).at(where)
        whole = Side.query(self.request.q_len) if along is Along.QUERY else Side.kv(self.request.kv_len)
        positions = whole.at(where).positions
        index = self._take(along, positions.reshape(positions.shape[0], -1))

        def placed(tile: _Tile) -> Side:
            side = side_of(tile)
            return dataclasses.replace(side, positions=tile.read(index).reshape(side.slots.shape))

        return placed

    def _same_ids(self, query_ids: Any, kv_ids: Any) -> _Evaluate:
        both = jnp.asarray(query_ids), jnp.asarray(query_ids if kv_ids is None else kv_ids)
        if not all(np.can_cast(ids.dtype, np.int32) for ids in both):
            both = _renumbered(*both)
        own, other = self._take(Along.QUERY, both[0]), self._take(Along.KV, both[1])

        def same(tile: _Tile) -> Any:
            ids = tile.read(own).reshape(tile.query.slots.shape)
            return (ids == tile.read(other).reshape(tile.kv.slots.shape)) & (ids >= 0)

        return same

    def _lengths(self, mask: Lengths) -> _Evaluate:
        end = self._take(Along.ROW, mask.kv_lengths)
        if mask.query_lengths is None:
            return lambda tile: tile.kv.slots < tile.read(end)
        query_end = self._take(Along.ROW, mask.query_lengths)
        return lambda tile: (tile.kv.slots < tile.read(end)) & (tile.query.slots < tile.read(query_end))

    def _take(self, along: Along, array: Any) -> int:
        """Puts an array among the operands and returns its place."""
        array = jnp.asarray(array)
        if along is Along.ROW:
            array = array.astype(jnp.int32).reshape(-1)
        elif along is not Along.PAIRS:
            array = jnp.atleast_2d(array.astype(jnp.int32))
        self.operands.append(Operand(along, array))
        return len(self.operands) - 1


def _renumbered(query_ids: jax.Array, kv_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids that int32 might not hold: each becomes its place among the sorted ids of its row, a negative one −1."""
    sides = [jnp.atleast_2d(query_ids), jnp.atleast_2d(kv_ids)]
    rows = max(side.shape[0] for side in sides)
    sides = [jnp.broadcast_to(side, (rows, side.shape[1])) for side in sides]
    ids = jnp.concatenate(sides, axis=1)
    places = jax.vmap(jnp.searchsorted)(jnp.sort(ids, axis=1), ids).astype(jnp.int32)
    places = jnp.where(jnp.concatenate([side >= 0 for side in sides], axis=1), places, -1)
    q_len = sides[0].shape[1]
    return places[:, :q_len], places[:, q_len:]
