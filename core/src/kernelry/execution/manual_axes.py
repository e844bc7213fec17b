"""Runs kernels inside a `shard_map` that checks over which of its axes each array varies (`check_vma=True`).

A vendor's kernel says nothing of these axes: its Pallas calls, loops and derivatives do not pass the check. It runs in
a `shard_map` of its own that takes over no axis and checks nothing; what comes out varies as what went in does. JAX
cannot differentiate that map, so what has a derivative is differentiated inside it: see `apart`. Imported where there
is a mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_R = TypeVar("_R")


def varying_alike(tree: Any) -> Any:
    """Makes the floating arrays of a tree vary over the same manual axes of a `shard_map`, those over which any does.

    Around a derivative of one's own: its cotangents vary as the whole call does, and what is the same on every device
    must have theirs summed. That sum is the transpose of what is done here; outside of `shard_map` nothing is.
    """
    axes = _varying_axes(tree)

    def aligned(leaf: Any) -> Any:
        is_floating = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return _varying_over(axes, leaf) if is_floating else leaf

    return jax.tree.map(aligned, tree) if axes else tree


def varying_as(like: Any, tree: Any) -> Any:
    """Makes the arrays of a tree vary over the manual axes of a `shard_map` over which one of another tree does."""
    axes = _varying_axes(like)
    return jax.tree.map(lambda leaf: _varying_over(axes, leaf), tree)


def are_checked() -> bool:
    """Whether the call is inside a `shard_map` with `check_vma=True`."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes:
        return False
    # JAX does not say so itself, but an array can be made varying only there. 0.10 … 0.12 show None elsewhere.
    found = jax.eval_shape(lambda: jax.lax.pcast(jnp.zeros(()), axes, to="varying"))
    return found.manual_axis_type is not None


def unchecked(function: Callable[..., _R], *arrays: Any) -> _R:
    """Calls a function of pytrees of arrays where JAX does not check manual axes: as it is, if JAX does not here.

    Returns:
      What it returns, a pytree of arrays that vary over the axes over which any of those given varies.
    """
    if not are_checked():
        return function(*arrays)

    def run(*arrays: Any) -> _R:
        # They still say over which axes they vary; what is computed of them here does not, and the two do not mix.
        return function(*jax.tree.map(_forgetting, arrays))

    nowhere = PartitionSpec()  # type: ignore[no-untyped-call]
    mapped = jax.shard_map(run, in_specs=nowhere, out_specs=nowhere, axis_names=set(), check_vma=False)
    found: _R = varying_as(arrays, mapped(*arrays))
    return found


def _forgetting(leaf: Any) -> Any:
    """An array that does not say over which axes it varies."""
    # Any operation forgets it where nothing is checked; this one reverses no dimension, and XLA removes it.
    return jax.lax.rev(leaf, ()) if isinstance(leaf, jax.Array) and _varying(leaf) else leaf


def _varying_over(axes: frozenset[Any], array: jax.Array) -> jax.Array:
    missing = tuple(sorted(axes - _varying(array), key=str))
    varied: jax.Array = jax.lax.pcast(array, missing, to="varying") if missing else array
    return varied


def _varying_axes(tree: Any) -> frozenset[Any]:
    leaves = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return frozenset().union(*map(_varying, leaves))


def _varying(array: jax.Array) -> frozenset[Any]:
    # From 0.13 jax.typeof(x) may say so under another name; 0.10 … 0.12 have manual_axis_type.
    found: frozenset[Any] = jax.typeof(array).manual_axis_type.varying
    return found
