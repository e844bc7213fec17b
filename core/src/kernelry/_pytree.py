"""Registers frozen dataclasses as pytrees that do not validate when unflattened.

jax.vmap, jax.tree.map and tracing rebuild containers with batched arrays, None or
sentinels inside, so `__init__` must not run then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

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
