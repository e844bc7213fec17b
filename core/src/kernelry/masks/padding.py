"""Masks for calls that are lengthened: slots put behind the queries and the keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import final

import jax

from kernelry._pytree import pytree
from kernelry.errors import PluginError
from kernelry.masks.arrays import module_of
from kernelry.masks.base import Mask, atom_of
from kernelry.masks.composition import And, At, Not, Or
from kernelry.masks.form import OPERANDS, Atom, AtomKind, MaskForm, PositionForm
from kernelry.masks.positions import Positions
from kernelry.masks.side import ArrayLike, Side


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Padding:
    """How much longer a call becomes.

    Args:
      q_len, kv_len: T and S of before.
      more_queries, more_keys: the slots put behind each.
      hide_rows: whether the mask must hide everything from the queries put behind, if it can.
    """

    q_len: int
    kv_len: int
    more_queries: int
    more_keys: int
    hide_rows: bool = False

    @property
    def parts_ids(self) -> bool:
        """Whether queries and keys can no longer share one array."""
        return self.more_queries != self.more_keys


@final
@pytree("mask")
@dataclasses.dataclass(frozen=True, slots=True)
class Padded(Mask):
    """Any mask, asked only about the slots of before: those put behind see nothing and are seen by nothing.

    Args:
      mask: the mask.
      q_len, kv_len: T and S of before.
    """

    mask: Mask
    q_len: int
    kv_len: int

    word = "kernelry.padded"

    @classmethod
    def around(cls, mask: Mask, padding: Padding) -> Mask:
        """The mask itself where its answers need no arrays.

        Raises:
          PluginError: it has arrays, and says by its atom that it is a mask of core.
        """
        atom = atom_of(mask)
        if atom.kind not in (AtomKind.CUSTOM, AtomKind.PREDICATE) and jax.tree.leaves(mask):
            name = type(mask).__name__
            raise PluginError(
                f"mask={mask!r} has arrays that only {name} can pad: "
                f"the kind of its atom should be AtomKind.CUSTOM, or {name} should define padded()."
            )
        return cls(mask, padding.q_len, padding.kv_len) if OPERANDS in atom.params else mask

    @classmethod
    def atom_around(cls, atom: Atom) -> Atom:
        """The atom of a padded mask, at the positions of its mask's atom."""
        inside = str(dataclasses.replace(atom, query=PositionForm(), kv=PositionForm()))
        return dataclasses.replace(atom, kind=AtomKind.CUSTOM, params=(cls.word, inside, OPERANDS))

    @property
    def atom(self) -> Atom:
        return self.atom_around(atom_of(self.mask))

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.mask.positional

    @property
    def uses_query_positions(self) -> bool:  # type: ignore[override]
        return self.mask.uses_query_positions

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        sides = query.first(self.q_len), kv.first(self.kv_len)
        visible = self.mask.evaluate(*sides)
        xp = module_of(visible, query.slots)
        whole = xp.broadcast_to(visible, (*visible.shape[:-2], *(side.slots.shape[side.axis.value] for side in sides)))
        lengths = (side.slots.shape[side.axis.value] for side in (query, kv))
        more = [(0, length - had) for length, had in zip(lengths, whole.shape[-2:], strict=True)]
        padded = xp.pad(whole, [*[(0, 0)] * (whole.ndim - 2), *more])
        return padded & (query.slots < self.q_len) & (kv.slots < self.kv_len)

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        return True

    @classmethod
    def hides_rows_behind(cls, atom: Atom) -> bool:
        return True


def padded_atom(atom: Atom, padding: Padding) -> Atom:
    """The static side of `padded_mask`."""
    if atom.kind in (AtomKind.ANY_OF, AtomKind.NOT):
        inside = dataclasses.replace(padding, hide_rows=False)
        forms = (form_of(padded_atom(part, inside) for part in form.atoms) for form in atom.params)
        return Atom(atom.kind, tuple(sorted(forms, key=repr)))
    query, kv = atom.query.lengthened(padding.more_queries), atom.kv.lengthened(padding.more_keys)
    return dataclasses.replace(atom.mask_class.padded_atom(atom, padding), query=query, kv=kv)


def padded_mask(mask: Mask, padding: Padding) -> Mask:
    """Puts slots behind the arrays of a mask: new ones are hidden where the mask says something of each slot.

    Raises:
      PluginError: a mask of a third party has arrays, and its atom is not CUSTOM.
    """
    inside = dataclasses.replace(padding, hide_rows=False)
    match mask:
        case At(mask=placed, query=query, kv=kv):
            places = _padded_places(query, padding.more_queries), _padded_places(kv, padding.more_keys)
            return At(padded_mask(placed, padding), *places)
        case And(parts=parts):
            return And(tuple(padded_mask(part, inside) for part in parts))
        case Or(parts=parts):
            return Or(tuple(padded_mask(part, inside) for part in parts))
        case Not(mask=negated):
            return Not(padded_mask(negated, inside))
    return mask.padded(padding)


def _padded_places(where: Positions | None, more: int) -> Positions | None:
    return None if where is None else where.lengthened(more)


def form_of(atoms: Iterable[Atom]) -> MaskForm:
    """Sorts atoms into a form."""
    return MaskForm(tuple(sorted(atoms, key=lambda atom: atom.sort_key)))
