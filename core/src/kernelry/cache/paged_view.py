"""Some rows and one layer of a PagedCache."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self, Unpack, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernelry._pytree import pytree, short_repr
from kernelry.cache.base import AttendOptions, KVCache
from kernelry.cache.paged_table import rows_of
from kernelry.cache.parts import CachePart
from kernelry.cache.prefix import SharedPrefix
from kernelry.cache.slots import check_keys_alone, check_tokens, interleaved, is_known, token_counts, write
from kernelry.errors import ArgumentError
from kernelry.masks import Mask
from kernelry.storage import INTERLEAVED, VALUE_IN_KEY, ValueInKey
from kernelry.storage.quantized import Stored

if TYPE_CHECKING:
    from kernelry.cache.paged import PagedCache


@final
@pytree("cache", "rows")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PagedView(KVCache):
    """Some rows and one layer of a PagedCache; `cache.view(rows, layer, shared_pages)` makes one.

    `write` and `append` return a view whose `cache` has the new tokens.

    Args:
      cache: the cache that the rows belong to.
      rows: int32 [B]; None means all. A number beyond the last row means an empty row.
      layer: the number of the layer.
      shared_pages: how many pages at the beginning all rows share.
    """

    __repr__ = short_repr

    cache: PagedCache
    rows: Int[Array, " B"] | None
    layer: int = 0
    shared_pages: int = 0

    @property
    def lengths(self) -> Int[Array, " B"]:
        return self._of_rows(self.cache.lengths)

    @property
    def overflowed(self) -> Bool[Array, ""]:
        return self.cache.overflowed

    def recovered(self) -> Self:
        return dataclasses.replace(self, cache=self.cache.recovered())

    @property
    def table(self) -> Int[Array, "B M"]:
        """The pages of the rows."""
        return self.cache.table if self.rows is None else rows_of(self.cache.table, self.rows)

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"] | None,
        *,
        lengths: Int[Array, " B"] | None = None,
    ) -> Self:
        layers = len(self.cache.keys)
        if layers > 1:
            raise ArgumentError(
                f"append writes one layer, and this cache has {layers}: allocate(counts) once, and then "
                "view(layer=…).write(key, value) in each."
            )
        counts = self.counts(key, value, lengths)
        if self.rows is not None:
            counts = jnp.zeros_like(self.cache.lengths).at[self.rows].set(counts, mode="drop")
        return dataclasses.replace(self, cache=self.cache.allocate(counts)).write(key, value, lengths=lengths)

    def write(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"] | None,
        *,
        lengths: Int[Array, " B"] | None = None,
    ) -> Self:
        """Writes the last tokens of each row, whose slots `allocate` has taken.

        Args:
          key, value: T tokens per row; the value is None where the cache has `layout="value_in_key"`.
          lengths: [B], how many of the T are tokens, counted from the first; None means all.

        Raises:
          ArgumentError: a row has fewer tokens, or they are in a page that was shared since `allocate`. Under jit
            nothing is written then, and `overflowed` is set.
          ShapeError: an array does not fit the cache.
        """
        counts, q_len = self.counts(key, value, lengths), key.shape[1]
        size, nth = self.cache.page_size, jnp.arange(q_len, dtype=jnp.int32)[None]
        places = (self.lengths - counts)[:, None] + nth
        pages = jnp.take_along_axis(self.table, places // size, axis=1, mode="clip")
        meant = nth < counts[:, None]
        own = (places >= 0) & (pages >= 0) & (self.cache.references.at[pages].get(mode="clip") == 1)
        lost = (meant & ~own).any()
        if is_known(lost) and lost:
            raise ArgumentError(
                f"write: rows of {self.lengths.tolist()} tokens cannot take their last {counts.tolist()}: allocate "
                "them first, and fork rows only after they are written in every layer."
            )
        overflowed = self.overflowed | lost
        kept = meant & ~overflowed

        def put(layers: tuple[Stored, ...], new: jax.Array) -> tuple[Stored, ...]:
            written = write(layers[self.layer], new, pages, places % size, kept)
            return (*layers[: self.layer], written, *layers[self.layer + 1 :])

        if value is not None and self.cache.layout == INTERLEAVED:
            key = interleaved(key, value)
        keys = put(self.cache.keys, key)
        values = put(self.cache.values, value) if value is not None and self.cache.values else ()
        return dataclasses.replace(
            self, cache=dataclasses.replace(self.cache, keys=keys, values=values, overflowed=overflowed)
        )

    def parts(self, base: Mask, q_len: int) -> tuple[CachePart, ...]:
        key, value = self.cache.of_layer(self.layer, self.table)
        return (CachePart(key=key, value=value, lengths=self.lengths),)

    def attend(self, query: Float[Array, "B T N H"], **options: Unpack[AttendOptions]) -> Any:
        if not self.shared_pages or query.ndim != 4:
            return KVCache.attend(self, query, **options)
        if options.get("prefix") is not None:
            raise ArgumentError("shared_pages and prefix= both say what all rows begin with: pass one of them.")
        counts = token_counts(options.get("lengths"), query.shape[0], query.shape[1])
        rest = self._rest(counts)
        # The queries of an empty row see nothing.
        whole: AttendOptions = {
            **options,
            "prefix": self._beginning(),
            "lengths": jnp.where(self.lengths == 0, 0, counts),
        }
        return rest.attend(query, **whole)

    def _beginning(self) -> SharedPrefix:
        """The shared pages of the first row that is not empty."""
        first = jnp.argmax(self.lengths > 0)
        key, value = self.cache.of_layer(self.layer, self.table[first][None, : self.shared_pages])
        if not isinstance(value, ValueInKey):
            pair: tuple[Any, Any] = key.gather(), value.gather()
        else:
            pair = key.gather_pair() if key.interleaved else (key.gather(), value)
        return SharedPrefix(*jax.tree.map(lambda array: array[0], pair))

    def _rest(self, counts: Int[Array, " B"]) -> PagedCache:
        """The tokens of each row after the shared pages, as a separate cache that is only read."""
        table, lengths, shared = self.table, self.lengths, self.shared_pages
        tokens = shared * self.cache.page_size
        begins = table[:, :shared]
        same = (begins == begins[jnp.argmax(lengths > 0)][None]).all(axis=1)
        # A causal mask shows the shared tokens to all queries: those that come later, or are the last shared token.
        behind = lengths - jnp.maximum(counts, 1) >= tokens - 1
        wrong = (lengths > 0) & ~(same & behind)
        if is_known(wrong) and wrong.any():
            raise ArgumentError(
                f"shared_pages={shared}: rows {np.flatnonzero(wrong).tolist()} do not begin with the same {tokens} "
                "tokens as the first one, followed by the queries: fork them from one row, or share fewer pages."
            )
        return dataclasses.replace(
            self.cache,
            keys=self.cache.keys[self.layer :][:1],
            values=self.cache.values[self.layer :][:1],
            table=table[:, shared:],
            lengths=jnp.maximum(lengths - tokens, 0),
            overflowed=self.overflowed | wrong.any(),
        )

    def _of_rows(self, array: jax.Array) -> jax.Array:
        return array if self.rows is None else array.at[self.rows].get(mode="fill", fill_value=0)

    def counts(self, key: Any, value: Any, lengths: Any) -> Int[Array, " B"]:
        """Checks tokens for the rows, and returns their number in each."""
        batch, cache = self.lengths.shape[0], self.cache
        heads, head_dim = cache.keys[self.layer].shape[-2:]
        if cache.layout == VALUE_IN_KEY:
            check_keys_alone(key, value, (heads, head_dim), batch)
        elif cache.layout == INTERLEAVED:
            check_tokens(key, value, ((heads // 2, head_dim),) * 2, batch)
        else:
            check_tokens(key, value, ((heads, head_dim), cache.values[self.layer].shape[-2:]), batch)
        return token_counts(lengths, batch, key.shape[1])
