"""Which blocks of a T×S mask hold anything, from the parts of the mask that need no array.

Atoms whose class decides ranges of positions (`Mask.of_ranges`) are decided for whole blocks at once, from the least
and the greatest position of each block. What that leaves open (windows and chunks where the positions have gaps,
several atoms that are each PARTIAL) is searched for one visible element: a key is seen from one interval of positions.
Other masks, and masks at two sets of positions, are evaluated, one row of blocks at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import final

import jax
import numpy as np

from kernelry.errors import ArgumentError
from kernelry.masks.band import Full
from kernelry.masks.base import Mask, Ranges
from kernelry.masks.composition import Conjunct
from kernelry.masks.form import Atom, AtomKind, MaskForm, PositionForm, PositionKind
from kernelry.masks.functions import FunctionRef
from kernelry.masks.predicate import functions_in
from kernelry.masks.run_time import BlockKind
from kernelry.masks.side import Axis, Side


def block_map_of(mask: Mask, q_len: int, kv_len: int, block_q: int, block_kv: int) -> np.ndarray:
    """Classifies the blocks; time grows with their number and with T + S, with T·S where it must evaluate."""
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size < 1:
            raise ArgumentError(f"block_map: {name}={size} must be at least 1.")
    conjuncts = mask.conjuncts()
    static = [conjunct for conjunct in conjuncts if conjunct.atom.is_static]
    shape = (-(-q_len // block_q), -(-kv_len // block_kv))
    if 0 in shape:
        return np.zeros(shape, np.int8)
    grid = Grid((q_len, kv_len), (block_q, block_kv))
    whole = decided_blocks(MaskForm(tuple(conjunct.atom for conjunct in static)), grid)
    kinds = np.where(whole.empty, BlockKind.EMPTY, np.where(whole.full, BlockKind.FULL, BlockKind.PARTIAL))
    for row in np.flatnonzero(~whole.sure.all(axis=1)).tolist():
        columns = np.flatnonzero(~whole.sure[row])
        if columns.size * block_q * block_kv >= _MANY_ELEMENTS:
            kinds[row, columns] = _evaluated(static, row, columns, grid, every=_FEW)
            columns = columns[kinds[row, columns] != BlockKind.PARTIAL]
        if columns.size:
            kinds[row, columns] = _evaluated(static, row, columns, grid)
    if len(static) < len(conjuncts):
        kinds = np.minimum(kinds, BlockKind.PARTIAL)
    return kinds.astype(np.int8)


def static_block_map(masks: tuple[Mask, ...], q_len: int, kv_len: int, block_q: int, block_kv: int) -> np.ndarray:
    """The block map of a conjunction of masks that need no array; not to be written to, for it is kept.

    It is kept for the forms of the masks, which hold the functions of predicates weakly.
    """
    functions = tuple(FunctionRef(function) for mask in masks for function in functions_in(mask))
    kept = _kept(tuple(mask.form for mask in masks), functions, (q_len, kv_len, block_q, block_kv))
    if not kept:
        whole: Mask = functools.reduce(operator.and_, masks, Full())
        kinds = whole.block_map(q_len, kv_len, block_q, block_kv)
        kinds.flags.writeable = False
        kept.append(kinds)
    return kept[0]


@functools.lru_cache(maxsize=64)
def _kept(forms: tuple[MaskForm, ...], functions: tuple[FunctionRef, ...], sizes: tuple[int, ...]) -> list[np.ndarray]:
    """A place for a block map: a form names functions of modules, which may be defined anew under the same name."""
    return []


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """How many queries and keys, from which slots on, and the slots of a block on each side."""

    lengths: tuple[int, int]
    blocks: tuple[int, int]
    starts: tuple[int, int] = (0, 0)
    tokens: tuple[np.ndarray, np.ndarray] | None = None
    """What default positions mean, [T] and [S]; None is the slots."""

    def positions(self, form: PositionForm, side: int) -> np.ndarray:
        """Where the slots of one side stand, [batch rows, length]."""
        end = self.starts[side] + self.lengths[side]
        tokens = self.tokens if form.kind is PositionKind.DEFAULT else None
        rows = form.positions(end) if tokens is None else tokens[side][None]
        assert rows is not None
        return rows[:, self.starts[side] : end]

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return -(-self.lengths[0] // self.blocks[0]), -(-self.lengths[1] // self.blocks[1])


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Certain:
    """Booleans [blocks of queries, blocks of keys]; a block neither empty nor full is PARTIAL if sure."""

    empty: np.ndarray
    full: np.ndarray
    sure: np.ndarray

    def __and__(self, other: Certain) -> Certain:
        empty, full = self.empty | other.empty, self.full & other.full
        # A PARTIAL block stays PARTIAL where the other is FULL; two PARTIAL ones may have nothing in common.
        sure = empty | full | (self.full & other.sure) | (other.full & self.sure)
        return Certain(empty, full, sure)

    def __invert__(self) -> Certain:
        return Certain(self.full, self.empty, self.sure)


def decided_blocks(form: MaskForm, grid: Grid) -> Certain:
    """The conjunction of atoms, those at the same positions together: all that is known without evaluating any."""
    shape = grid.shape
    whole = Certain(np.zeros(shape, bool), np.ones(shape, bool), np.ones(shape, bool))
    together: list[list[Atom]] = []
    for atom in form.atoms:
        if not (atom.mask_class.decides_ranges and atom.is_static):
            whole = whole & _decided(atom, grid)
            continue
        places = (atom.query, atom.kv)
        found = next((atoms for atoms in together if (atoms[0].query, atoms[0].kv) == places), None)
        if found is None:
            together.append([atom])
        else:
            found.append(atom)
    for atoms in together:
        whole = whole & _at_one_place(atoms, grid)
    return whole


def _decided(atom: Atom, grid: Grid) -> Certain:
    if atom.kind is AtomKind.NOT:
        return ~decided_blocks(atom.params[0], grid)
    if atom.kind is AtomKind.ANY_OF:
        hidden = (~decided_blocks(form, grid) for form in atom.params)
        return ~functools.reduce(operator.and_, hidden)
    nothing = np.zeros(grid.shape, bool)
    return Certain(nothing, nothing, nothing)


def _at_one_place(atoms: list[Atom], grid: Grid) -> Certain:
    """Decides by ranges, which find every FULL block; where they leave one open, looks for a visible element in it."""
    query, kv = grid.positions(atoms[0].query, 0), grid.positions(atoms[0].kv, 1)
    rows = max(len(query), len(kv))
    query, kv = (np.broadcast_to(side, (rows, side.shape[1])) for side in (query, kv))
    ranges = list(zip(_bounds(query, grid.blocks[0]), _bounds(kv, grid.blocks[1]), strict=True))
    decided = functools.reduce(operator.and_, (_by_ranges(atom, ranges, grid) for atom in atoms))
    for pair in zip(query, kv, strict=True):
        decided = _with_witnesses(decided, atoms, *pair, grid)
    return dataclasses.replace(decided, empty=decided.empty | ~decided.sure, sure=np.ones(grid.shape, bool))


def _by_ranges(atom: Atom, ranges: list[tuple[Ranges, Ranges]], grid: Grid) -> Certain:
    rows = [atom.mask_class.of_ranges(atom, (low_q[:, None], high_q[:, None]), kv) for (low_q, high_q), kv in ranges]
    empty = np.logical_and.reduce([np.broadcast_to(row[0], grid.shape) for row in rows])
    full = np.logical_and.reduce([np.broadcast_to(row[1], grid.shape) for row in rows])
    exact = rows[0][2] or (grid.tokens is None and atom.query.start is not None and atom.kv.start is not None)
    return Certain(empty, full, empty | full | exact)


_SAMPLES = 128
"""Of the queries that see a key: enough to find most blocks of 64 slots in any order."""


def _with_witnesses(decided: Certain, atoms: list[Atom], query: np.ndarray, kv: np.ndarray, grid: Grid) -> Certain:
    """Is sure of the blocks in which some key is seen by some query."""
    if decided.sure.all():
        return decided
    first, last = _seen_from(atoms, kv)
    places = np.argsort(query, kind="stable")
    first = np.searchsorted(query, first, "left", sorter=places)
    last = np.maximum(np.searchsorted(query, last, "right", sorter=places), first)
    sure = decided.sure.copy()
    if (~sure).sum() * grid.blocks[1] > 8 * len(kv):  # the search below would take longer
        seen = np.flatnonzero(last > first)
        start, width = first[seen], (last - first)[seen]
        rows, columns = places // grid.blocks[0] * grid.shape[1], seen // grid.blocks[1]
        for sample in range(_SAMPLES):
            part = 37 * sample % _SAMPLES  # far apart at first
            sure.reshape(-1)[rows[start + width * part // _SAMPLES] + columns] = True
            if sure.all():
                break
    rank = np.empty(len(query), np.int64)
    rank[places] = np.arange(len(query))
    for row in np.flatnonzero(~sure.all(axis=1)).tolist():
        columns = np.flatnonzero(~sure[row])
        slots, starts = _slots(columns, grid.lengths[1], grid.blocks[1])
        ranks = np.append(np.sort(rank[row * grid.blocks[0] : (row + 1) * grid.blocks[0]]), len(query))
        visible = ranks[np.searchsorted(ranks, first[slots])] < last[slots]
        sure[row, columns] = np.logical_or.reduceat(visible, starts)
    return dataclasses.replace(decided, sure=sure)


def _slots(columns: np.ndarray, length: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The slots of some blocks, one block after another, and where each block starts among them."""
    sizes = np.minimum(block, length - columns * block)
    starts = np.cumsum(sizes) - sizes
    return np.repeat(columns * block - starts, sizes) + np.arange(sizes.sum()), starts


