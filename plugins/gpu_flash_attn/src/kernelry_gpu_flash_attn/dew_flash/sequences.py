"""Rows of a batch as FlashAttention's packed sequences: one after another, told by where each starts."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernelry.masks import Lengths, Segments
from kernelry.plugin import Inputs, Request
from kernelry_gpu_flash_attn.dew_flash.settings import Packing, Settings

Rows: TypeAlias = tuple[jax.Array, ...]
"""What decides about the rows of a batch, each of B first: ids [B, T]; or lengths of queries and keys, both [B]."""


def rows_of(inputs: Inputs, request: Request) -> Rows:
    """Reads the mask with arrays, if there is one."""
    for mask in inputs.mask:
        if isinstance(mask, Segments):
            ids = jnp.asarray(mask.query_ids)
            return (jnp.broadcast_to(ids if ids.ndim == 2 else ids[None], (request.batch, request.q_len)),)
        if isinstance(mask, Lengths):
            return (
                _clipped(mask.query_lengths, request.q_len, request.batch),
                _clipped(mask.kv_lengths, request.kv_len, request.batch),
            )
    return ()


def _clipped(lengths: object, longest: int, batch: int) -> Int[Array, " B"]:
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    return jnp.broadcast_to(jnp.clip(jnp.asarray(lengths), 0, longest).astype(jnp.int32), (batch,))


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The rows of a batch, packed.

    Args:
      starts: where the sequences start among the B · T queries and the B · S keys, and where the last ends, int32
        [B · runs + 1].
      live_rows, live_slots: which queries see some key, and which keys some query sees.
      run: each query's sequence, counted within its row.
      in_order: whether the ids are what packed sequences can express; None where there are none.
    """

    starts: tuple[Int[Array, " R"], Int[Array, " R"]]
    live_rows: Bool[Array, "B T"]
    live_slots: Bool[Array, "B S"]
    run: Int[Array, "B T"]
    in_order: Bool[Array, " B"] | None = None

    @classmethod
    def of(cls, rows: Rows, settings: Settings) -> Sequences:
        """Packs the rows of a batch."""
        if settings.packing is Packing.LENGTHS:
            query_lengths, kv_lengths = rows
            return _of_lengths(query_lengths, kv_lengths, settings)
        (ids,) = rows
        return _of_segments(ids, settings.runs)

    @property
    def runs(self) -> int:
        """How many sequences each row is."""
        return (self.starts[0].shape[0] - 1) // self.run.shape[0]

    def lse_by_row(self, lse: jax.Array) -> Float[Array, "B N T"]:
        """Brings the vendor's logsumexp of packed sequences into kernelry's layout."""
        batch, q_len = self.run.shape
        if lse.ndim == 2:
            return lse.reshape(-1, batch, q_len).swapaxes(0, 1)
        sequence = jnp.arange(batch, dtype=jnp.int32)[:, None] * self.runs + self.run
        place = jnp.arange(batch * q_len, dtype=jnp.int32).reshape(batch, q_len) - self.starts[0][sequence]
        return jnp.moveaxis(lse[sequence, :, place], 2, 1)

    def lse_by_sequence(self, lse: Float[Array, "B N T"], *, hopper: bool) -> jax.Array:
        """Brings a logsumexp into the vendor's layout for packed sequences; behind the end of one it is +inf."""
        batch, heads, q_len = lse.shape
        if hopper:
            return lse.swapaxes(0, 1).reshape(heads, batch * q_len)
        starts, ends = self.starts[0][:-1, None], self.starts[0][1:, None]
        token = starts + jnp.arange(q_len, dtype=jnp.int32)[None]
        inside = token < ends
        token = jnp.where(inside, token, 0)
        found = lse[token // q_len, :, token % q_len]  # [sequences, T, N]
        return jnp.moveaxis(jnp.where(inside[..., None], found, jnp.inf), 2, 1)


def _of_segments(ids: Int[Array, "B T"], most: int) -> Sequences:
    """Each run of equal ids is a sequence, and so is each run of negative ones, of which nothing is kept."""
    length = ids.shape[1]
    live = ids >= 0
    ids = jnp.where(live, ids, jnp.asarray(0, ids.dtype))
    changes = (ids[:, 1:] != ids[:, :-1]) | (live[:, 1:] != live[:, :-1])
    first = jnp.concatenate([jnp.ones_like(live[:, :1]), changes], axis=1)
    run = jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1
    before = (run[:, None, :] < jnp.arange(most, dtype=jnp.int32)[None, :, None]).sum(axis=2, dtype=jnp.int32)
    starts = _joined(before, length)
    in_order = (run[:, -1] < most) & ((first & live).sum(axis=1) == _distinct(ids, live))
    return Sequences((starts, starts), live, live, jnp.minimum(run, most - 1), in_order)


def _distinct(ids: Int[Array, "B T"], live: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """How many ids of each row are not negative."""
    hidden, ordered = jax.lax.sort((~live, ids), dimension=1, num_keys=2)
    first = jnp.concatenate([jnp.ones_like(live[:, :1]), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    return (first & ~hidden).sum(axis=1)


def _of_lengths(query_lengths: Int[Array, " B"], kv_lengths: Int[Array, " B"], settings: Settings) -> Sequences:
    """All queries with the keys before the length; the keys behind it are a sequence without queries.

    A row without keys keeps all of them, so that no sequence has queries and no keys; none of its queries is live.
    """
    q_len, kv_len = settings.longest
    batch = query_lengths.shape[0]
    has_keys = (kv_lengths > 0)[:, None]
    live_rows = has_keys & (jnp.arange(q_len, dtype=jnp.int32)[None] < query_lengths[:, None])
    live_slots = (query_lengths > 0)[:, None] & (jnp.arange(kv_len, dtype=jnp.int32)[None] < kv_lengths[:, None])
    zero = jnp.zeros_like(kv_lengths)
    queries = jnp.stack([zero, jnp.full_like(zero, q_len)], axis=1)
    keys = jnp.stack([zero, jnp.where(kv_lengths > 0, kv_lengths, kv_len)], axis=1)
    starts = _joined(queries, q_len), _joined(keys, kv_len)
    return Sequences(starts, live_rows, live_slots, jnp.zeros((batch, q_len), jnp.int32))


def _joined(starts: Int[Array, "B R"], length: int) -> Int[Array, " BR_1"]:
    """Where the sequences of all rows start, the rows one after another, and the end of the last."""
    batch = starts.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * length
    return jnp.append((starts + rows).reshape(-1), jnp.int32(batch * length))
