"""Writes a mask as a sorted conjunction of atoms.

Negation is pushed to the atoms (de Morgan), nested conjunctions and disjunctions are flattened,
bands at the same positions merge into one, and what others imply is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from kernelry.masks.band import Band, Causal, Full, SlidingWindow, band_atom
from kernelry.masks.base import And, At, Conjunct, Mask, Not, Or
from kernelry.masks.chunked import Chunked
from kernelry.masks.form import Atom, AtomKind, MaskForm, PositionForm
from kernelry.masks.implication import implied
from kernelry.masks.positions import Positions, StaticOffset, TracedOffset, TracedPositions

Places = tuple[Positions | None, Positions | None]
"""Where the queries and the keys stand; None is the default."""

_NOTHING = Atom(AtomKind.NOT, (MaskForm(),))


def conjuncts_of(mask: Mask) -> tuple[Conjunct, ...]:
    """Returns the conjunction that a mask is, in canonical order."""
    return _conjunction(mask, (None, None), negated=False)


def _conjunction(mask: Mask, places: Places, *, negated: bool) -> tuple[Conjunct, ...]:
    match mask:
        case At(mask=inside, query=query, kv=kv):
            inner = (places[0] if query is None else query, places[1] if kv is None else kv)
            return _conjunction(inside, inner, negated=negated)
        case Not(mask=inside):
            return _conjunction(inside, places, negated=not negated)
        case And(parts=parts) if not negated:
            return _reduced(c for part in parts for c in _conjunction(part, places, negated=False))
        case Or(parts=parts) if negated:
            return _reduced(c for part in parts for c in _conjunction(part, places, negated=True))
        case And(parts=parts) | Or(parts=parts):
            return _disjunction([_conjunction(part, places, negated=negated) for part in parts])
        case Full():
            return (Conjunct(Not(mask), _NOTHING, None, None, ("nothing",)),) if negated else ()
    conjunct = _of_atom(mask, places)
    return (_negation(conjunct),) if negated else (conjunct,)


def _of_atom(mask: Mask, places: Places) -> Conjunct:
    mask = _as_band(mask)
    query, kv = places if mask.positional else (None, None)
    query_read = query if mask.uses_query_positions else None
    atom = mask.atom
    if mask.positional:
        atom = dataclasses.replace(atom, query=_position_form(query_read), kv=_position_form(kv))
    leaves, structure = jax.tree.flatten(mask)
    key = (structure, tuple(map(id, leaves)), _identity(query_read), _identity(kv))
    return Conjunct(mask, atom, query, kv, key)


def _as_band(mask: Mask) -> Mask:
    if isinstance(mask, Causal):
        return Band(None, 0)
    if isinstance(mask, SlidingWindow):
        return Band(mask.left, mask.right)
    return mask


def _negation(conjunct: Conjunct) -> Conjunct:
    atom = Atom(AtomKind.NOT, (MaskForm((conjunct.atom,)),))
    return Conjunct(Not(conjunct.located_mask), atom, None, None, ("not", conjunct.key))


def _disjunction(branches: list[tuple[Conjunct, ...]]) -> tuple[Conjunct, ...]:
    found: list[tuple[Conjunct, ...]] = []
    for branch in branches:
        nested = branch[0].branches if len(branch) == 1 else ()
        found.extend(nested or (branch,))
    kept: list[tuple[Conjunct, ...]] = []
    for place, branch in enumerate(found):
        others = (*kept, *found[place + 1 :])
        if not any(_implies_all(branch, other) for other in others):
            kept.append(branch)
    if len(kept) == 1:
        return kept[0]
    mask = Or(tuple(_joined(branch) for branch in kept))
    forms = tuple(sorted((MaskForm(tuple(c.atom for c in branch)) for branch in kept), key=repr))
    key = ("or", frozenset(frozenset(c.key for c in branch) for branch in kept))
    return (Conjunct(mask, Atom(AtomKind.ANY_OF, forms), None, None, key, tuple(kept)),)


def _implies_all(branch: tuple[Conjunct, ...], other: tuple[Conjunct, ...]) -> bool:
    return all(implied(conjunct, branch) for conjunct in other)


def _joined(branch: tuple[Conjunct, ...]) -> Mask:
    masks = tuple(conjunct.located_mask for conjunct in branch)
    return masks[0] if len(masks) == 1 else And(masks)


def _reduced(conjuncts: Iterable[Conjunct]) -> tuple[Conjunct, ...]:
    """Merges bands, then leaves out what the others imply; of equal ones the last stays."""
    found = _with_merged_bands(conjuncts)
    kept: list[Conjunct] = []
    for place, conjunct in enumerate(found):
        if not implied(conjunct, (*kept, *found[place + 1 :])):
            kept.append(conjunct)
    return tuple(sorted(kept, key=lambda conjunct: conjunct.atom.sort_key))


def _with_merged_bands(conjuncts: Iterable[Conjunct]) -> list[Conjunct]:
    """One band for each pair of places, no wider than the chunks there let it be seen."""
    bands: dict[Any, Conjunct] = {}
    chunks: dict[Any, int] = {}
    others: list[Conjunct] = []
    for conjunct in conjuncts:
        if isinstance(conjunct.mask, Band):
            where = conjunct.places
            bands[where] = _narrower(bands[where], conjunct.mask) if where in bands else conjunct
            continue
        if isinstance(conjunct.mask, Chunked):
            chunks[conjunct.places] = min(conjunct.mask.size, chunks.get(conjunct.places, conjunct.mask.size))
        others.append(conjunct)
    for where, size in chunks.items():
        if where in bands:
            bands[where] = _narrower(bands[where], Band(size - 1, 0))
    return [*bands.values(), *others]


def _narrower(conjunct: Conjunct, other: Band) -> Conjunct:
    assert isinstance(conjunct.mask, Band)
    band = Band(_least(conjunct.mask.left, other.left), _least(conjunct.mask.right, other.right))
    atom = dataclasses.replace(band_atom(band.left, band.right), query=conjunct.atom.query, kv=conjunct.atom.kv)
    key = (jax.tree.structure(band), (), *conjunct.places)
    return Conjunct(band, atom, conjunct.query, conjunct.kv, key)


def _least(first: int | None, second: int | None) -> int | None:
    bounds = [bound for bound in (first, second) if bound is not None]
    return min(bounds) if bounds else None


def _position_form(where: Positions | None) -> PositionForm:
    return PositionForm() if where is None else where.form


def _identity(where: Positions | None) -> Any:
    """Equal for positions that are certainly the same: static ones by value, arrays by identity."""
    if where == StaticOffset(0):
        return None
    return id(where.value) if isinstance(where, TracedOffset | TracedPositions) else where
