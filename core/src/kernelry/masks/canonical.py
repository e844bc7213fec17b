"""Writes a mask as a sorted conjunction of atoms, with bands at the same positions merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kernelry.masks.band import Band, Causal, Full, SlidingWindow, band_atom
from kernelry.masks.base import And, At, Conjunct, Mask, Not, Or
from kernelry.masks.form import Atom, AtomKind, MaskForm, PositionForm
from kernelry.masks.positions import Positions, StaticOffset, TracedOffset, TracedPositions


def conjuncts_of(mask: Mask) -> tuple[Conjunct, ...]:
    """Returns the conjunction that a mask is, in canonical order."""
    bands: dict[tuple[Any, Any], Conjunct] = {}
    others: list[Conjunct] = []
    for conjunct in _flatten(mask, None, None):
        if not isinstance(conjunct.mask, Band):
            others.append(conjunct)
            continue
        where = (_identity(conjunct.query), _identity(conjunct.kv))
        bands[where] = _narrower(bands[where], conjunct) if where in bands else conjunct
    return tuple(sorted((*bands.values(), *others), key=lambda conjunct: conjunct.atom.sort_key))


def _flatten(mask: Mask, query: Positions | None, kv: Positions | None) -> Iterator[Conjunct]:
    if isinstance(mask, And):
        for part in mask.parts:
            yield from _flatten(part, query, kv)
        return
    if isinstance(mask, At):
        yield from _flatten(
            mask.mask, mask.query if mask.query is not None else query, mask.kv if mask.kv is not None else kv
        )
        return
    if isinstance(mask, Full):
        return
    atomic = _as_band(mask)
    yield Conjunct(atomic, _atom_of(atomic, query, kv), query, kv)


def _as_band(mask: Mask) -> Mask:
    if isinstance(mask, Causal):
        return Band(None, 0)
    if isinstance(mask, SlidingWindow):
        return Band(mask.left, mask.right)
    return mask


def _atom_of(mask: Mask, query: Positions | None, kv: Positions | None) -> Atom:
    if isinstance(mask, Or):
        forms = sorted((_form_at(part, query, kv) for part in mask.parts), key=repr)
        return Atom(AtomKind.ANY_OF, tuple(dict.fromkeys(forms)))
    if isinstance(mask, Not):
        return Atom(AtomKind.NOT, (_form_at(mask.mask, query, kv),))
    if not mask.positional:
        return mask.atom
    return dataclasses.replace(mask.atom, query=_position_form(query), kv=_position_form(kv))


def _form_at(mask: Mask, query: Positions | None, kv: Positions | None) -> MaskForm:
    return At(mask, query, kv).form


def _position_form(where: Positions | None) -> PositionForm:
    return PositionForm() if where is None else where.form


def _identity(where: Positions | None) -> Any:
    """Equal for positions that are certainly the same: static ones by value, arrays by identity."""
    if where == StaticOffset(0):
        return None
    return id(where.value) if isinstance(where, TracedOffset | TracedPositions) else where


def _narrower(first: Conjunct, second: Conjunct) -> Conjunct:
    assert isinstance(first.mask, Band)
    assert isinstance(second.mask, Band)
    band = Band(_least(first.mask.left, second.mask.left), _least(first.mask.right, second.mask.right))
    atom = dataclasses.replace(band_atom(band.left, band.right), query=first.atom.query, kv=first.atom.kv)
    return Conjunct(band, atom, first.query, first.kv)


def _least(first: int | None, second: int | None) -> int | None:
    bounds = [bound for bound in (first, second) if bound is not None]
    return min(bounds) if bounds else None
