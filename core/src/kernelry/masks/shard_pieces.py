"""One atom of a mask within a pair of shards, brought into the form that equal work has everywhere.

Only what an atom can tell apart is kept. Positions at equal distances on both sides are counted in these distances;
gaps that no band reaches across are closed up, and blocks of positions that hold no slot are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import final

import numpy as np

from kernelry.errors import PluginError
from kernelry.masks.band import Band, band_atom
from kernelry.masks.base import Bounds, Mask
from kernelry.masks.composition import At
from kernelry.masks.form import Atom, AtomKind, MaskForm, PositionForm, PositionKind
from kernelry.masks.positions import Positions, StaticOffset, StaticPositions

_DEFAULT = PositionForm()

_PERIODIC = (AtomKind.CHUNKED, AtomKind.BLOCK_CAUSAL)
"""Of blocks of positions they tell apart but their order, and of positions but their order within one."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What is left of one atom of a form in a class of pairs.

    Args:
      index: which atom.
      traced: whether its positions and arrays are known to the running program alone.
      band: of a static piece that is a band in this class: its parameters.
      query, kv: of a static piece: where the slots of the shards stand.
      size: of a static piece of chunks or blocks: their size in this class, if it is another.
    """

    index: int
    traced: bool
    band: Bounds | None = None
    query: PositionForm = _DEFAULT
    kv: PositionForm = _DEFAULT
    size: int | None = None

    def atom(self, form: MaskForm) -> Atom:
        """The atom a kernel is asked about."""
        given = form.atoms[self.index]
        if self.traced:
            return given.mask_class.spread_atom(given)
        if self.band is not None:
            given = band_atom(*self.band)
        elif self.size is not None:
            given = dataclasses.replace(given, params=(self.size,))
        return dataclasses.replace(given, query=self.query, kv=self.kv)

    def mask(self, masks: tuple[Mask, ...]) -> Mask:
        """The mask of a static piece at its positions.

        Args:
          masks: the canonical masks, aligned with the atoms of the form.
        """
        if self.traced:
            raise PluginError(f"atom {self.index} of the mask has positions or arrays that only a program knows.")
        mask = masks[self.index]
        while isinstance(mask, At):
            mask = mask.mask
        if self.band is not None:
            mask = Band(*self.band)
        elif self.size is not None:
            mask = dataclasses.replace(mask, size=self.size)  # type: ignore[type-var]
        return At(mask, _positions(self.query), _positions(self.kv))

    @property
    def numbers(self) -> int:
        """How many numbers its positions take, beyond a few."""
        scattered = (form.value for form in (self.query, self.kv) if not form.is_arithmetic)
        return sum(len(row) for value in scattered if isinstance(value, tuple) for row in value)


def _positions(form: PositionForm) -> Positions:
    return StaticPositions(form.value) if isinstance(form.value, tuple) else StaticOffset(form.value or 0)


def traced_piece(index: int) -> Piece:
    """An atom that the running program alone knows."""
    return Piece(index, traced=True)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the slots of one side of a pair stand: runs of consecutive positions, int64 [runs]."""

    firsts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, positions: np.ndarray) -> Places:
        """Compresses positions [L], L ≥ 1."""
        starts = np.append(0, np.flatnonzero(np.diff(positions) != 1) + 1)
        return cls(positions[starts], np.diff(starts, append=positions.size))

    @property
    def stride(self) -> int | None:
        """The distance of each position from the one before, ≥ 1; 0 of a single slot, None where distances differ."""
        if len(self.firsts) == 1:
            return int(self.counts[0] > 1)
        steps = np.diff(self.firsts)
        even = steps[0] >= 1 and (steps == steps[0]).all() and (self.counts == 1).all()
        return int(steps[0]) if even else None

    @property
    def first(self) -> int:
        """The position of slot 0."""
        return int(self.firsts[0])

    @property
    def low(self) -> int:
        """The least position."""
        return int(self.firsts.min())

    @property
    def high(self) -> int:
        """The greatest position."""
        return int((self.firsts + self.counts).max()) - 1

    def moved(self, by: int | np.ndarray) -> Places:
        """Each run moved."""
        firsts = self.firsts + by
        ends = firsts[:-1] + self.counts[:-1] == firsts[1:]  # which now follow one another
        starts = np.flatnonzero(np.append(True, ~ends))
        return Places(firsts[starts], np.add.reduceat(self.counts, starts))

    @property
    def form(self) -> PositionForm:
        """As the positions of a mask."""
        if len(self.firsts) == 1:
            return _offset(self.first)
        return StaticPositions((tuple(zip(self.firsts.tolist(), self.counts.tolist(), strict=True)),)).form


def _offset(value: int) -> PositionForm:
    return PositionForm(PositionKind.OFFSET, value) if value else PositionForm()


