"""Which conjuncts follow from others, where that can be decided without arrays."""

from __future__ import annotations

from collections.abc import Iterable

from kernelry.masks.base import Conjunct
from kernelry.masks.form import Atom, AtomKind


def implied(conjunct: Conjunct, others: Iterable[Conjunct]) -> bool:
    """True where the others together certainly hide all that the conjunct hides.

    A disjunction follows where all of some branch does.
    """
    others = tuple(others)
    if any(_implies(other, conjunct) for other in others):
        return True
    return any(all(implied(inside, others) for inside in branch) for branch in conjunct.branches)


def _implies(first: Conjunct, second: Conjunct) -> bool:
    if first.key == second.key:
        return True
    positional = first.mask.positional and second.mask.positional
    return positional and first.places == second.places and _follows(first.atom, second.atom)


def _follows(first: Atom, second: Atom) -> bool:
    """Says whether every pair of positions that `first` shows is shown by `second`, too."""
    if second.is_band:
        return _within(_band_around(first), second.params)
    if second.kind is AtomKind.CHUNKED:
        return first.kind is AtomKind.CHUNKED and second.params[0] % first.params[0] == 0
    if second.kind is AtomKind.BLOCK_CAUSAL:
        finer = first.kind is AtomKind.BLOCK_CAUSAL and second.params[0] % first.params[0] == 0
        return finer or _looks_back_only(first)
    return second.kind is AtomKind.PREFIX_LM and _looks_back_only(first)


def _band_around(atom: Atom) -> tuple[int | None, int | None]:
    """The narrowest band (left, right) that holds what the atom shows; None is unbounded."""
    if atom.is_band:
        left, right = atom.params
        return left, right
    return (atom.params[0] - 1, 0) if atom.kind is AtomKind.CHUNKED else (None, None)


def _within(inner: tuple[int | None, int | None], outer: tuple[int | None, ...]) -> bool:
    return all(
        wide is None or (narrow is not None and narrow <= wide) for narrow, wide in zip(inner, outer, strict=True)
    )


def _looks_back_only(atom: Atom) -> bool:
    right = _band_around(atom)[1]
    return right is not None and right <= 0
