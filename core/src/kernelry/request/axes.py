"""Mesh axes as users write them: names, texts, sizes and PartitionSpecs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kernelry.errors import ArgumentError

Axes = tuple[str, ...]
"""Names of mesh axes, the slowest first."""

_SEPARATORS = ",:="


def checked_axes(name: str, given: Any) -> Axes | None:
    """Reads what cuts a dimension: a name, names, or nothing.

    Raises:
      ArgumentError: it is something else, or a name that a text cannot have.
    """
    if given is None:
        return None if name == "kv_sequence" else ()
    axes = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else given
    if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
        raise ArgumentError(
            f"Sharding: {name} must be names of mesh axes, e.g. 'data' or ('data', 'fsdp'), got {given!r}."
        )
    for axis in axes:
        if axis.split() != [axis] or axis == "none" or any(character in axis for character in _SEPARATORS):
            raise ArgumentError(
                f"Sharding: {name}={axis!r} cannot be written as text: rename the mesh axis to one word without "
                f"{' '.join(_SEPARATORS)}, other than 'none'."
            )
    return axes


def checked_sizes(given: Any) -> tuple[tuple[str, int], ...]:
    """Reads sizes by axis, sorted.

    Raises:
      ArgumentError: one is not a positive integer.
    """
    try:
        sizes = dict(given)
    except (TypeError, ValueError):
        sizes = {"": 0}
    if all(isinstance(axis, str) and type(size) is int and size > 0 for axis, size in sizes.items()):
        return tuple(sorted(sizes.items()))
    raise ArgumentError(f"Sharding: sizes must be positive integers by axis, e.g. {{'data': 4}}, got {given!r}.")


def parsed_axes(text: str, value: str, sizes: dict[str, int]) -> Axes:
    """Reads axes as a text has them, e.g. `data:4,fsdp`, and notes their sizes.

    Args:
      text: the whole, for errors.
      value: the axes, or `none`.
      sizes: of the axes so far.

    Raises:
      ArgumentError: a size is not a positive integer, or not the one that was noted.
    """
    axes = []
    for part in () if value == "none" else value.split(","):
        axis, colon, size = part.partition(":")
        if colon and not (size.isdecimal() and int(size) and sizes.get(axis, int(size)) == int(size)):
            raise ArgumentError(f"sharding {text!r}: {part!r} must be an axis and its size, e.g. data:4.")
        if colon:
            sizes[axis] = int(size)
        axes.append(axis)
    return tuple(axes)


def dimensions_of(name: str, spec: Any) -> tuple[Axes, Axes, Axes, Axes]:
    """The axes of batch, length, heads and head dim in the PartitionSpec of an array BTNH.

    Raises:
      ArgumentError: it is something else.
    """
    if not isinstance(spec, jax.sharding.PartitionSpec | tuple) or len(spec) > 4:
        raise ArgumentError(f"Sharding: the spec of {name} must be a PartitionSpec of four dimensions, got {spec!r}.")
    found = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
    for axes in found:
        if not isinstance(axes, Sequence):
            raise ArgumentError(f"Sharding: {axes!r} in the spec of {name}, {spec}, is neither mesh axes nor None.")
    batch, length, heads, dim = [*map(tuple, found), (), (), (), ()][:4]
    return batch, length, heads, dim
