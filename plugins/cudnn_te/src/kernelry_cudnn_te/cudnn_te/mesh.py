"""Which axes of the mesh mean what, as transformer-engine needs to be told.

It sums the gradients of bias and sinks over the axes that share out the batch, so an axis left out is a wrong
gradient. Names are known by convention: its own, MaxText's and the usual short ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from kernelry.errors import ConfigError
from kernelry.plugin import Inputs, Operand, Request
from kernelry_cudnn_te.arrays import depending_on
from kernelry_cudnn_te.cudnn_te import _vendor
from kernelry_cudnn_te.cudnn_te.across_devices import Shared

_ROLES = {
    "dp_resource": frozenset({"dp", "data", "batch", "replica"}),
    "fsdp_resource": frozenset({"fsdp", "zero"}),
    "tp_resource": frozenset({"tp", "tensor", "model", "heads"}),
}

_FREE = PartitionSpec.UNCONSTRAINED


def resources(request: Request, shared: Shared | None) -> Any:
    """transformer-engine's MeshResource of the active mesh.

    Raises:
      ConfigError: a gradient is summed over the batch, and an axis of the mesh has no role known by its name, or
        shares one with another axis; or bias or sinks meet heads that are shared out, with which it cuts neither.
    """
    given: dict[str, str] = {}
    for name in _divided():
        if shared is not None and name == shared.axis:
            continue  # told with each call: the other calls of the program may have whole sequences
        role = next((role for role, names in _ROLES.items() if name in names), None)
        if role is not None and role not in given:
            given[role] = name
        elif request.gradients & {Operand.BIAS, Operand.SINKS}:
            known = ", ".join(f"{role} ({' or '.join(sorted(names))})" for role, names in _ROLES.items())
            raise ConfigError(
                "cudnn_te: the gradients of bias and sinks are summed over the mesh axes that share out the batch, and "
                f"axis {name!r} of the mesh {dict(_mesh().shape)} cannot be told to transformer-engine: it takes one "
                f"axis for each of {known}. Rename it, or let another kernel serve this call."
            )
    heads = given.get("tp_resource")
    if heads is not None and (request.sinks or request.bias is not None):
        what = "sinks" if request.sinks else "bias"
        raise ConfigError(
            f"cudnn_te: {what} on a mesh with the axis {heads!r} of heads, {dict(_mesh().shape)}: transformer-engine "
            f"does not cut {what} as it cuts heads. Call it inside a shard_map over {heads!r}, or let another kernel "
            "serve it."
        )
    return _vendor.MeshResource(**given)


def with_sequences(inputs: Inputs, shared: Shared | None) -> Inputs:
    """Sees to it that the sequences are shared out as said, or not at all: a part of one would be taken for all of it.

    Raises:
      ConfigError: an axis of the mesh is explicit; or the active mesh does not share out the sequences as said, and
        transformer-engine would take the slots for the order of the tokens.
    """
    axis = None if shared is None else shared.axis
    if shared is not None and _mesh().shape.get(shared.axis) != shared.size:
        raise ConfigError(
            f"cudnn_te: context_parallel over {shared.size} devices along {shared.axis!r}, and the active mesh is "
            f"{dict(_mesh().shape)}; enter one with that axis, e.g. by jax.set_mesh."
        )
    query, key, value = (along(array, axis) for array in (inputs.query, inputs.key, inputs.value))
    return dataclasses.replace(inputs, query=query, key=key, value=value)


def along(array: jax.Array, axis: str | None) -> jax.Array:
    """An array [B, L, …], sharded along L by that axis of the mesh alone.

    Raises:
      ConfigError: an axis of the mesh is explicit.
    """
    if not _divided():
        return array
    rest = (_FREE, None)[: array.ndim - 2]  # heads and their dims
    spec = PartitionSpec(_FREE, axis, *rest)  # type: ignore[no-untyped-call]
    constrained: jax.Array = jax.lax.with_sharding_constraint(array, spec)  # type: ignore[no-untyped-call]
    return constrained


def alike(array: jax.Array, other: jax.Array) -> jax.Array:
    """The first array, cut as the leading dimensions of the other."""
    return depending_on(array, other) if _divided() else array


def _mesh() -> Any:
    """The mesh of `jax.set_mesh`, else that of `with mesh:`, which transformer-engine reads too."""
    mesh = jax.sharding.get_abstract_mesh()
    return _vendor.entered_mesh() if mesh.empty else mesh


def _divided() -> list[str]:
    """The axes of more than one device that are not a `shard_map`'s own.

    Raises:
      ConfigError: one of them is explicit, for which transformer-engine's primitives have no rules.
    """
    mesh = _mesh()
    if mesh.empty:
        return []
    kinds = {
        str(name): kind for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh.shape[name] > 1
    }
    explicit = [name for name, kind in kinds.items() if kind is AxisType.Explicit]
    if explicit:
        raise ConfigError(
            f"cudnn_te: mesh axes {', '.join(explicit)} are explicit, for which transformer-engine has no rules; call "
            "it inside jax.sharding.auto_axes, or make the mesh with jax.sharding.AxisType.Auto."
        )
    return [name for name, kind in kinds.items() if kind is not AxisType.Manual]
