"""Which sharding the calls of a layer have, and the policy that goes with it."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from kernelry.config.layer import AttentionConfig
from kernelry.errors import ArgumentError
from kernelry.flax.tokens import Tokens
from kernelry.policy.scope import current_scope, use
from kernelry.request.arguments import as_array
from kernelry.request.request import Mode

if TYPE_CHECKING:
    from kernelry.request.sharding import Sharding


def sharding_of(config: AttentionConfig, mesh: Any, sharding: Sharding | str | None) -> Sharding | None:
    """Returns the sharding of a layer.

    Args:
      config: of the layer; its sharding holds where `sharding` is None.
      mesh: has the axes, or None.
      sharding: which axes cut what.

    Raises:
      ArgumentError: the mesh lacks an axis, or nothing says what its axes cut.
    """
    said = config.sharding
    if sharding is not None:
        from kernelry.request.sharding import Sharding  # imported where calls are sharded

        said = Sharding.parse(sharding)
    if mesh is None:
        return said
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ArgumentError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}.")
    if said is not None:
        if said.mesh not in (None, mesh):
            raise ArgumentError(f"mesh= is {mesh}, and that of sharding={said} is {said.mesh}; pass one of them.")
        said.on(dict(mesh.shape))  # which checks the axes
        return dataclasses.replace(said, mesh=mesh)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    open_ = [f"{name}:{mesh.shape[name]}" for name, kind in kinds if kind is AxisType.Auto and mesh.shape[name] > 1]
    if open_:
        raise ArgumentError(
            f"mesh= has axes {', '.join(open_)}, and nothing says what they cut: pass sharding=, e.g. "
            f"'batch={mesh.axis_names[0]}', or set config.sharding."
        )
    return None


@contextlib.contextmanager
def scope_of(
    config: AttentionConfig, sharding: Sharding | None, mode: str | Mode, query: Any, keys: Sequence[Any]
) -> Iterator[None]:
    """Applies the policy and the sharding of a layer, each unless an enclosing `use` has given one.

    Args:
      config: of the layer.
      sharding: of the layer.
      mode: of the call.
      query: its queries.
      keys: its keys, of every part.
    """
    outer = current_scope()
    policy = None if outer.policy is not None else config.policy
    said = outer.sharding is not None or outer.context_parallel is not None
    own = None if said else sharding
    if own is not None and own.sequence and Mode.parse(mode) is Mode.DECODE:
        own = _in_decode(own, query, keys)
    if policy is None and own is None:
        yield
        return
    with use(policy=policy, sharding=own):
        yield


def _in_decode(sharding: Sharding, query: Any, keys: Sequence[Any]) -> Sharding:
    """The sharding of queries that are one token each: the keys alone are cut, if each part of them divides."""
    from kernelry.mesh.finding import mesh_facts  # imported where there is a mesh

    kept = {*sharding.batch, *sharding.heads}
    whole = dataclasses.replace(
        sharding,
        sequence=(),
        kv_sequence=None,
        ulysses=(),
        strategy="auto",
        order="contiguous",
        sizes=tuple((axis, size) for axis, size in sharding.sizes if axis in kept),
    )
    if not sharding.kv_axes:
        return whole
    cut = dataclasses.replace(whole, kv_sequence=sharding.kv_axes, sizes=sharding.sizes)
    found = mesh_facts(cut, as_array("query", query, 4), None).sharding
    shards = 1 if found is None else found.size(found.kv_axes)
    lengths = [np.shape(key)[1] for key in keys if np.ndim(key) == 4]
    uneven = next((length for length in lengths if length % shards), None)
    if uneven is None:
        return cut
    arithmetic = f"{uneven} % {shards} = {uneven % shards}"
    warnings.warn(
        f"a part of the keys has S={uneven}, which does not divide over {' and '.join(cut.kv_axes)}: {arithmetic}. "
        "Every device along these axes attends to all keys; choose lengths that divide.",
        stacklevel=5,
    )
    return whole


def check_order(query: Any, key: Any, tokens: Tokens, *, moba: bool) -> None:
    """Checks what a layer says of its tokens against the order that its sharding puts them in.

    Raises:
      ArgumentError: MoBA or bidirectional flags, which are about neighbouring keys, with an order that parts them.
    """
    said = current_scope().sharding
    if said is None or said.order == "contiguous" or key is None:
        return
    from kernelry.mesh.finding import mesh_facts  # imported where there is a mesh

    found = mesh_facts(said, as_array("query", query, 4), key).sharding
    if found is None or found.order == "contiguous":
        return
    if moba:
        raise ArgumentError(
            f"config.moba averages blocks of consecutive keys, and tokens are in the order of sharding={found}: use "
            "order='contiguous'."
        )
    if tokens.bidirectional is not None:
        raise ArgumentError(
            f"bidirectional flags are about neighbouring keys, and tokens are in the order of sharding={found}: number "
            "the spans before the tokens are reordered, and pass mask=… | masks.BidirectionalSpans(spans)."
        )
    traced = [name for name in ("positions", "kv_positions") if isinstance(getattr(tokens, name), jax.Array)]
    if traced:
        warnings.warn(
            f"Tokens.{traced[0]} is a JAX array, so no kernel knows which steps of order={found.order!r} show nothing, "
            "and kernels that need static positions are ruled out: leave it out, as the order gives the positions, or "
            "pass a NumPy array, e.g. kernelry.parallel.load_balanced_order(T, size).",
            stacklevel=4,
        )