def pieces_of(index: int, atom: Atom, query: Places, kv: Places) -> tuple[Piece, ...]:
    """What an atom told by ranges of positions is within a pair of shards in which it hides something."""
    if atom.is_band:
        left, right = atom.params
        return _band(index, left, right, query, kv)
    if atom.kind not in _PERIODIC:
        return (Piece(index, False, None, query.form, kv.form),)
    size = atom.params[0]
    chunks = {place // size for side in (query, kv) for place in (side.low, side.high)}
    if atom.kind is AtomKind.CHUNKED and len(chunks) == 1:
        return _band(index, None, 0, query, kv)
    stride = _common_stride(query, kv)
    if stride is None or stride == 1 or size % stride:
        return (_piece_of_blocks(index, size, query, kv),)
    counted_q, counted_k = (_one_run(side.first // stride, side) for side in (query, kv))
    piece = dataclasses.replace(_piece_of_blocks(index, size // stride, counted_q, counted_k), size=size // stride)
    behind = atom.kind is AtomKind.CHUNKED and kv.first % stride > query.first % stride
    return (piece, *_band(index, None, 0, query, kv)) if behind else (piece,)


def _band(index: int, left: int | None, right: int | None, query: Places, kv: Places) -> tuple[Piece, ...]:
    """With a right bound it becomes 0, else the left one: the rest is where the queries stand."""
    left = None if left is not None and query.high - kv.low <= left else left
    right = None if right is not None and kv.high - query.low <= right else right
    if left is None and right is None:
        return ()
    stride = _common_stride(query, kv)
    if stride is not None:
        ahead = query.first - kv.first
        left = None if left is None else (left - ahead) // stride
        right = None if right is None else (right + ahead) // stride
        query, kv = _one_run(0, query), _one_run(0, kv)
    if right is None:
        assert left is not None
        return _piece(index, (0, None), query.moved(-left), kv)
    return _piece(index, (None if left is None else left + right, 0), query.moved(right), kv)


def _one_run(first: int, side: Places) -> Places:
    return Places(np.array([first]), side.counts.sum(keepdims=True))


def _piece(index: int, band: Bounds, query: Places, kv: Places) -> tuple[Piece, ...]:
    """A band whose one bound is 0, at positions that are closed up and count from the first key."""
    if not len(query.firsts) == len(kv.firsts) == 1:
        width = None if None in band else band[0]
        query, kv = _closed_up(query, kv, lambda stretches: _moves_of_band(stretches, width))
    return (Piece(index, False, band, query.moved(-kv.first).form, kv.moved(-kv.first).form),)


def _piece_of_blocks(index: int, size: int, query: Places, kv: Places) -> Piece:
    """The first key is in block 0."""
    query, kv = _closed_up(query, kv, lambda stretches: _moves_of_blocks(stretches, size))
    start = kv.first // size * size
    return Piece(index, False, None, query.moved(-start).form, kv.moved(-start).form)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive positions at which slots of either side stand."""

    low: int
    high: int
    last_key: int | None
    first_query: int | None


_MOST_RUNS = 64
"""Of both sides; more are left where they are."""


def _closed_up(query: Places, kv: Places, moves_of: Callable[[list[_Stretch]], list[int]]) -> tuple[Places, Places]:
    """Moves each stretch of positions down by what the mask does not notice."""
    firsts = np.concatenate([query.firsts, kv.firsts])
    if len(firsts) > _MOST_RUNS:
        return query, kv
    lasts = firsts + np.concatenate([query.counts, kv.counts]) - 1
    is_key = np.arange(len(firsts)) >= len(query.firsts)
    by_place = np.argsort(firsts, kind="stable")
    reached = np.maximum.accumulate(lasts[by_place])
    starts = np.append(0, np.flatnonzero(firsts[by_place][1:] > reached[:-1] + 1) + 1)
    stretches, moves = [], np.empty_like(firsts)
    runs_of = np.split(by_place, starts[1:])
    for runs in runs_of:
        keys, queries = lasts[runs[is_key[runs]]], firsts[runs[~is_key[runs]]]
        ends = int(firsts[runs].min()), int(lasts[runs].max())
        stretches.append(_Stretch(*ends, max(keys.tolist(), default=None), min(queries.tolist(), default=None)))
    for runs, move in zip(runs_of, moves_of(stretches), strict=True):
        moves[runs] = -move
    return query.moved(moves[: len(query.firsts)]), kv.moved(moves[len(query.firsts) :])


def _moves_of_band(stretches: list[_Stretch], width: int | None) -> list[int]:
    """Without a width the order alone counts; else what is farther apart must stay so."""
    moves, last_key = [0], None
    for n, (below, above) in enumerate(itertools.pairwise(stretches), 1):
        last_key = last_key if below.last_key is None else below.last_key - moves[-1]
        first_query = next((s.first_query for s in stretches[n:] if s.first_query is not None), None)
        free = above.low - below.high - 1
        if width is not None and last_key is not None and first_query is not None:
            free = min(free, max(first_query - moves[-1] - last_key - width - 1, 0))
        moves.append(moves[-1] + free)
    return moves


def _moves_of_blocks(stretches: list[_Stretch], size: int) -> list[int]:
    """A stretch within one block may begin anywhere there that keeps the order; a longer one keeps its place in it."""
    moves: list[int] = []
    block, block_before, end = -1, None, -1
    for stretch in stretches:
        first, last = stretch.low // size, stretch.high // size
        block += first != block_before
        place = block * size
        if last > first:
            place += stretch.low % size
        elif first == block_before:
            place = end + 1
        moves.append(stretch.low - place)
        end = stretch.high - moves[-1]
        block, block_before = end // size, last
    return moves


def _common_stride(query: Places, kv: Places) -> int | None:
    """The one distance between the positions of both sides; a single slot has any."""
    if query.stride is None or kv.stride is None:
        return None
    strides = {stride for stride in (query.stride, kv.stride) if stride}
    return strides.pop() if len(strides) == 1 else None if strides else 1
