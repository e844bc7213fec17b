"""How many pairs of a query and a key a mask shows, counted without the T × S booleans.

Under positional masks a query sees a few intervals of keys, so that counting a row takes the same time for any number
of keys.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import Any, final

import jax
import numpy as np

from kernelry.masks.band import Band, Causal, Full
from kernelry.masks.base import Mask
from kernelry.masks.chunked import BlockCausal, Chunked
from kernelry.masks.composition import At, Conjunct
from kernelry.masks.fit import check_located
from kernelry.masks.form import AtomKind, PositionForm, PositionKind
from kernelry.masks.prefix import PrefixLM
from kernelry.masks.side import Axis, Side

_FAR = 2**40
"""Beyond every position: positions are int32."""

_MOST_RUNS = 32
"""Runs of consecutive positions that are counted as intervals; keys with more of them are evaluated."""

_MOST_EVALUATED = 2**26
"""Pairs of one batch row that are evaluated where there are no intervals: about a second on one core of a CPU."""

_CHUNK = 2**22
"""Intervals or pairs that are in memory at once."""

_MOST_INTERVALS = _MOST_RUNS**2
"""Intervals of one query while two parts of a mask are joined."""

Intervals = tuple[np.ndarray, np.ndarray]
"""The first and the last slot, [T, I] each, both included; empty where the last is before the first."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PairCounts:
    """What the mask of one query head shows, summed over the batch.

    Args:
      pairs: a query and a key that it sees.
      queries: those that see a key.
      keys: those that a query sees.
      assumed: the parts of the mask that were left out because they depend on arrays or take too long to count.
    """

    pairs: float
    queries: float
    keys: float
    assumed: tuple[str, ...] = ()


def count_pairs(mask: Mask, batch: int, q_len: int, kv_len: int, *, fewest: int | None = None) -> PairCounts:
    """Counts what a mask shows.

    Bands, chunks, blocks, prefixes whose lengths are numbers, and what `&`, `|` and `~` make of them are counted
    exactly; other functions of positions, and positions of more than 32 runs, up to 2**26 pairs. What depends on arrays
    is left out of the mask and named in `assumed`: without a part of a conjunction the count is too high, without one
    of a disjunction too low. A prefix whose lengths are arrays is counted as causal, the least that
    it shows; under `~` it is left out like the others. Positions known only at run time are taken to be those of the
    last queries of consecutive keys, as in a decode step from a full cache.

    Args:
      mask: which keys each query sees.
      batch, q_len, kv_len: B, T and S.
      fewest: how many keys of the blocks chosen for it a query is certain to see, if the rest of the mask shows that
        many; None counts as if the choice hid nothing.

    Raises:
      ShapeError: a positional mask meets T ≠ S without `.at`.
    """
    check_located(mask, q_len, kv_len)
    left_out: list[str] = []
    static = _known(mask.conjuncts(), q_len, kv_len, left_out, negated=False)
    conjuncts = static.conjuncts()
    rows = max([1, *map(_rows, conjuncts)])
    if not all(_has_intervals(conjunct) for conjunct in conjuncts) and q_len * kv_len > _MOST_EVALUATED:
        left_out += [conjunct.atom.kind.value for conjunct in conjuncts if not _has_intervals(conjunct)]
        conjuncts = tuple(conjunct for conjunct in conjuncts if _has_intervals(conjunct))
    found = np.zeros(3)
    for row in range(rows):
        found += _count_row(conjuncts, row, q_len, kv_len, kv_len if fewest is None else fewest)
    pairs, queries, keys = (found * batch / rows).tolist()
    assumed = set(left_out) - (set() if fewest is None else {AtomKind.BLOCK_SELECTION.value})
    return PairCounts(pairs, queries, keys, tuple(sorted(assumed)))


def _known(conjuncts: Iterable[Conjunct], q_len: int, kv_len: int, left_out: list[str], *, negated: bool) -> Mask:
    parts = [_known_part(conjunct, q_len, kv_len, left_out, negated=negated) for conjunct in conjuncts]
    return functools.reduce(operator.and_, [part for part in parts if part is not None], Full())


