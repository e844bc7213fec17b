"""Which blocks of a T×S mask hold anything, from the parts of the mask that need no array.

Every atom over a grid of positions is decided for whole blocks at once, from the least and the
greatest position of each block. What that leaves open (blocks with gaps in their positions,
predicates, several atoms that are each PARTIAL) is evaluated, one row of blocks at a time.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import final

import jax
import numpy as np

from kernelry.errors import ArgumentError
from kernelry.masks.base import Conjunct, Mask
from kernelry.masks.form import Atom, AtomKind, PositionForm
from kernelry.masks.side import Axis, Side


@final
class BlockKind(enum.IntEnum):
    """What a block of the mask holds."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


def block_map_of(mask: Mask, q_len: int, kv_len: int, block_q: int, block_kv: int) -> np.ndarray:
    """Classifies the blocks; time and memory grow with the number of blocks, and with T·S where it must evaluate."""
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size < 1:
            raise ArgumentError(f"block_map: {name}={size} must be at least 1.")
    conjuncts = mask.conjuncts()
    static = [conjunct for conjunct in conjuncts if conjunct.atom.is_static]
    shape = (-(-q_len // block_q), -(-kv_len // block_kv))
    if 0 in shape:
        return np.zeros(shape, np.int8)
    whole = _Decided(np.zeros(shape, bool), np.ones(shape, bool), np.ones(shape, bool))
    for conjunct in static:
        whole = whole & _decided(conjunct.atom, (q_len, kv_len), (block_q, block_kv))
    kinds = np.where(whole.empty, BlockKind.EMPTY, np.where(whole.full, BlockKind.FULL, BlockKind.PARTIAL))
    for row in np.flatnonzero(~whole.sure.all(axis=1)).tolist():
        columns = np.flatnonzero(~whole.sure[row])
        kinds[row, columns] = _evaluated(static, row, columns, (q_len, kv_len), (block_q, block_kv))
    if len(static) < len(conjuncts):
        kinds = np.minimum(kinds, BlockKind.PARTIAL)
    return kinds.astype(np.int8)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Decided:
    """Booleans [blocks of queries, blocks of keys]; a block neither empty nor full is PARTIAL if sure."""

    empty: np.ndarray
    full: np.ndarray
    sure: np.ndarray

    def __and__(self, other: _Decided) -> _Decided:
        empty, full = self.empty | other.empty, self.full & other.full
        # A PARTIAL block stays PARTIAL where the other is FULL; two PARTIAL ones may have nothing in common.
        sure = empty | full | (self.full & other.sure) | (other.full & self.sure)
        return _Decided(empty, full, sure)


def _decided(atom: Atom, lengths: tuple[int, int], blocks: tuple[int, int]) -> _Decided:
    shape = tuple(-(-length // block) for length, block in zip(lengths, blocks, strict=True))
    if not (atom.is_band or atom.kind in (AtomKind.CHUNKED, AtomKind.BLOCK_CAUSAL)):
        nothing = np.zeros(shape, bool)
        return _Decided(nothing, nothing, nothing)
    query = _bounds(atom.query, lengths[0], blocks[0])
    kv = _bounds(atom.kv, lengths[1], blocks[1])
    rows = [
        _of_ranges(atom, (low_q[:, None], high_q[:, None]), (low_k, high_k))
        for (low_q, high_q), (low_k, high_k) in _paired(query, kv)
    ]
    empty = np.logical_and.reduce([np.broadcast_to(row[0], shape) for row in rows])
    full = np.logical_and.reduce([np.broadcast_to(row[1], shape) for row in rows])
    consecutive = atom.query.start is not None and atom.kv.start is not None
    return _Decided(empty, full, empty | full | consecutive)


Ranges = tuple[np.ndarray, np.ndarray]
"""The least and the greatest position of each block."""


def _bounds(form: PositionForm, length: int, block: int) -> list[Ranges]:
    """The ranges of every block, for each batch row."""
    positions = form.positions(length)
    assert positions is not None
    starts = np.arange(0, length, block)
    return [(np.minimum.reduceat(row, starts), np.maximum.reduceat(row, starts)) for row in positions]


def _paired(query: list[Ranges], kv: list[Ranges]) -> list[tuple[Ranges, Ranges]]:
    rows = max(len(query), len(kv))
    return list(zip(query * (rows // len(query)), kv * (rows // len(kv)), strict=True))


def _of_ranges(atom: Atom, query: Ranges, kv: Ranges) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks are EMPTY and which FULL.

    Exact where both ranges hold every position between their ends; else EMPTY may be missed.
    """
    (low_q, high_q), (low_k, high_k) = query, kv
    if atom.is_band:
        left, right = atom.params
        empty, full = np.zeros(1, bool), np.ones(1, bool)
        if left is not None:
            empty, full = empty | (low_q - high_k > left), full & (high_q - low_k <= left)
        if right is not None:
            empty, full = empty | (low_k - high_q > right), full & (high_k - low_q <= right)
        return empty, full
    size = atom.params[0]
    if atom.kind is AtomKind.BLOCK_CAUSAL:
        return low_k // size > high_q // size, high_k // size <= low_q // size
    last = np.minimum(high_q // size, high_k // size)  # the last chunk that both reach shows most
    apart = last < np.maximum(low_q // size, low_k // size)
    behind = np.maximum(low_k, last * size) > np.minimum(high_q, last * size + size - 1)
    same = (low_q // size == high_k // size) & (low_k // size == high_q // size)
    return apart | behind, same & (high_k <= low_q)


def _evaluated(
    static: list[Conjunct], row: int, columns: np.ndarray, lengths: tuple[int, int], blocks: tuple[int, int]
) -> np.ndarray:
    """Evaluates the blocks `columns` of one row of blocks: memory O(block_q · S)."""
    slots_q = np.arange(row * blocks[0], min((row + 1) * blocks[0], lengths[0]), dtype=np.int32)
    slots = [np.arange(c * blocks[1], min((c + 1) * blocks[1], lengths[1]), dtype=np.int32) for c in columns]
    query, kv = Side.of_slots(Axis.QUERY, slots_q), Side.of_slots(Axis.KV, np.concatenate(slots))
    visible, known = np.ones((1, 1, len(slots_q), kv.slots.size), bool), True
    with jax.ensure_compile_time_eval():  # a predicate may be written with jax.numpy
        for conjunct in static:
            part = conjunct.located_mask.evaluate(query, kv)
            if isinstance(part, jax.core.Tracer):  # of a predicate whose function holds an array that is being traced
                known = False
            else:
                visible = visible & np.asarray(part)
    sizes = np.array([len(part) for part in slots])
    counts = np.add.reduceat(visible.sum(axis=(0, 1, 2)), np.cumsum(sizes) - sizes)
    full = visible.shape[0] * len(slots_q) * sizes if known else -1
    return np.where(counts == 0, BlockKind.EMPTY, np.where(counts == full, BlockKind.FULL, BlockKind.PARTIAL))
