"""Masks of which each device has a part: what their arrays are cut along, and what the parts say of a pair of shards.

A mask goes three steps: `Mask.spread` gives every array that queries and keys share one for each side, and makes arrays
of static positions; the arrays are cut along the letters of `leaf_axes`; `Mask.within` makes of the parts the mask over
the slots of one pair of shards.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import title_of
from kernelry.errors import PluginError, ShapeError
from kernelry.masks.base import Mask
from kernelry.masks.composition import And, At, Not, Or, is_positional
from kernelry.masks.form import OPERANDS, Atom, AtomKind, MaskForm, PositionForm, PositionKind
from kernelry.masks.padding import form_of
from kernelry.masks.positions import (
    Positions,
    StaticOffset,
    StaticOffsets,
    StaticPositions,
    TracedOffset,
    TracedPositions,
)
from kernelry.masks.predicate import Predicate

_DEFAULT, _TRACED = PositionForm(), PositionForm(PositionKind.TRACED)


def with_traced_positions(cls: type[Mask], atom: Atom) -> Atom:
    """The atom at positions that only the running program knows, as far as its class reads them."""
    if atom.kind in (AtomKind.ANY_OF, AtomKind.NOT):
        forms = (form_of(part.mask_class.spread_atom(part) for part in form.atoms) for form in atom.params)
        return Atom(atom.kind, tuple(sorted(forms, key=repr)))
    if not cls.positional:
        return atom
    return dataclasses.replace(atom, query=_TRACED if cls.uses_query_positions else _DEFAULT, kv=_TRACED)


def spread_in_order(mask: Mask, tokens: tuple[np.ndarray, np.ndarray] | None) -> Mask:
    """`Mask.spread`, with arrays in place of default positions, as an offset of 0 is.

    Args:
      mask: a canonical mask over the whole call.
      tokens: the positions that default ones mean, [T] and [S], as `ShardGrid.tokens` has them; None is the slots.
    """
    if tokens is None or not is_positional(mask):
        return mask.spread()
    query, kv = (TracedPositions(jnp.asarray(side, jnp.int32)) for side in tokens)
    return _in_order(mask.spread(), query, kv)


def _in_order(mask: Mask, query: Positions, kv: Positions) -> Mask:
    match mask:
        case At(mask=inside, query=own, kv=other):
            default = (None, StaticOffset(0))
            return At(inside, query if own in default else own, kv if other in default else other)
        case And(parts=parts):
            return And(tuple(_in_order(part, query, kv) for part in parts))
        case Or(parts=parts):
            return Or(tuple(_in_order(part, query, kv) for part in parts))
        case Not(mask=inside):
            return Not(_in_order(inside, query, kv))
    return At(mask, query, kv) if mask.positional else mask


def spread_inside(mask: Mask) -> Mask:
    """`Mask.spread` of a composite; an atom stays as it is."""
    match mask:
        case At(mask=inside, query=query, kv=kv):
            return At(inside.spread(), _spread_positions(query), _spread_positions(kv))
        case And(parts=parts):
            return And(tuple(part.spread() for part in parts))
        case Or(parts=parts):
            return Or(tuple(part.spread() for part in parts))
        case Not(mask=inside):
            return Not(inside.spread())
    return mask


def _spread_positions(where: Positions | None) -> Positions | None:
    match where:
        case StaticPositions():
            return TracedPositions(jnp.asarray(where.array if len(where.runs) > 1 else where.array[0]))
        case StaticOffsets(values=values):
            return TracedOffset(jnp.asarray(values, jnp.int32))
    return where


Placed: TypeAlias = tuple[Positions | None, Positions | None]

Corner: TypeAlias = tuple[Any, Any, int, int]
"""The first slot of queries and of keys in a pair of shards, and how many there are."""


def mask_within(mask: Mask, corner: Corner, places: Placed = (None, None)) -> Mask:
    """The mask over a pair of shards, its arrays cut already; see `Mask.within`."""
    match mask:
        case At(mask=inside, query=query, kv=kv):
            inner = (places[0] if query is None else query, places[1] if kv is None else kv)
            return mask_within(inside, corner, inner)
        case And(parts=parts):
            return And(tuple(mask_within(part, corner, places) for part in parts))
        case Or(parts=parts):
            return Or(tuple(mask_within(part, corner, places) for part in parts))
        case Not(mask=inside):
            return Not(mask_within(inside, corner, places))
    part = mask if type(mask).within is Mask.within else mask.within(*corner)
    if not part.positional:
        return part
    query, kv = (_moved(where, jnp.asarray(start, jnp.int32)) for where, start in zip(places, corner[:2], strict=True))
    return At(part, query, kv)


def _moved(where: Positions | None, start: jax.Array) -> Positions:
    """Where the slots from `start` on stand; positions that are arrays are cut already."""
    match where:
        case None:
            return TracedOffset(start)
        case StaticOffset(value=value):
            return TracedOffset(start + np.int32(value))
        case TracedOffset(value=offset):
            return TracedOffset(start + offset.astype(jnp.int32))
        case TracedPositions():
            return where
    raise PluginError(f"within() of a mask at static positions {where}: call spread() first.")


def leaf_axes(mask: Mask) -> list[str]:
    """The axes of a mask's arrays, aligned with `jax.tree.leaves(mask)`.

    Returns:
      For each array a letter for each dimension: B, T and S; N for heads, of queries or of keys as its size says; `.`
      for another. A dimension of 1 holds for all.

    Raises:
      ShapeError: it is not known what a dimension is.
    """
    match mask:
        case At(mask=inside, query=query, kv=kv):
            return [*leaf_axes(inside), *_of_positions(query, "T"), *_of_positions(kv, "S")]
        case And(parts=parts) | Or(parts=parts):
            return [axes for part in parts for axes in leaf_axes(part)]
        case Not(mask=inside):
            return leaf_axes(inside)
        case Predicate(fn=fn, operands=operands):
            return [_of_operand(title_of(fn), leaf) for leaf in jax.tree.leaves(operands)]
    leaves, _ = jax.tree_util.tree_flatten_with_path(mask)
    return [_of_field(mask, path[0].name, leaf) for path, leaf in leaves]


def _of_positions(where: Positions | None, letter: str) -> list[str]:
    leaves = jax.tree.leaves(where)
    return [_last(f"B{letter}" if isinstance(where, TracedPositions) else "B", np.ndim(leaf)) for leaf in leaves]


def _of_operand(function: str, operand: Any) -> str:
    rank = np.ndim(operand)
    if rank not in (0, 4):
        raise ShapeError(
            f"Predicate: an operand of {function} has shape {np.shape(operand)}, and it is not known which of its axes "
            "are sharded: give it four dimensions, as B N T S with 1 where all are alike, or none."
        )
    return "BNTS" if rank else ""


def _of_field(mask: Mask, name: str, leaf: Any) -> str:
    letters = (mask.axes or {}).get(name)
    if letters is None or np.ndim(leaf) > len(letters):
        kind, declared = type(mask).__name__, "no axes" if letters is None else f"axes {letters!r}"
        raise ShapeError(
            f"{kind}: {name} has shape {np.shape(leaf)} and {declared}, so that it is not known what is sharded: "
            f"declare each dimension in {kind}.axes, in the letters B N T S, and . for another."
        )
    return _last(letters, np.ndim(leaf))


def _last(letters: str, rank: int) -> str:
    return letters[len(letters) - rank :]


def why_not_cut(form: MaskForm) -> str | None:
    """Says why a mask cannot be cut to shards, or None where it can."""
    return next((why for atom in form.walk() if (why := _why_not(atom)) is not None), None)


def _why_not(atom: Atom) -> str | None:
    if atom.kind is not AtomKind.CUSTOM:
        return None
    cls, name = atom.mask_class, atom.params[0]
    if cls is Mask:
        return f"mask {name!r} cannot be cut to shards: no class, or more than one, has this word."
    if OPERANDS in atom.params and cls.axes is None:
        return (
            f"mask {name!r} cannot be cut to shards: {cls.__name__}.axes does not say which axes of B N T S its arrays "
            "have; declare them, as {{}} where it has none."
        )
    if cls.positional or any(letter in letters for letters in (cls.axes or {}).values() for letter in "TS"):
        return None
    if cls.within is not Mask.within:
        return None
    return (
        f"mask {name!r} cannot be cut to shards: {cls.__name__} compares slots, which count from 0 in every shard; "
        f"compare positions, with positional = True, or define {cls.__name__}.within."
    )
