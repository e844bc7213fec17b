"""Registers frozen dataclasses as pytrees that do not validate when unflattened.

jax.vmap, jax.tree.map and tracing rebuild containers with batched arrays, None or
sentinels inside, so `__init__` must not run then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

_T = TypeVar("_T")


def pytree(*leaves: str) -> Callable[[type[_T]], type[_T]]:
    """Makes a dataclass a pytree whose children are the fields named; the rest is static."""

    def decorate(cls: type[_T]) -> type[_T]:
        names = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        static = tuple(name for name in names if name not in leaves)

        def flatten_with_keys(tree: _T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
            children = tuple((jax.tree_util.GetAttrKey(n), getattr(tree, n)) for n in leaves)
            return children, tuple(getattr(tree, n) for n in static)

        def flatten(tree: _T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            return tuple(getattr(tree, n) for n in leaves), tuple(getattr(tree, n) for n in static)

        def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> _T:
            tree = object.__new__(cls)
            for name, value in zip(leaves + static, (*children, *aux), strict=True):
                object.__setattr__(tree, name, value)
            return tree

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return decorate


_SHOWN = 16
"""Elements; longer arrays are shown by dtype and shape."""


def short_repr(tree: Any) -> str:
    """A dataclass by its fields, of which arrays are `dtype[shape]`, short ones of integers and booleans their values.

    A class takes it as its `__repr__`.
    """
    fields = ((field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree))
    return f"{type(tree).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in fields)})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and value and len({_shown(entry) for entry in value}) == 1:
        return f"{len(value)} x {_shown(value[0])}"
    if not isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return repr(value)
    known = isinstance(value, jax.Array | np.ndarray) and not isinstance(value, jax.core.Tracer)
    if known and value.dtype.kind in "iub" and value.size <= _SHOWN:
        return repr(np.asarray(value).tolist())
    return f"{value.dtype}{list(value.shape)}"