def _known_part(conjunct: Conjunct, q_len: int, kv_len: int, left_out: list[str], *, negated: bool) -> Mask | None:
    """The part without what depends on arrays; None where nothing is left of it."""
    kind = conjunct.atom.kind
    if kind is AtomKind.ANY_OF:
        branches = [_known(branch, q_len, kv_len, left_out, negated=negated) for branch in conjunct.branches]
        known = [branch for branch in branches if branch.conjuncts()]
        return functools.reduce(operator.or_, known) if known else None
    if kind is AtomKind.NOT:
        (form,) = conjunct.atom.params
        inside = _known(_negated(conjunct), q_len, kv_len, left_out, negated=not negated)
        return ~inside if inside.conjuncts() or not form.atoms else None
    mask = conjunct.mask
    if not _is_known(conjunct):
        if kind is not AtomKind.PREFIX_LM or negated:
            left_out.append(kind.value)
            return None
        mask = Causal()  # which every prefix shows
    if PositionKind.TRACED in (conjunct.atom.query.kind, conjunct.atom.kv.kind):
        return mask.at(query_offset=kv_len - q_len, kv_offset=0)
    return At(mask, conjunct.query, conjunct.kv)


def _is_known(conjunct: Conjunct) -> bool:
    """Says whether a part depends on no array but its positions."""
    if conjunct.atom.kind is AtomKind.PREFIX_LM:
        return isinstance(conjunct.mask.prefix_lengths, np.ndarray)  # type: ignore[attr-defined]
    return dataclasses.replace(conjunct.atom, query=_HERE, kv=_HERE).is_static


_HERE = PositionForm()


def _rows(conjunct: Conjunct) -> int:
    """The batch rows that differ: those of static positions and of prefixes."""
    if conjunct.branches:
        return max(_rows(inside) for branch in conjunct.branches for inside in branch)
    if conjunct.atom.kind is AtomKind.NOT:
        return max([1, *(_rows(inside) for inside in _negated(conjunct))])
    forms = [len(form.value) for form in (conjunct.atom.query, conjunct.atom.kv) if isinstance(form.value, tuple)]
    own = conjunct.mask.prefix_lengths.size if isinstance(conjunct.mask, PrefixLM) else 1
    return max([own, *forms])


def _negated(conjunct: Conjunct) -> tuple[Conjunct, ...]:
    inside: tuple[Conjunct, ...] = conjunct.mask.mask.conjuncts()  # type: ignore[attr-defined]
    return inside


def _has_intervals(conjunct: Conjunct) -> bool:
    if conjunct.branches:
        return all(_has_intervals(inside) for branch in conjunct.branches for inside in branch)
    if conjunct.atom.kind is AtomKind.NOT:
        return all(map(_has_intervals, _negated(conjunct)))
    runs = conjunct.atom.kv.value
    few = not isinstance(runs, tuple) or max(map(len, runs)) <= _MOST_RUNS
    return few and isinstance(conjunct.mask, Band | Chunked | BlockCausal | PrefixLM)


