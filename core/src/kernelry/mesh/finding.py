"""Which sharding a call has: what a scope says, else what explicit mesh axes say of its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
from jax.sharding import AxisType

from kernelry.errors import ArgumentError
from kernelry.request.sharding import Axes, Sharding
from kernelry.storage import PagedArray, QuantizedArray


@final
@dataclasses.dataclass(frozen=True, slots=True)
class MeshFacts:
    """What a mesh means for a call.

    Args:
      sharding: how the call is cut, with the sizes of the axes; None where it is not cut.
      mesh: the mesh that cuts it.
      names: the axes over which each device runs by itself.
      partitioned: whether XLA is left to partition the call over automatic axes.
    """

    sharding: Sharding | None = None
    mesh: Any = None
    names: frozenset[str] = frozenset()
    partitioned: bool = False

    @property
    def text(self) -> str | None:
        """The sharding as a request has it."""
        return None if self.sharding is None or self.sharding.is_empty else str(self.sharding)


def mesh_facts(said: Sharding | None, query: jax.Array, key: Any) -> MeshFacts:
    """Finds the sharding of a call.

    Args:
      said: what the surrounding scopes say.
      query, key: its arrays.

    Raises:
      ArgumentError: no mesh is active, or it has no such axis.
    """
    active = jax.sharding.get_abstract_mesh()
    manual = _named(active, AxisType.Manual)
    if said is not None and not said.is_empty:
        return _said(said, active, manual, query)
    mesh = active if not active.empty else jax.typeof(query).sharding.mesh
    explicit = _named(mesh, AxisType.Explicit) - manual
    automatic = any(mesh.shape[name] > 1 for name in _named(mesh, AxisType.Auto) - manual)
    if not explicit:
        return MeshFacts(partitioned=automatic)
    sharding = _explicit(query, key, explicit).on(dict(mesh.shape))
    return MeshFacts(sharding, mesh, explicit, automatic)


def _said(said: Sharding, active: Any, manual: frozenset[str], query: jax.Array) -> MeshFacts:
    mesh = said.mesh or (active if not active.empty else jax.typeof(query).sharding.mesh)
    if mesh.empty:
        raise ArgumentError(
            f"sharding={said}: no mesh is active; enter one, e.g. by jax.set_mesh, or give it as Sharding(mesh=…)."
        )
    sharding = _without(said, manual).on(dict(mesh.shape))
    if sharding.is_empty:  # inside a shard_map over its axes each call is a shard's
        return MeshFacts()
    return MeshFacts(sharding, mesh, frozenset(mesh.axis_names) - manual)


def _without(sharding: Sharding, manual: frozenset[str]) -> Sharding:
    def kept(axes: Axes) -> Axes:
        return tuple(axis for axis in axes if axis not in manual)

    if not manual:
        return sharding
    strategy = "ring" if sharding.strategy == "usp" and not kept(sharding.ulysses) else sharding.strategy
    return dataclasses.replace(
        sharding,
        batch=kept(sharding.batch),
        heads=kept(sharding.heads),
        sequence=kept(sharding.sequence),
        kv_sequence=None if sharding.kv_sequence is None else kept(sharding.kv_sequence),
        ulysses=kept(sharding.ulysses),
        strategy=strategy,
    )


def _explicit(query: jax.Array, key: Any, explicit: frozenset[str]) -> Sharding:
    """Reads the types of arrays; where only one of query and key is cut, the other is cut alike."""
    of_query = Sharding.of_specs(_spec("query", query, explicit))
    of_key = Sharding.of_specs(_spec("key", key, explicit))
    for name in ("batch", "heads"):
        own, other = getattr(of_query, name), getattr(of_key, name)
        if own and other and own != other:
            raise ArgumentError(f"{name} are cut over {own} in query and over {other} in key; cut them alike.")
    return Sharding(
        batch=of_query.batch or of_key.batch,
        heads=of_query.heads or of_key.heads,
        sequence=of_query.sequence,
        kv_sequence=None if of_key.sequence == of_query.sequence else of_key.sequence,
    )


def _spec(name: str, array: Any, explicit: frozenset[str]) -> tuple[Any, ...]:
    if isinstance(array, PagedArray):
        pool, slots, *heads = _spec(name, array.pages, explicit)
        if pool or slots:
            raise ArgumentError(
                f"the pages of {name} are cut over {pool or slots}, and a row's may be anywhere in the pool: cut their "
                "heads alone, or give each shard a cache with a pool of its own, inside a shard_map."
            )
        return (pool, slots, *heads)
    spec = jax.typeof(array.values if isinstance(array, QuantizedArray) else array).sharding.spec
    found = tuple(
        tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis in explicit) for axes in spec
    )
    if len(found) == 4 and found[3]:
        raise ArgumentError(
            f"{name} is cut along its head dim over {found[3]}: reshard it, e.g. by jax.sharding.reshard, so that "
            "batch, sequence or heads are cut instead."
        )
    return found


def _named(mesh: Any, kind: AxisType) -> frozenset[str]:
    return frozenset(name for name, of in zip(mesh.axis_names, mesh.axis_types, strict=True) if of is kind)
