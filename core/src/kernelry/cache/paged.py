"""A cache whose rows take pages from one pool: no slot is reserved before a row needs it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernelry._pytree import pytree, short_repr
from kernelry.cache.base import KVCache
from kernelry.cache.paged_table import (
    Allocation,
    PageTable,
    allocated,
    as_rows,
    first_of_each,
    release,
    share,
)
from kernelry.cache.paged_view import PagedView
from kernelry.cache.parts import CachePart
from kernelry.cache.slots import check_layout, check_sizes, empty, is_known
from kernelry.errors import ArgumentError, CacheFullError, ShapeError
from kernelry.masks import Mask
from kernelry.storage import INTERLEAVED, SEPARATE, PagedArray, Quantization, ValueInKey
from kernelry.storage.quantized import Stored


@final
@pytree("keys", "values", "table", "lengths", "references", "overflowed")
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedCache(KVCache):
    """Keys and values of R rows and any number of layers in P pages, found through one table.

    Token i of row r is, in every layer l, at `keys[l][table[r, i // page_size], i % page_size]`:

        lengths  table               pages of 4 slots
        r=0  6   2  0 −1 −1          0: r₀t₄ r₀t₅  ·    ·         references  1
        r=1  4   2 −1 −1 −1          1:  ·    ·    ·    ·                     0 (free)
        r=2  0  −1 −1 −1 −1          2: r₀t₀ r₀t₁ r₀t₂ r₀t₃                   2 (row 1 is a fork of row 0)

    A page is shared by the rows that were forked, until one of them writes to it: a partly filled page that is shared
    is copied first. The contents of free slots are arbitrary and never seen.

    Every operation is traceable, and if the cache is donated (`jax.jit(…, donate_argnums=…)`) pages are written in
    place. A step of a model with several layers calls `allocate` once, and in each layer `view(layer=…)` with its
    `write` and `attend`; a cache of one layer has `append` and `decode`, which do both. After an overflow under jit,
    `allocate` and `write` do nothing: the cache stays as it was before the step that failed.

    With `layout="value_in_key"` the values are the first D columns of the keys, as in absorbed multi-head latent
    attention, and tokens are written as `append(key, None)`. With `layout="interleaved"` pages hold each key head and
    its value one after the other, which some kernels read in one piece. Either way there are no other values.

    Args:
      keys, values: one entry per layer, [P, page_size, K, H] and [P, page_size, K, D], arrays or QuantizedArrays; in
        another layout than `separate` there are no values, and interleaved keys are arrays [P, page_size, 2·K, H].
      table: int32 [R, M]; −1 where there is no page.
      lengths: int32 [R], the number of tokens in each row.
      references: int32 [P], how many entries of the table point to each page; 0 means free.
      overflowed: a boolean, whether tokens did not fit.
      max_length: the largest number of tokens in a row.
      layout: how keys and values are stored relative to each other.
      value_width: D, where values are stored with the keys; else None.
    """

    __repr__ = short_repr

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    table: Int[Array, "R M"]
    # field(), or the dataclass would take the protocol's property as the default.
    lengths: Int[Array, " R"] = dataclasses.field()
    references: Int[Array, " P"]
    overflowed: Bool[Array, ""] = dataclasses.field()
    max_length: int
    layout: str = SEPARATE
    value_width: int | None = None

    @classmethod
    def create(
        cls,
        *,
        rows: int,
        pages: int,
        page_size: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        layers: int = 1,
        dtype: Any = jnp.bfloat16,
        storage: str | Quantization | None = None,
        layout: str = SEPARATE,
    ) -> Self:
        """Makes an empty cache.

        Args:
          rows, pages, layers: R, P and the number of layers.
          page_size, max_length: in tokens; the table has ceil(max_length / page_size) entries per row.
          kv_heads, head_dim, value_dim: K, H and D; `value_dim=None` means H.
          dtype: the dtype of the pages if they are not quantised.
          storage: how they are quantised, e.g. `int8`; None means not at all.
          layout: `separate`; `value_in_key`, with D ≤ H; or `interleaved`, with D = H and without `storage`.

        Raises:
          ArgumentError: a size is not a positive integer, the storage or the layout is unknown, or they do not go
            together.
        """
        width = head_dim if value_dim is None else value_dim
        check_sizes(
            "PagedCache",
            rows=rows,
            pages=pages,
            page_size=page_size,
            max_length=max_length,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=width,
            layers=layers,
        )
        check_layout("PagedCache", layout, head_dim, width, storage)
        slots, rows_of_heads = (pages, page_size), 2 * kv_heads if layout == INTERLEAVED else kv_heads
        apart = layers if layout == SEPARATE else 0
        return cls(
            keys=tuple(empty((*slots, rows_of_heads, head_dim), dtype, storage) for _ in range(layers)),
            values=tuple(empty((*slots, kv_heads, width), dtype, storage) for _ in range(apart)),
            table=jnp.full((rows, math.ceil(max_length / page_size)), -1, jnp.int32),
            lengths=jnp.zeros(rows, jnp.int32),
            references=jnp.zeros(pages, jnp.int32),
            overflowed=jnp.zeros((), bool),
            max_length=int(max_length),
            layout=layout,
            value_width=None if layout == SEPARATE else int(width),
        )

    @property
    def page_size(self) -> int:
        """The slots of a page."""
        return self.keys[0].shape[1]

    def of_layer(self, layer: int, table: Int[Array, "B M"]) -> tuple[PagedArray, PagedArray | ValueInKey]:
        """The keys and values of one layer in the pages of a table, as `kernelry.attention` takes them."""
        if self.value_width is None:
            return PagedArray(self.keys[layer], table), PagedArray(self.values[layer], table)
        return PagedArray(self.keys[layer], table, self.layout == INTERLEAVED), ValueInKey(self.value_width)

    @property
    def free_pages(self) -> Int[Array, ""]:
        """The number of pages that no row uses."""
        return (self.references == 0).sum(dtype=jnp.int32)

    def allocate(self, counts: Int[Array, " R"]) -> Self:
        """Extends row r by counts[r] tokens in all layers, for `write` to fill.

        Takes the lowest free pages, row after row. The last page of a row is copied if it is partly filled and, after
        the rows before it, still shared. Either all rows are extended or none.

        Args:
          counts: [R], not negative.

        Raises:
          CacheFullError: there are too few pages, or a row would become too long.
          ShapeError, ArgumentError: counts are not integers [R], or one is negative.
        """
        counts = self._counts(counts)
        allocation = allocated(self._pages, counts, self.page_size, self.max_length)
        if is_known(allocation.needed):
            self._refuse(allocation, counts)
        done = allocation.fits & ~self.overflowed
        source, target = allocation.source, jnp.where(done, allocation.target, self.references.shape[0])

        def copied(pages: jax.Array) -> jax.Array:
            return pages.at[target].set(pages.at[source].get(mode="clip"), mode="drop")

        keys, values = jax.tree.map(copied, (self.keys, self.values))
        after = jax.tree.map(lambda new, old: jnp.where(done, new, old), allocation.table, self._pages)
        overflowed = self.overflowed | ~allocation.fits
        return dataclasses.replace(self._with(after), keys=keys, values=values, overflowed=overflowed)

    def write(
        self,
        layer: int,
        key: Float[Array, "R T K H"],
        value: Float[Array, "R T K D"] | None,
        *,
        lengths: Int[Array, " R"] | None = None,
    ) -> Self:
        """Writes the last tokens of every row into one layer; see `PagedView.write`."""
        written: Self = self.view(layer=layer).write(key, value, lengths=lengths).cache
        return written

    def append(
        self,
        key: Float[Array, "R T K H"],
        value: Float[Array, "R T K D"] | None,
        *,
        lengths: Int[Array, " R"] | None = None,
    ) -> Self:
        appended: Self = self.view().append(key, value, lengths=lengths).cache
        return appended

    def prefill(
        self,
        key: Float[Array, "R T K H"],
        value: Float[Array, "R T K D"] | None,
        *,
        lengths: Int[Array, " R"] | None = None,
    ) -> Self:
        """Frees all rows, then appends.

        Raises:
          CacheFullError, ShapeError, ArgumentError: as for `append`.
        """
        freed, counts = self.free(jnp.arange(self.table.shape[0])), self.view().counts(key, value, lengths)
        allocation = allocated(freed._pages, counts, self.page_size, self.max_length)
        if is_known(allocation.needed):
            return freed.append(key, value, lengths=lengths)  # an error where they do not fit
        done = allocation.fits & ~self.overflowed
        pages = jax.tree.map(lambda new, old: jnp.where(done, new, old), freed._pages, self._pages)
        kept = dataclasses.replace(self._with(pages), overflowed=self.overflowed | ~allocation.fits)
        return kept.append(key, value, lengths=lengths)

    def free(self, rows: int | Int[Array, "*n"]) -> Self:
        """Empties rows; pages that no other row shares become free.

        Args:
          rows: a row or rows [n]. One out of range is an error; under jit it is ignored.

        Raises:
          ArgumentError: a row is out of range.
          ShapeError: the rows are not integers.
        """
        return self._with(release(self._pages, as_rows("rows", rows, self.table.shape[0])))

    def fork(
        self,
        source: int | Int[Array, "*n"],
        target: int | Int[Array, "*n"],
        length: int | Int[Array, "*n"] | None = None,
    ) -> Self:
        """Lets target rows, freed first, begin with the tokens of source rows; no token is copied.

        Several forks happen at once: sources are read as they were before. So `fork(parents, jnp.arange(R))` reorders
        the rows of a beam search, and `fork(r, r, n)` shortens row r to n tokens, e.g. when drafted ones are rejected.

        Args:
          source, target: a row or rows [n]; all targets differ. One out of range is an error; under jit such a source
            is empty, such a target is ignored, and of a target given twice the first counts.
          length: how many tokens of the source; None means all. More than it has is an error, and under jit means all.

        Raises:
          ArgumentError: a row or a length is out of range, or two targets are the same.
          ShapeError: they are not integers, or of different lengths.
        """
        rows = self.table.shape[0]
        froms, tos = as_rows("source", source, rows), as_rows("target", target, rows)
        if froms.shape != tos.shape:
            raise ShapeError(f"source and target must have the same length, got {froms.shape[0]} and {tos.shape[0]}.")
        if is_known(tos) and len(set(tos.tolist())) < tos.shape[0]:
            raise ArgumentError(f"target={tos.tolist()} names a row twice; a row can be the fork of one row only.")
        have = self.lengths.at[froms].get(mode="fill", fill_value=0)
        if length is None:
            return self._with(share(self._pages, froms, tos, have, self.page_size))
        given = length if isinstance(length, jax.Array) else np.asarray(length)
        if not jnp.issubdtype(given.dtype, jnp.integer) or given.shape not in ((), froms.shape):
            raise ShapeError(
                f"length must be an integer or integers [{froms.shape[0]}], got {given.dtype} of shape {given.shape}."
            )
        wanted = jnp.broadcast_to(jnp.asarray(given, jnp.int32), froms.shape)
        outside = (wanted < 0) | (wanted > have)
        if is_known(outside) and outside.any():
            raise ArgumentError(f"length={np.asarray(length).tolist()} must lie within 0 … {have.tolist()}.")
        return self._with(share(self._pages, froms, tos, wanted, self.page_size))

    def view(self, rows: Int[Array, " B"] | None = None, layer: int = 0, shared_pages: int = 0) -> PagedView:
        """Returns some rows and one layer as a cache, to attend to and to write.

        Args:
          rows: [B], all different; None means all rows. One out of range or given twice is an error; under jit it is
            an empty row.
          layer: the number of the layer.
          shared_pages: how many full pages at the beginning are the same in every row that is not empty: they are
            attended to once for all rows (cascade attention). If they are not the same, that is an error, and under
            jit the result is NaN.

        Raises:
          ArgumentError: a row, the layer or shared_pages is out of range, or a row is given twice.
          ShapeError: rows are not integers [B].
        """
        if not isinstance(layer, int | np.integer) or not 0 <= layer < len(self.keys):
            raise ArgumentError(f"layer={layer!r} is out of range: the cache has layers 0 … {len(self.keys) - 1}.")
        if not isinstance(shared_pages, int | np.integer) or not 0 <= shared_pages <= self.table.shape[1]:
            raise ArgumentError(f"shared_pages={shared_pages!r} must be an integer, 0 … {self.table.shape[1]}.")
        if rows is None:
            return PagedView(self, None, int(layer), int(shared_pages))
        if np.ndim(rows) != 1:
            raise ShapeError(f"rows must be integers [B], got shape {np.shape(rows)}.")
        found = as_rows("rows", rows, self.table.shape[0])
        if is_known(found) and len(set(found.tolist())) < found.shape[0]:
            raise ArgumentError(f"rows={found.tolist()} names a row twice.")
        return PagedView(self, first_of_each(found, self.table.shape[0]), int(layer), int(shared_pages))

    def parts(self, base: Mask, q_len: int) -> tuple[CachePart, ...]:
        return self.view().parts(base, q_len)

    @property
    def _pages(self) -> PageTable:
        return PageTable(self.table, self.lengths, self.references)

    def _with(self, pages: PageTable) -> Self:
        entries, lengths, references = pages
        return dataclasses.replace(self, table=entries, lengths=lengths, references=references)

    def _counts(self, given: Any) -> Int[Array, " R"]:
        found = given if isinstance(given, jax.Array) else np.asarray(given)
        if found.shape != self.lengths.shape or not jnp.issubdtype(found.dtype, jnp.integer):
            raise ShapeError(
                f"counts must be integers [R] = [{self.lengths.shape[0]}], got {found.dtype} of shape {found.shape}."
            )
        counts: jax.Array = jnp.asarray(found, jnp.int32)
        if is_known(counts) and (counts < 0).any():
            raise ArgumentError(
                f"counts={counts.tolist()} must not be negative; fork(row, row, length) shortens a row."
            )
        return counts

    def _refuse(self, allocation: Allocation, counts: Int[Array, " R"]) -> None:
        """Raises CacheFullError if rows do not fit, which must be known."""
        long = np.flatnonzero(allocation.too_long).tolist()
        if long:
            after = [int(self.lengths[row]) + int(counts[row]) for row in long]
            raise CacheFullError(
                f"PagedCache: rows {long} would have {after} tokens, and max_length is {self.max_length}: free them, "
                "or create the cache with a larger max_length."
            )
        if allocation.needed > allocation.free:
            raise CacheFullError(
                f"PagedCache: {allocation.needed} more pages are needed, and {allocation.free} of "
                f"{self.references.shape[0]} are free: free rows, or create the cache with more pages."
            )
