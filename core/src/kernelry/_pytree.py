"""Registers frozen dataclasses as pytrees that do not validate when unflattened.

jax.vmap, jax.tree.map and tracing rebuild containers with batched arrays, None or
sentinels inside, so `__init__` must not run then.

They are registered with jax.export, too, so that an exported function may take and return them: what is static is
written as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

from kernelry.errors import ArgumentError

_T = TypeVar("_T")


def pytree(*leaves: str) -> Callable[[type[_T]], type[_T]]:
    """Makes a dataclass a pytree whose children are the fields named; the rest is static.

    With children and `eq=False` it has no hash: arrays have none.
    """

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

        if leaves and (cls.__eq__, cls.__hash__) == (object.__eq__, object.__hash__):
            cls.__hash__ = None  # type: ignore[method-assign,assignment]
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        _register_for_export(cls)
        return cls

    return decorate


def _register_for_export(cls: type[Any]) -> None:
    own = cls.__module__.partition(".")[0] == "kernelry"
    # Our modules may move. A class may be defined anew, as in a notebook: then the first keeps the name.
    name = f"{'kernelry' if own else cls.__module__}.{cls.__qualname__}"
    with contextlib.suppress(ValueError):
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=name,
            serialize_auxdata=lambda static: write_static(cls.__name__, static),
            deserialize_auxdata=lambda data: read_static(cls.__name__, data),
        )


def importable_name(function: Any) -> str | None:
    """`module:name`, where the function is found under it; else None."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module is None or name is None or getattr(sys.modules.get(module), name, None) is not function:
        return None
    return f"{module}:{name}"


def title_of(function: Callable[..., Any]) -> str:
    """A function's name, the same in every process: a title orders atoms, so it holds no address."""
    if isinstance(function, functools.partial):
        return f"partial({title_of(function.func)})"
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else f"{type(function).__qualname__} object"


def write_static(owner: str, static: Any) -> bytes:
    """Writes the static part of a pytree as JSON; functions by name.

    Raises:
      ArgumentError: a function is not importable by name, or a value is none that JSON knows.
    """

    def written(value: Any) -> Any:
        if isinstance(value, tuple):
            return [written(part) for part in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        name = importable_name(value)
        if name is None:
            data = "is not a number, a text or a function"
            kind = "is not importable by name; define it with def at module level" if callable(value) else data
            raise ArgumentError(f"{owner} cannot be serialised: {value!r} {kind}.")
        return {"function": name}

    return json.dumps(written(static)).encode()


def read_static(owner: str, data: bytes | bytearray) -> Any:
    """Reads what `write_static` wrote; of a function the module must be imported already.

    Raises:
      ArgumentError: a function is not found.
    """

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(read(part) for part in value)
        if not isinstance(value, dict):
            return value
        module, _, name = value["function"].partition(":")
        function = getattr(sys.modules.get(module), name, None)
        if function is None:
            raise ArgumentError(
                f"{owner} cannot be deserialised: {module} is not imported, or has no {name}: import it first."
            )
        return function

    return read(json.loads(data))


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