def _count_row(conjuncts: tuple[Conjunct, ...], row: int, q_len: int, kv_len: int, most: int) -> np.ndarray:
    """Pairs, queries that see a key, and keys that are seen, of one batch row."""
    count = _of_intervals if all(map(_has_intervals, conjuncts)) else _of_booleans
    width = _MOST_INTERVALS if count is _of_intervals else max(kv_len, 1)
    step = max(1, _CHUNK // width)
    pairs = queries = 0
    keys = np.zeros(kv_len, bool)
    for start in range(0, q_len, step):
        slots = np.arange(start, min(start + step, q_len))
        visible, of_keys = count(conjuncts, row, slots, kv_len)
        pairs, queries = pairs + int(np.minimum(visible, most).sum()), queries + int((visible > 0).sum())
        keys |= of_keys
    return np.array([pairs, queries, min(int(keys.sum()), pairs)], float)


def _of_intervals(
    conjuncts: tuple[Conjunct, ...], row: int, slots: np.ndarray, kv_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many keys each query sees, [T], and which keys are seen, [S]."""
    low, high = _all_of(conjuncts, row, slots, kv_len)
    seen = low <= high
    ends: np.ndarray = np.bincount(low[seen], minlength=kv_len + 1) - np.bincount(high[seen] + 1, minlength=kv_len + 1)
    return np.where(seen, high - low + 1, 0).sum(axis=1), np.cumsum(ends)[:kv_len] > 0


def _of_booleans(
    conjuncts: tuple[Conjunct, ...], row: int, slots: np.ndarray, kv_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same, of masks that are evaluated."""
    query = Side.of_slots(Axis.QUERY, slots.astype(np.int32))
    visible: Any = np.ones((len(slots), kv_len), bool)
    with jax.ensure_compile_time_eval():  # a predicate may be written with jax.numpy
        for conjunct in conjuncts:
            part = np.asarray(conjunct.located_mask.evaluate(query, Side.kv(kv_len, np)))
            visible = visible & part[min(row, part.shape[0] - 1), 0]
    return visible.sum(axis=1), visible.any(axis=0)


def _all_of(conjuncts: Iterable[Conjunct], row: int, slots: np.ndarray, kv_len: int) -> Intervals:
    shown = np.zeros((len(slots), 1), np.int64), np.full((len(slots), 1), kv_len - 1, np.int64)
    for conjunct in conjuncts:
        shown = _both(shown, _of_conjunct(conjunct, row, slots, kv_len))
    return shown


def _of_conjunct(conjunct: Conjunct, row: int, slots: np.ndarray, kv_len: int) -> Intervals:
    if conjunct.branches:
        return _any_of([_all_of(branch, row, slots, kv_len) for branch in conjunct.branches])
    if conjunct.atom.kind is AtomKind.NOT:
        return _complement(_all_of(_negated(conjunct), row, slots, kv_len), kv_len)
    reached = _reached(conjunct.mask, row, _positions(conjunct.atom.query, row, slots))
    return _slots_of(reached, conjunct.atom.kv, row, kv_len)


def _reached(mask: Mask, row: int, positions: np.ndarray) -> tuple[Any, Any]:
    """The first and the last position that queries at these positions see."""
    match mask:
        case Band(left=left, right=right):
            first = -_FAR if left is None else positions - left
            return first, _FAR if right is None else positions + right
        case Chunked(size=size):
            return positions // size * size, positions
        case BlockCausal(size=size):
            return -_FAR, (positions // size + 1) * size - 1
    assert isinstance(mask, PrefixLM)
    lengths = np.ravel(mask.prefix_lengths)
    return -_FAR, np.maximum(positions, int(lengths[min(row, lengths.size - 1)]) - 1)


def _positions(form: PositionForm, row: int, slots: np.ndarray) -> np.ndarray:
    if form.start is not None:
        return slots + form.start
    found = form.positions(int(slots[-1]) + 1)
    assert found is not None
    of_row: np.ndarray = found[min(row, len(found) - 1), slots]
    return of_row


def _slots_of(reached: tuple[Any, Any], form: PositionForm, row: int, kv_len: int) -> Intervals:
    """The slots whose positions are reached, an interval for each run of positions."""
    runs = ((form.start, kv_len),) if form.start is not None else form.value[min(row, len(form.value) - 1)]  # type: ignore[index,arg-type]
    starts = np.array([first for first, _ in runs])
    counts = np.array([kv_len if count < 0 else count for _, count in runs])
    before = np.cumsum(counts) - counts
    first, last = (np.reshape(end, (-1, 1)) - starts for end in reached)
    low, high = before + np.maximum(first, 0), before + np.minimum(last, counts - 1)
    return np.broadcast_arrays(low, high)  # type: ignore[return-value]


def _both(one: Intervals, other: Intervals) -> Intervals:
    """The intersections of each interval with each."""
    low = np.maximum(one[0][:, :, None], other[0][:, None, :])
    high = np.minimum(one[1][:, :, None], other[1][:, None, :])
    low, high = low.reshape(len(low), -1), high.reshape(len(high), -1)
    some: Any = (low <= high).any(axis=0)
    some[0] = True
    return low[:, some], high[:, some]


def _any_of(branches: list[Intervals]) -> Intervals:
    """The union, in order and disjoint."""
    low, high = (np.concatenate(ends, axis=1) for ends in zip(*branches, strict=True))
    high = np.where(low > high, -1, high)  # an empty interval adds nothing
    order = np.argsort(low, axis=1, kind="stable")
    low, high = np.take_along_axis(low, order, axis=1), np.take_along_axis(high, order, axis=1)
    begin = _ends_before(high) + 1
    return np.where(high < 0, begin, np.maximum(low, begin)), high


def _ends_before(high: np.ndarray) -> np.ndarray:
    """The last slot of all intervals before each."""
    reached = np.maximum.accumulate(high, axis=1)
    return np.concatenate([np.full((len(high), 1), -1), reached[:, :-1]], axis=1)


def _complement(shown: Intervals, kv_len: int) -> Intervals:
    """What lies between the intervals."""
    low, high = _any_of([shown])
    end = np.full((len(low), 1), kv_len)
    first = np.concatenate([_ends_before(high), high.max(axis=1, keepdims=True)], axis=1) + 1
    return first, np.concatenate([low, end], axis=1) - 1
