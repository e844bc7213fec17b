"""A cache of two parts: the prompt, and the tokens decoded after it."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from kernelry._pytree import pytree, short_repr
from kernelry.cache.base import KVCache
from kernelry.cache.parts import CachePart
from kernelry.cache.slots import (
    check_sizes,
    check_tokens,
    counts_like,
    empty,
    is_known,
    varying_as,
    write_first,
    write_rows,
)
from kernelry.errors import ArgumentError, CacheFullError
from kernelry.masks import Mask
from kernelry.request.arguments import known_length
from kernelry.storage import Quantization
from kernelry.storage.quantized import Stored


@final
@pytree(
    "prefill_key",
    "prefill_value",
    "prefill_lengths",
    "decode_key",
    "decode_value",
    "decode_lengths",
    "overflowed",
)
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TwoPartCache(KVCache):
    """A part for prompts and a part for the tokens decoded after them, attended to one by one and merged.

    Slot s of the prefill part has position s; slot j of the decode part of row b has position prefill_lengths[b] + j.
    So a short prompt leaves slots unused, and rows of different length decode together without moving a key. With
    P = 4 and C = 3, the positions in a row with 2 prompt tokens that decoded 2 are

        prefill 0 1 . .   decode 2 3 .

    Args:
      prefill_key, prefill_value: [B, P, K, H] and [B, P, K, D], arrays or QuantizedArrays.
      prefill_lengths: int32 [B], how many slots of each row have tokens, counted from the first.
      decode_key, decode_value: [B, C, K, H] and [B, C, K, D], stored like the prefill part.
      decode_lengths: int32 [B].
      overflowed: a boolean; `prefill` does not unset it.
    """

    __repr__ = short_repr

    prefill_key: Stored
    prefill_value: Stored
    prefill_lengths: Int32[Array, " B"]
    decode_key: Stored
    decode_value: Stored
    decode_lengths: Int32[Array, " B"]
    overflowed: Bool[Array, ""] = dataclasses.field()  # or the property of KVCache would be the default

    @classmethod
    def create(
        cls,
        *,
        batch: int,
        prefill: int,
        decode: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        storage: str | Quantization | None = None,
    ) -> Self:
        """Makes an empty cache.

        Args:
          batch: B, the number of rows.
          prefill, decode: P and C, the slots of each part.
          kv_heads: K.
          head_dim, value_dim: H and D; `value_dim=None` means H.
          dtype: the dtype of keys and values that are not quantised: the queries'.
          storage: None, or how they are quantised: `int8`, `int4` or `float8_e4m3fn`, with `:heads_and_head_dim` for
            one scale per token.

        Raises:
          ArgumentError: a size is not a positive integer, or the storage is unknown.
        """
        width = head_dim if value_dim is None else value_dim
        check_sizes(
            "TwoPartCache",
            batch=batch,
            prefill=prefill,
            decode=decode,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=width,
        )
        return cls(
            empty((batch, prefill, kv_heads, head_dim), dtype, storage),
            empty((batch, prefill, kv_heads, width), dtype, storage),
            jnp.zeros(batch, jnp.int32),
            empty((batch, decode, kv_heads, head_dim), dtype, storage),
            empty((batch, decode, kv_heads, width), dtype, storage),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros((), bool),
        )

    @property
    def lengths(self) -> Int[Array, " B"]:
        return self.prefill_lengths + self.decode_lengths

    def prefill(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"],
        *,
        lengths: Int[Array, " B"] | None = None,
    ) -> Self:
        """Replaces all rows by a prompt, or its first chunk.

        Args:
          key, value: T tokens per row, stored in the cache's dtype.
          lengths: [B], how many of the T are tokens, counted from the first; None means all.

        Raises:
          CacheFullError: the tokens do not fit; nothing was written.
          ShapeError: an array does not fit the cache.
          ArgumentError: lengths are outside [0, T].
        """
        counts = self._counts(key, value, lengths, "prefill")
        nothing = jnp.zeros_like(counts)
        if key.shape[1] <= self._slots("prefill"):
            return dataclasses.replace(
                self,
                prefill_key=write_first(self.prefill_key, key),
                prefill_value=write_first(self.prefill_value, value),
                prefill_lengths=counts,
                decode_lengths=nothing,
            )._varying_as(key, value, counts)
        fits = self._fits(nothing, counts, "prefill")
        written = self._written("prefill", key, value, nothing, counts, fits)
        return dataclasses.replace(written, decode_lengths=jnp.where(fits, nothing, self.decode_lengths))._varying_as(
            key, value, counts
        )

    def prefill_chunk(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"],
        *,
        lengths: Int[Array, " B"] | None = None,
    ) -> Self:
        """Writes the next chunk of the prompts; the first goes to an empty cache, or through `prefill`.

        A row that has decoded takes no more of a prompt, because its decoded tokens follow it: under jit that is an
        overflow.

        Args:
          key, value: T tokens per row.
          lengths: [B], how many of the T are tokens, counted from the first; 0 leaves a row as it is, None means all.

        Raises:
          CacheFullError: the tokens do not fit; nothing was written.
          ShapeError: an array does not fit the cache.
          ArgumentError: a row has decoded, or lengths are outside [0, T].
        """
        counts = self._counts(key, value, lengths, "prefill")
        behind = (counts > 0) & (self.decode_lengths > 0)
        if is_known(behind) and behind.any():
            raise ArgumentError(
                f"prefill_chunk: rows {np.flatnonzero(behind).tolist()} have decoded, and their decoded tokens "
                "follow the prompt: use append, or replace all rows by prefill."
            )
        fits = self._fits(self.prefill_lengths, counts, "prefill") & ~behind.any()
        return self._written("prefill", key, value, self.prefill_lengths, counts, fits)._varying_as(key, value, counts)

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"],
        *,
        lengths: Int[Array, " B"] | None = None,
    ) -> Self:
        counts = self._counts(key, value, lengths, "decode")
        fits = self._fits(self.decode_lengths, counts, "decode")
        return self._written("decode", key, value, self.decode_lengths, counts, fits)

    def parts(self, base: Mask, q_len: int) -> tuple[CachePart, ...]:
        return (
            CachePart(key=self.prefill_key, value=self.prefill_value, lengths=self.prefill_lengths),
            CachePart(
                key=self.decode_key, value=self.decode_value, lengths=self.decode_lengths, offset=self.prefill_lengths
            ),
        )

    def _slots(self, part: str) -> int:
        return known_length(f"TwoPartCache: {part}_key", getattr(self, f"{part}_key"))

    def _varying_as(self, key: Any, value: Any, counts: jax.Array) -> Self:
        """The cache whose decode part varies over manual axes as it will when such tokens are appended."""
        return dataclasses.replace(
            self,
            decode_key=varying_as(key, self.decode_key),
            decode_value=varying_as(value, self.decode_value),
            decode_lengths=varying_as(counts, self.decode_lengths),
            overflowed=varying_as(counts, self.overflowed),
        )

    def _counts(self, key: Any, value: Any, lengths: Any, part: str) -> jax.Array:
        """Checks tokens for one part, and returns their number in each row."""
        batch = self.prefill_lengths.shape[0]
        check_tokens(key, value, (self.prefill_key.shape[-2:], self.prefill_value.shape[-2:]), batch)
        tokens, slots = known_length("key", key), self._slots(part)
        if lengths is None and tokens > slots:  # known under jit, too
            raise CacheFullError(
                f"TwoPartCache: {tokens} tokens per row do not fit into the {slots} slots of the {part} part; "
                f"nothing was written. Create it with a larger {part}=."
            )
        return counts_like(self.prefill_lengths, lengths, tokens)

    def _fits(self, before: jax.Array, counts: jax.Array, part: str) -> jax.Array:
        slots = self._slots(part)
        overflows = (before + counts > slots).any()
        if is_known(overflows) and overflows:
            raise CacheFullError(
                f"TwoPartCache: {counts.tolist()} more tokens do not fit: the {slots} slots of the {part} part already "
                f"have {before.tolist()} tokens; nothing was written. Create it with a larger {part}=."
            )
        return ~overflows

    def _written(
        self, part: str, key: jax.Array, value: jax.Array, before: jax.Array, counts: jax.Array, fits: jax.Array
    ) -> Self:
        """This cache with counts[b] of the tokens in the slots of a part that follow before[b], if they fit."""
        place = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        slots, kept = before[:, None] + place, (place < counts[:, None]) & fits
        after: dict[str, Any] = {
            f"{part}_{name}": write_rows(getattr(self, f"{part}_{name}"), new, slots, kept)
            for name, new in (("key", key), ("value", value))
        }
        after[f"{part}_lengths"] = jnp.where(fits, before + counts, getattr(self, f"{part}_lengths"))
        return dataclasses.replace(self, overflowed=self.overflowed | ~fits, **after)
