"""What adapters do with masks: evaluate a conjunction, keep it sorted, lengthen it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from kernelry.errors import PluginError
from kernelry.masks.arrays import module_of, with_rank_4
from kernelry.masks.base import And, At, Mask, Not, Or, children
from kernelry.masks.form import OPEN_RUN, Atom, AtomKind, MaskForm, PositionForm, PositionKind, Runs
from kernelry.masks.indexed import BidirectionalSpans, Dense, Segments
from kernelry.masks.positions import Positions, StaticPositions, TracedPositions
from kernelry.masks.selection import BlockSelection
from kernelry.masks.side import ArrayLike, Side
from kernelry.request.request import Request

SEPARATE = {AtomKind.SEGMENTS: AtomKind.SEGMENTS_SEPARATE, AtomKind.SPANS: AtomKind.SPANS_SEPARATE}
"""What a mask of one array of ids becomes when queries and keys no longer share it."""


def visible_of(masks: Iterable[Mask], request: Request) -> Bool[Array, "#B #N #T #S"]:
    """Evaluates a conjunction, heads as the queries'."""
    query, kv = Side.query(request.q_len, q_heads=request.q_heads), Side.kv(request.kv_len)
    visible = jnp.ones((1, 1, 1, 1), bool)
    for mask in masks:
        visible = visible & mask.evaluate(query, kv)
    return visible


def form_of(atoms: Iterable[Atom]) -> MaskForm:
    """Sorts atoms into a form."""
    return MaskForm(tuple(sorted(atoms, key=lambda atom: atom.sort_key)))


def aligned(pairs: Iterable[tuple[Atom, Mask]]) -> tuple[Mask, ...]:
    """Sorts masks as `form_of` sorts their atoms."""
    return tuple(mask for _, mask in sorted(pairs, key=lambda pair: pair[0].sort_key))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Growth:
    """How much longer a call becomes: T and S of before, and the slots put behind each."""

    q_len: int
    kv_len: int
    more_queries: int
    more_keys: int

    @classmethod
    def between(cls, before: Request, after: Request) -> Growth:
        """The growth from one request to another."""
        return cls(before.q_len, before.kv_len, after.q_len - before.q_len, after.kv_len - before.kv_len)

    @property
    def parts_ids(self) -> bool:
        """Whether queries and keys can no longer share one array."""
        return self.more_queries != self.more_keys


def grown_atom(atom: Atom, growth: Growth) -> Atom | None:
    """The static side of `grown_mask`; None where the arrays inside are unknown."""
    if atom.kind is AtomKind.CUSTOM or (atom.kind is AtomKind.PREDICATE and len(atom.params) > 1):
        return None
    if atom.kind in (AtomKind.ANY_OF, AtomKind.NOT):
        forms = [_grown_form(form, growth) for form in atom.params]
        known = [form for form in forms if form is not None]
        return Atom(atom.kind, tuple(sorted(known, key=repr))) if len(known) == len(forms) else None
    kind = SEPARATE.get(atom.kind, atom.kind) if growth.parts_ids else atom.kind
    query = _grown_places(atom.query, growth.more_queries)
    return dataclasses.replace(atom, kind=kind, query=query, kv=_grown_places(atom.kv, growth.more_keys))


def _grown_form(form: MaskForm, growth: Growth) -> MaskForm | None:
    atoms = [grown_atom(atom, growth) for atom in form.atoms]
    known = [atom for atom in atoms if atom is not None]
    return form_of(known) if len(known) == len(atoms) else None


def _grown_places(places: PositionForm, more: int) -> PositionForm:
    if places.kind is not PositionKind.STATIC:
        return places
    assert isinstance(places.value, tuple)
    return PositionForm(PositionKind.STATIC, _grown_runs(places.value, more))


def _grown_runs(runs: Runs, more: int) -> Runs:
    return tuple(_grown_run(row, more) for row in runs) if more else runs


