"""Arrays that a predicate's function holds itself: a kernel that evaluates it in registers cannot reach them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kernelry._compat import array_shapes
from kernelry.masks.form import Atom, AtomKind, FunctionRef, Held, MaskForm


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
    if atom.kind is not AtomKind.PREDICATE or "operands" in atom.params:
        return (), False
    named = atom.params[0]
    if not isinstance(named, FunctionRef):
        function = _imported(named)
        return ((), False) if function is None else _held_by(FunctionRef(function))
    if named.held is None and named.function is not None:
        named.held = _held_by(named)
    return named.held


def note_arrays(form: MaskForm) -> None:
    """Asks the functions in a form that may outlive them."""
    for atom in form.atoms:
        arrays_held(atom)
        for inside in atom.params:
            if isinstance(inside, MaskForm):
                note_arrays(inside)


def _imported(named: str) -> Callable[..., Any] | None:
    """The function that an atom names; None where its module is not imported, as of a request out of a file."""
    module, _, name = named.partition(":")
    return getattr(sys.modules.get(module), name, None)


@functools.lru_cache(maxsize=256)
def _held_by(held: FunctionRef) -> Held:
    """What tracing a function of positions finds."""
    function = held.function
    assert function is not None
    position = jax.ShapeDtypeStruct((1, 1, 1, 1), np.int32)  # type: ignore[no-untyped-call]
    try:
        traced = jax.make_jaxpr(function)(position, position)
    except Exception:  # the user's own, which the call shows with its positions: no kernel's fault
        return (), False
    return tuple(array_shapes(traced)), any(isinstance(array, jax.core.Tracer) for array in traced.consts)
