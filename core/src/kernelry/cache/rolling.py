"""A cache of the most recent tokens, for layers that look no further back."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from kernelry._pytree import pytree, short_repr
from kernelry.cache.base import KVCache
from kernelry.cache.parts import CachePart
from kernelry.cache.prefix import is_placed
from kernelry.cache.slots import (
    check_sizes,
    check_tokens,
    counts_like,
    empty,
    sharded_like,
    stored_like,
    write_rows,
)
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks import Atom, AtomKind, Mask, MaskForm
from kernelry.request.arguments import known_length
from kernelry.storage import Quantization
from kernelry.storage.quantized import Stored


@final
@pytree("key", "value", "lengths")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RollingCache(KVCache):
    """A ring of the last tokens, for windows and chunks: memory O(window) however long a row becomes.

    The token at position p is in slot p mod S, where S = window + max_append − 1, so that of up to `max_append` tokens
    appended at once the first still has its whole window. With window 3 and max_append 2, S is 4, and after 6 tokens
    the positions of the slots are

        4 5 2 3

    It never overflows. A prompt of any length goes through `prefill`, which keeps its end; attention over the prompt
    itself is a separate `kernelry.attention(query, key, value, mask=…, mode="prefill")`, with `& Lengths(lengths)` for
    rows of different length. Or the prompt is processed in chunks of up to max_append tokens, each by `append` and
    `attend`.

    Args:
      key, value: [B, S, K, H] and [B, S, K, D], arrays or QuantizedArrays.
      lengths: int32 [B], the number of tokens in each row so far, including those no longer kept.
      window: how many positions a query sees, including its own: `SlidingWindow(window − 1)`, `Chunked(window)`.
    """

    __repr__ = short_repr

    key: Stored
    value: Stored
    lengths: Int32[Array, " B"] = dataclasses.field()  # or the property of KVCache would be the default
    window: int

    @classmethod
    def create(
        cls,
        *,
        batch: int,
        window: int,
        kv_heads: int,
        head_dim: int,
        max_append: int = 1,
        value_dim: int | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        storage: str | Quantization | None = None,
    ) -> Self:
        """Makes an empty cache.

        Args:
          batch: B, the number of rows.
          window: how many positions a query sees, including its own.
          kv_heads: K.
          head_dim, value_dim: H and D; `value_dim=None` means H.
          max_append: the largest number of tokens per row that `append` takes.
          dtype: the dtype of keys and values that are not quantised: the queries'.
          storage: None, or how they are quantised: `int8`, `int4` or `float8_e4m3fn`, with `:heads_and_head_dim` for
            one scale per token.

        Raises:
          ArgumentError: a size is not a positive integer, or the storage is unknown.
        """
        width = head_dim if value_dim is None else value_dim
        check_sizes(
            "RollingCache",
            batch=batch,
            window=window,
            max_append=max_append,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=width,
        )
        slots = window + max_append - 1
        return cls(
            empty((batch, slots, kv_heads, head_dim), dtype, storage),
            empty((batch, slots, kv_heads, width), dtype, storage),
            jnp.zeros(batch, jnp.int32),
            int(window),
        )

    @property
    def overflowed(self) -> jax.Array:
        """Never."""
        return jnp.zeros((), bool)

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return known_length("RollingCache: key", self.key)

    @property
    def max_append(self) -> int:
        """The largest number of tokens per row that `append` takes."""
        return self.capacity - self.window + 1

    def prefill(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"],
        *,
        lengths: Array | None = None,
    ) -> Self:
        """Replaces all rows by a prompt of any length, of which the last S tokens are kept.

        Args:
          key, value: T tokens per row.
          lengths: [B], how many of the T are tokens, counted from the first; None means all.

        Raises:
          ShapeError: an array does not fit the cache.
          ArgumentError: lengths are outside [0, T].
        """
        counts = self._counts(key, value, lengths)
        if key.shape[1] == 0:
            return dataclasses.replace(self, lengths=counts)
        positions = self._positions(counts)

        def kept(array: jax.Array, positions: jax.Array, like: Stored) -> Stored:
            source = positions[..., None, None]  # below 0 nothing is written
            taken = stored_like(jnp.take_along_axis(jnp.asarray(array), jnp.maximum(source, 0), axis=1), like)
            written: Stored = jax.tree.map(lambda new, old: jnp.where(source < 0, old, new), taken, like)
            return written

        return dataclasses.replace(
            self,
            key=sharded_like(self.key, kept, key, positions, self.key),
            value=sharded_like(self.value, kept, value, positions, self.value),
            lengths=counts,
        )

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"],
        *,
        lengths: Array | None = None,
    ) -> Self:
        """Writes the next tokens of every row over the oldest.

        Args:
          key, value: T ≤ max_append tokens per row.
          lengths: [B], how many of the T are tokens, counted from the first; None means all.

        Raises:
          ShapeError: an array does not fit the cache.
          ArgumentError: lengths are outside [0, T].
        """
        counts = self._counts(key, value, lengths)
        tokens = key.shape[1]
        if tokens > self.max_append:
            raise ShapeError(
                f"RollingCache: append takes up to max_append={self.max_append} tokens per row, got {tokens}: create "
                f"it with max_append={tokens}, or start a prompt with prefill."
            )
        place = jnp.arange(tokens, dtype=jnp.int32)[None]
        slots = (self.lengths[:, None] + place) % self.capacity
        kept = place < counts[:, None]
        return dataclasses.replace(
            self,
            key=write_rows(self.key, key, slots, kept),
            value=write_rows(self.value, value, slots, kept),
            lengths=self.lengths + counts,
        )

    def parts(self, base: Mask, q_len: int) -> tuple[CachePart, ...]:
        form = base.form
        if is_placed(base) or not _within(form, self.window):
            raise ArgumentError(
                f"RollingCache keeps a window of {self.window} positions, and mask={base!r} may look further back: use "
                f"SlidingWindow({self.window - 1}) or Chunked({self.window}) or less, or a TwoPartCache."
            )
        if q_len > self.max_append:
            raise ArgumentError(
                f"RollingCache: {q_len} queries look back further than max_append={self.max_append} lets them: create "
                f"it with max_append={q_len}, or attend to a prompt with kernelry.attention and pass it to prefill."
            )
        return (
            CachePart(
                key=self.key,
                value=self.value,
                lengths=jnp.minimum(self.lengths, self.capacity),
                positions=self._positions(self.lengths),
                seen=q_len == 1 and _shows_all(form, self.capacity),
            ),
        )

    def _positions(self, lengths: jax.Array) -> jax.Array:
        """The positions of the slots [B, S] after so many tokens: the last of those that share a slot."""
        last = lengths[:, None] - 1
        slot = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        return last - (last - slot) % self.capacity

    def _counts(self, key: Any, value: Any, lengths: Any) -> jax.Array:
        """Checks tokens, and returns their number in each row."""
        check_tokens(key, value, (self.key.shape[-2:], self.value.shape[-2:]), self.lengths.shape[0])
        return counts_like(self.lengths, lengths, known_length("key", key))


def _within(form: MaskForm, window: int) -> bool:
    """Whether a mask certainly hides every key `window` or more positions before the query."""
    return any(_looks_back(atom, window) for atom in form.atoms)


def _looks_back(atom: Atom, window: int) -> bool:
    left, _ = atom.mask_class.band_around(atom)
    if left is not None:
        return left < window
    return atom.kind is AtomKind.ANY_OF and all(_within(form, window) for form in atom.params)


def _shows_all(form: MaskForm, slots: int) -> bool:
    """Whether the last token certainly sees the `slots` tokens up to itself."""
    return all(atom.is_band and atom.params[0] is not None and atom.params[0] >= slots - 1 for atom in form.atoms)