def _grown_run(row: tuple[tuple[int, int], ...], more: int) -> tuple[tuple[int, int], ...]:
    if not row:
        return ((0, more),)
    first, count = row[-1]
    return row if count == OPEN_RUN else (*row[:-1], (first, count + more))


def grown_mask(mask: Mask, growth: Growth) -> Mask:
    """Lengthens the arrays of a mask: the new slots have id −1 and are hidden where a Dense has an entry for them.

    Raises:
      PluginError: a mask of an unknown class has arrays, and says by its atom that it is no CUSTOM one.
    """
    match mask:
        case At(mask=inside, query=query, kv=kv):
            places = _grown_positions(query, growth.more_queries), _grown_positions(kv, growth.more_keys)
            return At(grown_mask(inside, growth), *places)
        case And(parts=parts):
            return And(tuple(grown_mask(part, growth) for part in parts))
        case Or(parts=parts):
            return Or(tuple(grown_mask(part, growth) for part in parts))
        case Not(mask=inside):
            return Not(grown_mask(inside, growth))
        case Segments(query_ids=ids, kv_ids=kv_ids):
            return Segments(*_grown_ids(ids, kv_ids, growth))
        case BidirectionalSpans(query_spans=ids, kv_spans=kv_ids):
            return BidirectionalSpans(*_grown_ids(ids, kv_ids, growth))
        case Dense(visible=visible):
            rows = padded(with_rank_4(visible), 2, growth.more_queries)
            return Dense(padded(rows, 3, growth.more_keys))
        case BlockSelection(keep=keep, block_size=size):
            return BlockSelection(padded(with_rank_4(keep), 2, growth.more_queries), size)
    _check_known(mask)
    return mask


_KNOWN = "kernelry.masks."


def _check_known(mask: Mask) -> None:
    if not type(mask).__module__.startswith(_KNOWN) and jax.tree.leaves(mask) and not children(mask):
        raise PluginError(
            f"mask={mask!r} has arrays that nobody but {type(mask).__name__} can lengthen; "
            "its atom should be AtomKind.CUSTOM."
        )


def _grown_positions(where: Positions | None, more: int) -> Positions | None:
    if isinstance(where, StaticPositions):
        return StaticPositions(_grown_runs(where.runs, more))
    if isinstance(where, TracedPositions) and more:
        widths = [(0, 0)] * (where.value.ndim - 1) + [(0, more)]
        mode = "edge" if where.value.shape[-1] else "constant"
        return TracedPositions(jnp.pad(where.value, widths, mode=mode))
    return where


def _grown_ids(ids: ArrayLike, kv_ids: ArrayLike | None, growth: Growth) -> tuple[ArrayLike, ArrayLike | None]:
    if kv_ids is None and not growth.parts_ids:
        return grown_ids(ids, growth.more_queries), None
    return grown_ids(ids, growth.more_queries), grown_ids(ids if kv_ids is None else kv_ids, growth.more_keys)


def grown_ids(ids: ArrayLike, more: int) -> ArrayLike:
    """Puts ids of −1, which see nothing, behind ids [B, L] or [L]."""
    xp = module_of(ids)
    widths = [(0, 0)] * (ids.ndim - 1) + [(0, more)]
    return xp.pad(signed(ids), widths, constant_values=-1) if more else ids


def signed(ids: ArrayLike) -> ArrayLike:
    """Ids of a type that has room for −1."""
    return ids.astype(jax.dtypes.canonicalize_dtype(jnp.promote_types(ids.dtype, jnp.int32)))


def padded(array: ArrayLike, axis: int, more: int) -> ArrayLike:
    """Puts `more` zeros behind an axis, unless it is 1 and holds for every slot."""
    if not more or array.shape[axis] == 1:
        return array
    widths = [(0, more if place == axis else 0) for place in range(array.ndim)]
    return module_of(array).pad(array, widths)
