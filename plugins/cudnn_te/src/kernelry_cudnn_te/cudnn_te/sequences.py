"""What each row holds, as transformer-engine is told: how far it goes, or which segments follow one another."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernelry.masks import Lengths, Segments
from kernelry.plugin import Inputs, Request, load_balanced_order
from kernelry_cudnn_te.cudnn_te.across_devices import Shared
from kernelry_cudnn_te.cudnn_te.mesh import along
from kernelry_cudnn_te.cudnn_te.settings import TeSettings


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The rows of a call.

    Args:
      queries, keys: how many each row holds, int32 [B]; of a packed row the numbers of the tokens' segments, and their
        places in them, int32 [B, T].
      live: which queries see some key; None where all do.
      in_order: whether the ids are what a packed row may hold; None where there are none.
    """

    queries: Int[Array, "B ..."]
    keys: Int[Array, "B ..."]
    live: Bool[Array, "B T"] | None = None
    in_order: Bool[Array, " B"] | None = None

    @classmethod
    def of(cls, inputs: Inputs, request: Request, settings: TeSettings, most_segments: int) -> Sequences:
        """Reads the masks with arrays."""
        if settings.packed:
            return _packed(inputs, request, settings.shared, most_segments)
        if settings.padding:
            return _padded(inputs, request, settings)
        return cls(*(jnp.full(request.batch, length, jnp.int32) for length in (request.q_len, request.kv_len)))


def _padded(inputs: Inputs, request: Request, settings: TeSettings) -> Sequences:
    """Lengths; a query behind all keys that it may see counts as padding, too.

    So cuDNN computes no row without a key, whose statistics, and gradients with them, would be its own affair.
    """
    lengths = next((mask for mask in inputs.mask if isinstance(mask, Lengths)), None)
    keys = _clipped(None if lengths is None else lengths.kv_lengths, request.kv_len, request.batch)
    queries = _clipped(None if lengths is None else lengths.query_lengths, request.q_len, request.batch)
    if settings.left is not None:
        queries = jnp.minimum(queries, keys + jnp.int32(settings.left))
    queries = jnp.where(keys > 0, queries, 0)
    live = jnp.arange(request.q_len, dtype=jnp.int32)[None] < queries[:, None]
    return Sequences(queries, jnp.where(queries > 0, keys, 0), live)


def _clipped(lengths: Any, longest: int, batch: int) -> Int[Array, " B"]:
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    return jnp.broadcast_to(jnp.clip(jnp.asarray(lengths), 0, longest).astype(jnp.int32), (batch,))


def _packed(inputs: Inputs, request: Request, shared: Shared | None, most: int) -> Sequences:
    """Numbers the runs of equal ids 1, 2, …, 0 where an id is negative, and counts the tokens of each."""
    ids = next(mask for mask in inputs.mask if isinstance(mask, Segments)).query_ids
    ids = jnp.broadcast_to(jnp.asarray(ids), (request.batch, request.q_len))
    order = None
    if shared is not None and shared.order is not None:
        order = load_balanced_order(request.q_len, shared.size, shared.order)
        ids = ids[:, np.argsort(order)]
    live = ids >= 0
    starts = live & jnp.concatenate([jnp.ones_like(live[:, :1]), ids[:, 1:] != ids[:, :-1]], axis=1)
    runs = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    slots = jnp.arange(request.q_len, dtype=jnp.int32)[None]
    positions = slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)
    numbers, positions = jnp.where(live, runs, 0), jnp.where(live, positions, 0)
    in_order = (runs[:, -1] <= most) & (runs[:, -1] == _distinct(ids))
    if order is not None:
        numbers, positions, live = (array[:, order] for array in (numbers, positions, live))
    if shared is not None:
        numbers, positions = (along(array, shared.axis) for array in (numbers, positions))
    return Sequences(numbers, positions, live, in_order)


def _distinct(ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many ids of each row are not negative."""
    ordered = jnp.sort(ids, axis=1)
    first = jnp.concatenate([jnp.ones_like(ordered[:, :1], bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    return jnp.sum(first & (ordered >= 0), axis=1, dtype=jnp.int32)
