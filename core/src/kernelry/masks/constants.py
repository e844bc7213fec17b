"""Arrays that a predicate's function holds itself: a kernel that evaluates it in registers cannot reach them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from kernelry.masks.form import Atom, AtomKind


def arrays_held(atom: Atom) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays that the function of a PREDICATE without operands holds; none of other atoms."""
    if atom.kind is not AtomKind.PREDICATE or "operands" in atom.params:
        return ()
    return _held_by(_function(atom.params[0]))[0]


def holds_traced(atom: Atom) -> bool:
    """Whether the function of a PREDICATE holds an array of a program that is being traced."""
    return atom.kind is AtomKind.PREDICATE and _held_by(_function(atom.params[0]))[1]


def _function(named: Any) -> Callable[..., Any] | None:
    """The function that an atom names; None where its module is not imported, as of a request out of a file."""
    if not isinstance(named, str):
        function: Callable[..., Any] = named
        return function
    module, _, name = named.partition(":")
    return getattr(sys.modules.get(module), name, None)


@functools.lru_cache(maxsize=256)
def _held_by(function: Callable[..., Any] | None) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Shapes of the arrays that tracing a function of positions finds, and whether any is a tracer."""
    if function is None:
        return (), False
    position = jax.ShapeDtypeStruct((1, 1, 1, 1), np.int32)  # type: ignore[no-untyped-call]
    try:
        traced = jax.make_jaxpr(function)(position, position)
    except Exception:  # the user's own, which the call shows with its positions: no kernel's fault
        return (), False
    return tuple(_shapes(traced)), any(isinstance(array, jax.core.Tracer) for array in traced.consts)


def _shapes(part: Any) -> Iterator[tuple[int, ...]]:
    """Of arrays in a jaxpr and in all inside it; a scalar that is written into it is none."""
    if isinstance(part, ClosedJaxpr | Jaxpr):  # one class in jax 0.12
        yield from (np.shape(array) for array in getattr(part, "consts", ()))
        for equation in part.eqns:
            literals = (operand.val for operand in equation.invars if isinstance(operand, Literal))
            yield from (np.shape(value) for value in literals if np.shape(value))
            for inside in jax.tree.leaves(equation.params):
                yield from _shapes(inside)
