"""Which sharding a call has: what a scope says, else what explicit mesh axes say of its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, final

import jax
from jax.sharding import AxisType

from kernelry.errors import ArgumentError, nearest
from kernelry.kernel.capabilities import Gradient
from kernelry.kernel.spec import KernelSpec
from kernelry.registry import installed
from kernelry.request.axes import Axes
from kernelry.request.context_parallel import ContextParallel
from kernelry.request.request import Request
from kernelry.request.sharding import Sharding
from kernelry.resolution.resolver import explain
from kernelry.resolution.shards import ShardedResolution
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
      idle: of a scope that says how sequences are cut and nothing else, the other axes of more than one device.
    """

    sharding: Sharding | None = None
    mesh: Any = None
    names: frozenset[str] = frozenset()
    partitioned: bool = False
    idle: frozenset[str] = frozenset()

    @property
    def text(self) -> str | None:
        """The sharding as a request has it."""
        return None if self.sharding is None or self.sharding.is_empty else str(self.sharding)

    def repeated_work(self, kernel: str, *, by_xla: bool) -> str | None:
        """Says which devices compute the same, and what to do; None where none do, as far as that is known.

        Args:
          kernel: what was chosen.
          by_xla: whether XLA partitions it.
        """
        if self.partitioned and not by_xla:
            example = 'kernelry.use(sharding=kernelry.parallel.Sharding(batch="data", heads="model"))'
            return (
                f"kernel {kernel!r} is not partitioned by XLA, so every device of the active mesh computes the whole "
                f"call: say how it is sharded, e.g. with {example}."
            )
        idle = sorted(self.idle)
        if not idle:
            return None
        return (
            f"use(context_parallel=…) names no dimension for the mesh axes {', '.join(idle)}, so the devices along "
            "them compute the same, and arrays that are cut over them are gathered: name all axes, "
            f"use(sharding={str(self.sharding)!r} and e.g. 'batch={idle[0]}')."
        )


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
    mesh = (said.mesh or jax.typeof(query).sharding.mesh) if active.empty else active
    if mesh.empty:
        raise ArgumentError(
            f"sharding={said}: no mesh is active; enter one, e.g. by jax.set_mesh, or give it as Sharding(mesh=…), a "
            "layer's as AttentionOp(mesh=…)."
        )
    if said.mesh is not None and dict(said.mesh.shape) != dict(mesh.shape):
        raise ArgumentError(
            f"sharding={said} is for a mesh {dict(said.mesh.shape)}, and the active one is {dict(active.shape)}; give "
            "the sharding no mesh, or enter its own."
        )
    sharding = _without(said, manual).on(dict(mesh.shape))
    if sharding.is_empty:  # inside a shard_map over its axes each call is a shard's
        return MeshFacts()
    return MeshFacts(sharding, mesh, frozenset(mesh.axis_names) - manual)


def native_text(context: ContextParallel) -> str | None:
    """How a mesh axis cuts sequences, as a request says it to a kernel that attends across devices itself.

    Raises:
      ArgumentError: no mesh is active, or its axis is missing, of another size, or a shard_map's own.
    """
    if context.size == 1:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    if context.axis not in sizes:
        if context.size is not None and mesh.empty:
            return str(context)
        where = f"the mesh {sizes} has no axis {context.axis!r}{nearest(context.axis, sizes)}" if sizes else "no mesh"
        raise ArgumentError(f"{context!r}: {where} is active; enter one, e.g. by jax.set_mesh.")
    if context.size not in (None, sizes[context.axis]):
        raise ArgumentError(f"{context!r}: the axis has size {sizes[context.axis]} in the mesh {sizes}.")
    if dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[context.axis] is jax.sharding.AxisType.Manual:
        raise ArgumentError(
            f"{context!r}: inside a shard_map over {context.axis!r} each device holds only a part of every sequence."
        )
    return None if sizes[context.axis] == 1 else str(dataclasses.replace(context, size=sizes[context.axis]))


def differentiated_as(kernel: KernelSpec, found: ShardedResolution) -> tuple[KernelSpec, Callable[[], str]]:
    """How a call on a mesh is differentiated, as far as errors tell: by the kernel, or around all steps by core.

    Returns:
      The kernel, and what says, for an error, which alternatives there are.
    """
    if found.shards.table is None:
        return kernel, installed.native_kernels
    one_way = dataclasses.replace(kernel.capabilities, gradient=Gradient.BACKWARD, forward_over_reverse=False)
    named = dataclasses.replace(kernel, name=f"{kernel.name} across devices", capabilities=one_way)
    return named, lambda: f"a sharding that leaves sequences whole and {installed.native_kernels()}"


def natively_or_by_core(
    request: Request, context: ContextParallel, kernel: str, query: jax.Array, key: Any
) -> tuple[Request, MeshFacts | None]:
    """Leaves sequences that a mesh axis cuts to a kernel that attends across devices itself, else cuts the call.

    Args:
      request: of the call, with `context_parallel`.
      context: what the scope says.
      kernel: what was asked for.
      query, key: the arrays.
    """
    if explain(request, kernel=kernel, changes=False).plan is not None:
        return request, None
    facts = mesh_facts(Sharding(sequence=(context.axis,), strategy=context.strategy), query, key)
    others = _named(facts.mesh, AxisType.Auto) & facts.names - {context.axis}
    facts = dataclasses.replace(facts, idle=frozenset(name for name in others if facts.mesh.shape[name] > 1))
    return dataclasses.replace(request, context_parallel=None, sharding=facts.text, partitioned=False), facts


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
        sizes=tuple((axis, size) for axis, size in sharding.sizes if axis not in manual),
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
