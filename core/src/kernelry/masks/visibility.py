"""What a form alone says about rows that see nothing and slots that nobody sees."""

from __future__ import annotations

import dataclasses
import functools
from typing import final

import numpy as np

from kernelry._values import SymbolicSize
from kernelry.masks.form import Atom, AtomKind, MaskForm

_REFLEXIVE = frozenset({AtomKind.CHUNKED, AtomKind.BLOCK_CAUSAL, AtomKind.PREFIX_LM})


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Visibility:
    """Whether some query row may see no key, and whether some key may be seen by no row."""

    empty_rows: bool
    hidden_slots: bool


def visibility_of(form: MaskForm, q_len: int, kv_len: int) -> Visibility:
    """Exact for one band of static positions; else it claims only what is certain."""
    if not form.atoms:
        return Visibility(empty_rows=kv_len == 0, hidden_slots=q_len == 0)
    first = form.atoms[0]
    if isinstance(q_len, SymbolicSize) or isinstance(kv_len, SymbolicSize):
        aligned = q_len == kv_len and first.query.start == first.kv.start and first.kv.start is not None
        certain = aligned and all(_sees_its_own_position(atom) and _same_places(atom, first) for atom in form.atoms)
        return Visibility(empty_rows=not certain, hidden_slots=not certain)
    if len(form.atoms) == 1 and first.is_band and first.is_static:
        return _of_band(first, q_len, kv_len)
    if all(_sees_its_own_position(atom) and _same_places(atom, first) for atom in form.atoms):
        return _of_diagonal(first, q_len, kv_len)
    return Visibility(empty_rows=True, hidden_slots=True)


def _sees_its_own_position(atom: Atom) -> bool:
    if atom.is_band:
        return all(bound is None or bound >= 0 for bound in atom.params)
    return atom.kind in _REFLEXIVE


def _same_places(one: Atom, other: Atom) -> bool:
    return (one.query, one.kv) == (other.query, other.kv)


def _of_diagonal(atom: Atom, q_len: int, kv_len: int) -> Visibility:
    """A row whose position is some key's sees at least that key, and the other way round."""
    query, kv = atom.query.start, atom.kv.start
    if query is None or kv is None:
        return Visibility(empty_rows=True, hidden_slots=True)
    rows_inside = kv <= query and query + q_len <= kv + kv_len
    slots_inside = query <= kv and kv + kv_len <= query + q_len
    return Visibility(empty_rows=q_len > 0 and not rows_inside, hidden_slots=kv_len > 0 and not slots_inside)


@functools.lru_cache(maxsize=512)
def _of_band(atom: Atom, q_len: int, kv_len: int) -> Visibility:
    left, right = atom.params
    if atom.query.start is not None and atom.kv.start is not None:
        queries, slots = (atom.query.start, q_len), (atom.kv.start, kv_len)
        return Visibility(not _all_see(queries, slots, left, right), not _all_see(slots, queries, right, left))
    query, kv = atom.query.positions(q_len), atom.kv.positions(kv_len)
    assert query is not None
    assert kv is not None
    rows = max(len(query), len(kv))
    pairs = list(zip(np.broadcast_to(query, (rows, q_len)), np.broadcast_to(kv, (rows, kv_len)), strict=True))
    empty = any(not _sees_any(q, k, left, right).all() for q, k in pairs)
    hidden = any(not _sees_any(k, q, right, left).all() for q, k in pairs)
    return Visibility(empty, hidden)


def _all_see(own: tuple[int, int], other: tuple[int, int], below: int | None, above: int | None) -> bool:
    """Says whether every position p of a run (first, count) has one of `other` in [p − below, p + above]."""
    (first, count), (other_first, other_count) = own, other
    if count == 0 or other_count == 0:
        return count == 0
    last, other_last = first + count - 1, other_first + other_count - 1
    return (below is None or last - below <= other_last) and (above is None or first + above >= other_first)


def _sees_any(own: np.ndarray, other: np.ndarray, below: int | None, above: int | None) -> np.ndarray:
    """Says for each own position p whether `other` has one in [p − below, p + above]."""
    ordered = np.sort(other)
    first = 0 if below is None else np.searchsorted(ordered, own - below, side="left")
    last = len(ordered) if above is None else np.searchsorted(ordered, own + above, side="right")
    return np.broadcast_to(np.asarray(last > first), own.shape)
