"""Code inside masks: how a form refers to a function, and which arrays the code holds itself.

A kernel that evaluates a mask in registers cannot reach such arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, final

import jax
import numpy as np

from kernelry._compat import array_shapes
from kernelry._pytree import title_of
from kernelry.errors import ArgumentError
from kernelry.masks.side import Axis, Side

if TYPE_CHECKING:
    from kernelry.masks.base import Mask

Held: TypeAlias = tuple[tuple[tuple[int, ...], ...], bool]
"""Shapes of the arrays that a function holds, and whether any of them is being traced."""


@final
class FunctionRef:
    """A predicate's function in a form: held weakly, with what it closes over, because caches keep forms.

    Equal to another while both functions live and are equal; once its function is gone, it equals only itself.
    """

    __slots__ = ("_ref", "held", "title")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.held: Held | None = None
        """The arrays that it holds, once `arrays_held` was asked."""
        self.title = title_of(function)
        self._ref: Callable[[], Callable[..., Any] | None]
        try:
            bound = isinstance(function, types.MethodType)
            self._ref = weakref.WeakMethod(function) if bound else weakref.ref(function)
            hash(self._ref)  # it is kept, and cannot be computed any more when the function is gone
        except TypeError:  # of a class with __slots__
            self._ref = _Held(function)

    @property
    def function(self) -> Callable[..., Any] | None:
        """The function; None when it is gone."""
        return self._ref()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionRef) and self._ref == other._ref

    def __hash__(self) -> int:
        return hash(self._ref)

    def __copy__(self) -> FunctionRef:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionRef:
        return self

    def __reduce__(self) -> NoReturn:
        raise self.not_serialisable()

    def not_serialisable(self) -> ArgumentError:
        """The error that says what to do where a form is to be read elsewhere."""
        return ArgumentError(
            f"Predicate: {self!r} cannot be serialised: it is not importable by name; define it with def at module "
            "level."
        )

    def __repr__(self) -> str:
        return f"<function {self.title}>"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """Like a weak reference, for what allows none."""

    function: Callable[..., Any]

    def __call__(self) -> Callable[..., Any]:
        return self.function


def imported(named: str) -> Callable[..., Any] | None:
    """The function called `module:name`; None where its module is not imported, as of a request out of a file."""
    module, _, name = named.partition(":")
    return getattr(sys.modules.get(module), name, None)


@functools.lru_cache(maxsize=256)
def held_by(held: FunctionRef) -> Held:
    """What tracing a function of positions finds."""
    function = held.function
    assert function is not None
    position = jax.ShapeDtypeStruct((1, 1, 1, 1), np.int32)  # type: ignore[no-untyped-call]
    try:
        traced = jax.make_jaxpr(function)(position, position)
    except Exception:  # the user's own, which the call will raise with its positions
        return (), False
    return tuple(array_shapes(traced)), any(isinstance(array, jax.core.Tracer) for array in traced.consts)


def is_told_by_tiles(mask: Mask) -> bool:
    """Whether a mask can be asked about a tile, and then needs nothing but its slots and positions."""
    if jax.tree.leaves(mask):
        return False
    try:
        return _traces_on_tiles(mask)  # type: ignore[arg-type]
    except TypeError:  # it has no hash
        return False


@functools.lru_cache(maxsize=256)
def _traces_on_tiles(mask: Mask) -> bool:
    def on_tile(query: jax.Array, kv: jax.Array) -> Any:
        sides = (Side(axis, slots, at, whole=False) for axis, (slots, at) in zip(Axis, (query, kv), strict=True))
        return mask.evaluate(*sides)

    query, kv = (jax.ShapeDtypeStruct((2, *tile), np.int32) for tile in ((3, 1), (1, 5)))  # type: ignore[no-untyped-call]
    try:
        traced = jax.make_jaxpr(on_tile)(query, kv)
        [shown] = traced.out_avals
    except Exception:  # its author's, which the call will raise
        return False
    of_tile = len(shown.shape) == 2 and shown.shape[0] in (1, 3) and shown.shape[1] in (1, 5)
    return of_tile and shown.dtype == np.bool_ and next(array_shapes(traced), None) is None
