"""What `&`, `|`, `~` and `.at` make of masks, and the sorted conjunction of atoms that any mask is.

Negation is pushed to the atoms (de Morgan), nested conjunctions and disjunctions are flattened, bands at the same
positions merge into one, and what others imply is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, final

import jax

from kernelry._pytree import pytree
from kernelry._values import SymbolicSize
from kernelry.masks.band import Band, Full, band_atom
from kernelry.masks.base import Mask, atom_of
from kernelry.masks.form import Atom, AtomKind, MaskForm, PositionForm
from kernelry.masks.positions import Positions, StaticOffset, TracedOffset, TracedPositions
from kernelry.masks.side import ArrayLike, Side


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Conjunct:
    """One atom of a conjunction with its array-carrying mask and its positions.

    Args:
      mask: the mask; of a disjunction or negation, at its positions already.
      atom: its static side.
      query, kv: where it stands; None is the default.
      key: equal for conjuncts that are certainly the same, arrays compared by identity.
      branches: of a disjunction, the conjunctions it chooses from.
    """

    mask: Mask
    atom: Atom
    query: Positions | None
    kv: Positions | None
    key: tuple[Any, ...]
    branches: tuple[tuple[Conjunct, ...], ...] = ()

    @property
    def places(self) -> tuple[Any, Any]:
        """Equal for atoms that certainly stand at the same positions."""
        return self.key[-2], self.key[-1]

    @property
    def located_mask(self) -> Mask:
        """The mask at its positions."""
        return self.mask if self.query is None and self.kv is None else At(self.mask, self.query, self.kv)


class _Composite(Mask, Protocol):
    """A mask made of others: it has a form, and no atom of its own."""

    __slots__ = ()

    @property
    def atom(self) -> Atom:
        raise TypeError(f"{type(self).__name__} is not an atom; use form")


@final
@pytree("mask", "query", "kv")
@dataclasses.dataclass(frozen=True, slots=True)
class At(_Composite):
    """A mask whose slots stand at given positions."""

    mask: Mask
    query: Positions | None
    kv: Positions | None

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return self.mask.evaluate(query.at(self.query), kv.at(self.kv))

    def __repr__(self) -> str:
        named = (("query", self.query), ("kv", self.kv))
        given = ", ".join(f"{side}_{where.word}={where}" for side, where in named if where is not None)
        inner = f"({self.mask!r})" if isinstance(self.mask, And | Or | Not) else repr(self.mask)
        return f"{inner}.at({given})"


@final
@pytree("parts")
@dataclasses.dataclass(frozen=True, slots=True)
class And(_Composite):
    """A key is visible where every part says so."""

    parts: tuple[Mask, ...]

    @classmethod
    def of(cls, *masks: Mask) -> And:
        """Composes masks; a part that is itself such a composite is flattened."""
        return cls(tuple(part for mask in masks for part in (mask.parts if isinstance(mask, And) else (mask,))))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return functools.reduce(operator.and_, (part.evaluate(query, kv) for part in self.parts))

    def __repr__(self) -> str:
        return " & ".join(f"({p!r})" if isinstance(p, Or) else repr(p) for p in self.parts)


@final
@pytree("parts")
@dataclasses.dataclass(frozen=True, slots=True)
class Or(_Composite):
    """A key is visible where any part says so."""

    parts: tuple[Mask, ...]

    @classmethod
    def of(cls, *masks: Mask) -> Or:
        """Composes masks; a part that is itself such a composite is flattened."""
        return cls(tuple(part for mask in masks for part in (mask.parts if isinstance(mask, Or) else (mask,))))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return functools.reduce(operator.or_, (part.evaluate(query, kv) for part in self.parts))

    def __repr__(self) -> str:
        return " | ".join(f"({p!r})" if isinstance(p, And) else repr(p) for p in self.parts)


@final
@pytree("mask")
@dataclasses.dataclass(frozen=True, slots=True)
class Not(_Composite):
    """A key is visible where the mask inside hides it."""

    mask: Mask

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return ~self.mask.evaluate(query, kv)

    def __invert__(self) -> Mask:
        return self.mask

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, And | Or | At) else f"~{self.mask!r}"


def children(mask: Mask) -> tuple[Mask, ...]:
    """The masks directly inside a composite; none for an atom."""
    if isinstance(mask, And | Or):
        return mask.parts
    return (mask.mask,) if isinstance(mask, Not | At) else ()


def walk(mask: Mask) -> Iterator[Mask]:
    """The mask, then all masks inside it."""
    yield mask
    for part in children(mask):
        yield from walk(part)


def is_positional(mask: Mask) -> bool:
    """True where some atom inside is a predicate over positions."""
    return any(part.positional for part in walk(mask))


Places = tuple[Positions | None, Positions | None]
"""Where the queries and the keys stand; None is the default."""

_NOTHING = Atom(AtomKind.NOT, (MaskForm(),))


def conjuncts_of(mask: Mask) -> tuple[Conjunct, ...]:
    """Returns the conjunction that a mask is, in canonical order."""
    return _conjunction(mask, (None, None), negated=False)


def canonical_of(mask: Mask) -> tuple[MaskForm, tuple[Mask, ...]]:
    """Returns a mask's form and, aligned with the form's atoms, the conjunction that it is."""
    if isinstance(mask, At | And | Or | Not | Full):
        conjuncts = conjuncts_of(mask)
        return MaskForm(tuple(c.atom for c in conjuncts)), tuple(c.located_mask for c in conjuncts)
    alone = mask.canonical_mask  # there is nothing to compare it with
    return MaskForm((_atom_at(alone, None, None),)), (alone,)


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
    mask = mask.canonical_mask
    query, kv = places if mask.positional else (None, None)
    query_read = query if mask.uses_query_positions else None
    atom = _atom_at(mask, query_read, kv)
    leaves, structure = jax.tree.flatten(mask)
    key = (structure, tuple(map(id, leaves)), _identity(query_read), _identity(kv))
    return Conjunct(mask, atom, query, kv, key)


def _atom_at(mask: Mask, query: Positions | None, kv: Positions | None) -> Atom:
    atom = atom_of(mask)
    return dataclasses.replace(atom, query=_position_form(query), kv=_position_form(kv)) if mask.positional else atom


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
        if not any(_all_implied(other, branch) for other in others):
            kept.append(branch)
    if len(kept) == 1:
        return kept[0]
    mask = Or(tuple(_joined(branch) for branch in kept))
    forms = tuple(sorted((MaskForm(tuple(c.atom for c in branch)) for branch in kept), key=repr))
    key = ("or", frozenset(frozenset(c.key for c in branch) for branch in kept))
    return (Conjunct(mask, Atom(AtomKind.ANY_OF, forms), None, None, key, tuple(kept)),)


def _all_implied(conjuncts: Iterable[Conjunct], others: tuple[Conjunct, ...]) -> bool:
    return all(_is_implied(conjunct, others) for conjunct in conjuncts)


def _is_implied(conjunct: Conjunct, others: tuple[Conjunct, ...]) -> bool:
    """True where the others together certainly hide all that the conjunct hides.

    A disjunction follows where all of some branch does.
    """
    if any(_implies(other, conjunct) for other in others):
        return True
    return any(_all_implied(branch, others) for branch in conjunct.branches)


def _implies(first: Conjunct, second: Conjunct) -> bool:
    if first.key == second.key:
        return True
    if not (first.mask.positional and second.mask.positional and first.places == second.places):
        return False
    return second.atom.mask_class.follows_from(second.atom, first.atom)


def _joined(branch: tuple[Conjunct, ...]) -> Mask:
    masks = tuple(conjunct.located_mask for conjunct in branch)
    return masks[0] if len(masks) == 1 else And(masks)


def _reduced(conjuncts: Iterable[Conjunct]) -> tuple[Conjunct, ...]:
    """Merges bands, then leaves out what the others imply; of equal ones the last stays."""
    found = _with_merged_bands(conjuncts)
    kept: list[Conjunct] = []
    for place, conjunct in enumerate(found):
        if not _is_implied(conjunct, (*kept, *found[place + 1 :])):
            kept.append(conjunct)
    return tuple(sorted(kept, key=lambda conjunct: conjunct.atom.sort_key))


def _with_merged_bands(conjuncts: Iterable[Conjunct]) -> list[Conjunct]:
    """One band for each pair of places, no wider than the other masks there let it be seen."""
    bands: dict[Any, Conjunct] = {}
    others: list[Conjunct] = []
    for conjunct in conjuncts:
        if not isinstance(conjunct.mask, Band):
            others.append(conjunct)
            continue
        where = conjunct.places
        bands[where] = _narrower(bands[where], conjunct.mask) if where in bands else conjunct
    for other in others if bands else ():
        around = other.atom.mask_class.band_around(other.atom)
        if around != (None, None) and other.places in bands:
            bands[other.places] = _narrower(bands[other.places], Band(*around))
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


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Visibility:
    """Whether some query row may see no key, and whether some key may be seen by no row."""

    empty_rows: bool
    hidden_slots: bool


@functools.lru_cache(maxsize=512)
def visibility_of(form: MaskForm, q_len: int, kv_len: int) -> Visibility:
    """Exact for one band of static positions; else it claims only what is certain."""
    if not form.atoms:
        return Visibility(empty_rows=kv_len == 0, hidden_slots=q_len == 0)
    first = form.atoms[0]
    symbolic = isinstance(q_len, SymbolicSize) or isinstance(kv_len, SymbolicSize)
    if len(form.atoms) == 1 and not symbolic:
        alone = first.mask_class.visibility(first, q_len, kv_len)
        if alone is not None:
            return alone
    if not all(_is_on_diagonal(atom, first) for atom in form.atoms):
        return Visibility(empty_rows=True, hidden_slots=True)
    if symbolic:
        start = first.query.start
        certain = q_len == kv_len and start is not None and start == first.kv.start
        return Visibility(empty_rows=not certain, hidden_slots=not certain)
    return _of_diagonal(first, q_len, kv_len)


def _is_on_diagonal(atom: Atom, first: Atom) -> bool:
    return (atom.query, atom.kv) == (first.query, first.kv) and atom.mask_class.sees_itself(atom)


def _of_diagonal(atom: Atom, q_len: int, kv_len: int) -> Visibility:
    """A row whose position is some key's sees at least that key, and the other way round."""
    query, kv = atom.query.start, atom.kv.start
    if query is None or kv is None:
        return Visibility(empty_rows=True, hidden_slots=True)
    rows_inside = kv <= query and query + q_len <= kv + kv_len
    slots_inside = query <= kv and kv + kv_len <= query + q_len
    return Visibility(empty_rows=q_len > 0 and not rows_inside, hidden_slots=kv_len > 0 and not slots_inside)
