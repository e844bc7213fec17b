"""Any predicate over positions that a user writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, final

import jax
import numpy as np

from kernelry._pytree import importable_name, pytree, title_of
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks.arrays import as_array, described, module_of
from kernelry.masks.base import Extent, Mask
from kernelry.masks.composition import children, walk
from kernelry.masks.form import OPERANDS, Atom, AtomKind, MaskForm
from kernelry.masks.functions import FunctionRef, Held, held_by, imported
from kernelry.masks.side import ArrayLike, Side


@final
@pytree("operands")
@dataclasses.dataclass(frozen=True, slots=True, eq=False, init=False)
class Predicate(Mask):
    """A query sees the keys for which a function of the positions says so.

    Define the function with `def` at module level: a fresh lambda is another function in every
    call, so that everything is traced again, and an anonymous one cannot be serialised. A form holds
    an anonymous one weakly, so that no cache keeps what it closes over.

    Args:
      fn: `fn(query_positions, kv_positions, *operands)` returns booleans. The positions are
        [B or 1, 1, T, 1] and [B or 1, 1, 1, S], so that they broadcast to B N T S; a kernel may
        call it with the positions of a tile. It must be traceable.
      operands: arrays handed to it; give them four dimensions, e.g. [B, 1, 1, 1]. Where the function takes a tile's
        positions only with a tile's part of operands that broadcast to B N T S, it gets that part; else all of them.
    """

    fn: Callable[..., Any]
    operands: tuple[Any, ...]

    word: ClassVar[str] = "predicate"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.PREDICATE,)
    positional: ClassVar[bool] = True

    def __init__(self, fn: Callable[..., Any], *operands: Any) -> None:
        if not callable(fn):
            raise ArgumentError(f"Predicate: fn must be a function of positions, got {fn!r}.")
        try:
            hash(fn)
        except TypeError:
            raise ArgumentError(f"Predicate: {fn!r} has no hash, so that programs cannot be kept by it.") from None
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "operands", operands)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Predicate) or self.fn is not other.fn or len(self.operands) != len(other.operands):
            return False
        return all(mine is theirs for mine, theirs in zip(self.operands, other.operands, strict=True))

    def __hash__(self) -> int:
        if self.operands:
            raise TypeError("a Predicate with operands is not hashable; its form is the key")
        return hash(self.fn)

    @property
    def atom(self) -> Atom:
        named = importable_name(self.fn) or FunctionRef(self.fn)
        return Atom(AtomKind.PREDICATE, (named, OPERANDS) if self.operands else (named,))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        operands = _operands_of(self, query, kv) if self.operands else ()
        visible = as_array(self.fn(query.positions, kv.positions, *operands))
        if visible.dtype != np.bool_ or visible.ndim > 4:
            raise ShapeError(
                f"Predicate: {title_of(self.fn)} must return booleans that broadcast to B N T S, "
                f"got {visible.dtype} of shape {visible.shape}."
            )
        whole = jax.numpy.broadcast_shapes(visible.shape, query.slots.shape, kv.slots.shape)
        return module_of(visible, query.positions, kv.positions).broadcast_to(visible, whole)

    def check(self, extent: Extent) -> None:
        full = (extent.batch, extent.q_heads, extent.q_len, extent.kv_len)
        query = jax.ShapeDtypeStruct((1, 1, extent.q_len, 1), np.int32)  # type: ignore[no-untyped-call]
        kv = jax.ShapeDtypeStruct((1, 1, 1, extent.kv_len), np.int32)  # type: ignore[no-untyped-call]
        shape = np.shape(jax.eval_shape(self.fn, query, kv, *self.operands))
        if len(shape) > 4 or any(have not in (1, want) for have, want in zip(shape[::-1], full[::-1], strict=False)):
            raise ShapeError(
                f"Predicate: {title_of(self.fn)} must return booleans that broadcast to B N T S = {full}, "
                f"got shape {shape}."
            )

    def __repr__(self) -> str:
        return f"Predicate({', '.join([title_of(self.fn), *map(described, self.operands)])})"


def _operands_of(predicate: Predicate, query: Side, kv: Side) -> tuple[Any, ...]:
    """The operands for these slots."""
    if query.whole and kv.whole:
        return predicate.operands
    whole: tuple[Any, ...] = predicate.operands
    if not isinstance(query.slots, np.ndarray):  # traced positions index no NumPy array
        whole = jax.tree.map(jax.numpy.asarray, whole)
    wanted = kv.slots.shape[-1], query.slots.shape[-2]
    try:
        found = np.shape(jax.eval_shape(predicate.fn, query.positions, kv.positions, *whole))[::-1]
    except (TypeError, ValueError):  # what array libraries raise where shapes do not broadcast
        found = None
    if found is not None and all(have in (1, want) for have, want in zip(found, wanted, strict=False)):
        return whole
    cut: tuple[Any, ...] = jax.tree.map(lambda leaf: kv.cut(query.cut(leaf)) if np.ndim(leaf) == 4 else leaf, whole)
    return cut


def arrays_held(atom: Atom) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the arrays that the function of a PREDICATE without operands holds; none of other atoms.

    None where the function is gone and was not asked in time.
    """
    held = _held(atom)
    return None if held is None else held[0]


def holds_traced(atom: Atom) -> bool:
    """Whether the function of a PREDICATE without operands holds an array of a program that is being traced."""
    held = _held(atom)
    return held is not None and held[1]


def _held(atom: Atom) -> Held | None:
    if atom.kind is not AtomKind.PREDICATE or OPERANDS in atom.params:
        return (), False
    named = atom.params[0]
    if not isinstance(named, FunctionRef):
        function = imported(named)
        return ((), False) if function is None else held_by(FunctionRef(function))
    if named.held is None and named.function is not None:
        named.held = held_by(named)
    return named.held


def note_arrays(form: MaskForm) -> None:
    """Asks the functions in a form that may outlive them."""
    for atom in form.walk():
        arrays_held(atom)


def functions_in(mask: Mask) -> Iterator[Callable[..., Any]]:
    """What a form only names of a mask: the functions of predicates, the classes of other masks."""
    for part in walk(mask):
        if not children(part):
            yield part.fn if isinstance(part, Predicate) else type(part)


def is_lasting(mask: Mask) -> bool:
    """Whether a cache may hold the mask: what its form names is found by name, and so exists anyhow."""
    return all(importable_name(function) is not None for function in functions_in(mask))