def _seen_from(atoms: list[Atom], kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last position from which each key is seen."""
    found = [atom.mask_class.seen_from(atom, kv) for atom in atoms]
    first, last = (np.stack(ends) for ends in zip(*found, strict=True))
    return first.max(axis=0), last.min(axis=0)


def _bounds(positions: np.ndarray, block: int) -> list[Ranges]:
    """The ranges of every block, for each batch row."""
    starts = np.arange(0, positions.shape[1], block)
    return [(np.minimum.reduceat(row, starts), np.maximum.reduceat(row, starts)) for row in positions]


_MANY_ELEMENTS = 2**20
"""Of one row of blocks: from here on a few of each block are evaluated first, which finds most that are PARTIAL."""

_FEW = 16
"""Every so many slots of a block, on both sides."""


def _evaluated(static: list[Conjunct], row: int, columns: np.ndarray, grid: Grid, every: int = 1) -> np.ndarray:
    """Evaluates the blocks `columns` of one row of blocks, or some of their slots: memory O(block_q · S)."""
    (q_len, kv_len), (block_q, block_kv) = grid.lengths, grid.blocks
    slots_q = np.arange(row * block_q, min((row + 1) * block_q, q_len), every, dtype=np.int32)
    slots_k, _ = _slots(columns, kv_len, block_kv)
    slots_k = slots_k[slots_k % block_kv % every == 0]
    starts = np.flatnonzero(slots_k % block_kv == 0)
    query, kv = Side.of_slots(Axis.QUERY, slots_q), Side.of_slots(Axis.KV, slots_k.astype(np.int32))
    visible, known = np.ones((1, 1, len(slots_q), kv.slots.size), bool), True
    with jax.ensure_compile_time_eval():  # a predicate may be written with jax.numpy
        for conjunct in static:
            part = conjunct.located_mask.evaluate(query, kv)
            if isinstance(part, jax.core.Tracer):  # of a predicate whose function holds an array that is being traced
                known = False
            else:
                visible = visible & np.asarray(part)
    sizes = np.diff(starts, append=slots_k.size)
    counts = np.add.reduceat(visible.sum(axis=(0, 1, 2)), starts)
    full = visible.shape[0] * len(slots_q) * sizes if known else -1
    return np.where(counts == 0, BlockKind.EMPTY, np.where(counts == full, BlockKind.FULL, BlockKind.PARTIAL))
