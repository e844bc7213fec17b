"""Differences between the versions of JAX that kernelry supports (0.10 … 0.12)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def abstract_device() -> Any | None:
    """Returns the device description of the active mesh, or None where no mesh is active.

    A concrete mesh made current by `jax.set_mesh` and an abstract one made current by
    `jax.sharding.use_abstract_mesh` both show here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # AbstractMesh.abstract_device is public from 0.12; 0.10 has it undocumented (drop with 0.11).
    return None if mesh.empty else getattr(mesh, "abstract_device", None)


def platforms_of(context: Any) -> tuple[str, ...]:
    """Returns the platforms that a primitive's lowering rule lowers for, by JAX's names: `cpu`, `cuda`, `tpu`."""
    # 0.10 … 0.12: the context's own are those of a branch of lax.platform_dependent, else the module's count.
    platforms: tuple[str, ...] = tuple(context.platforms or context.module_context.platforms)
    return platforms


def varying_alike(tree: Any) -> Any:
    """Makes the floating arrays of a tree vary over the same manual axes of a `shard_map`, those over which any does.

    Around a derivative of one's own: its cotangents vary as the whole call does, and what is the same on every device
    must have theirs summed. That sum is the transpose of what is done here; outside of `shard_map` nothing is.
    """
    # From 0.13 jax.typeof(x) may say so under another name; 0.10 … 0.12 have manual_axis_type.
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    axes = frozenset().union(*(_varying(leaf) for leaf in leaves))
    if not axes:
        return tree

    def aligned(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        missing = tuple(sorted(axes - _varying(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(aligned, tree)


def _varying(array: jax.Array) -> frozenset[Any]:
    found: frozenset[Any] = jax.typeof(array).manual_axis_type.varying
    return found
