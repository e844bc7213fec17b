"""Which page holds which tokens: arithmetic on the page table, without the pages themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernelry.cache.slots import is_known
from kernelry.errors import ArgumentError, ShapeError


class PageTable(NamedTuple):
    """The pages of every row.

    Law: references[p] is the number of entries that are p; a page with none is free.

    Args:
      entries: int32 [R, M], the page of each run of page_size tokens; −1 where there is none.
      lengths: int32 [R], the number of tokens in each row.
      references: int32 [P].
    """

    entries: Int[Array, "R M"]
    lengths: Int[Array, " R"]
    references: Int[Array, " P"]


class Allocation(NamedTuple):
    """The pages that extending rows takes.

    Args:
      table: the table afterwards; undefined if the rows do not fit.
      source, target: [R], the page that each row copies, and the page it copies it to; P where it copies none.
      needed, free: numbers of pages.
      too_long: [R], the rows that would exceed the largest length.
    """

    table: PageTable
    source: Int[Array, " R"]
    target: Int[Array, " R"]
    needed: Int[Array, ""]
    free: Int[Array, ""]
    too_long: Bool[Array, " R"]

    @property
    def fits(self) -> Bool[Array, ""]:
        """Whether there are enough pages and no row becomes too long."""
        return (self.needed <= self.free) & ~self.too_long.any()


def allocated(table: PageTable, counts: Int[Array, " R"], page_size: int, max_length: int) -> Allocation:
    """Extends row r by counts[r] tokens, row after row, each taking the lowest free pages.

    Args:
      table: the table before.
      counts: [R], numbers of tokens; a negative one counts as too long.
      page_size, max_length: in tokens.
    """
    entries, before, references = table
    pages = references.shape[0]
    too_long = (counts > max_length - before) | (counts < 0)  # before + counts may not fit int32
    after = before + jnp.where(too_long, 0, counts)
    held, wanted = -(-before // page_size), -(-after // page_size)

    last = entry(entries, held - 1)
    copies = _copies(last, (after > before) & (before % page_size != 0), references)
    first = held - copies.astype(jnp.int32)  # the first entry that is new
    taken = wanted - first
    needed = taken.sum(dtype=jnp.int32)

    free = references == 0
    (lowest,) = jnp.nonzero(free, size=pages, fill_value=pages)
    slots = jnp.arange(entries.shape[1], dtype=jnp.int32)[None]
    nth = (jnp.cumsum(taken) - taken - first)[:, None] + slots  # of the pages taken by all rows
    fresh = lowest.astype(jnp.int32).at[nth].get(mode="fill", fill_value=pages)
    entries = jnp.where((slots >= first[:, None]) & (slots < wanted[:, None]), fresh, entries)

    source = jnp.where(copies, last, pages)
    target = jnp.where(copies, entry(entries, held - 1), pages)
    references = jnp.where(free & (jnp.cumsum(free) <= needed), 1, references).at[source].add(-1, mode="drop")
    return Allocation(
        PageTable(entries, after, references), source, target, needed, free.sum(dtype=jnp.int32), too_long
    )


def _copies(last: Int[Array, " R"], writes: Bool[Array, " R"], references: Int[Array, " P"]) -> Bool[Array, " R"]:
    """Which rows copy their last page before they write to it: those that still share it when their turn comes.

    Of k entries that point to a page, the first k − 1 rows that write to it copy it; the k-th has it for itself.
    """
    earlier = jnp.tril(last[:, None] == last[None], -1) & writes[None]
    return writes & (earlier.sum(axis=1, dtype=jnp.int32) < references.at[last].get(mode="clip") - 1)


def release(table: PageTable, rows: Int[Array, " n"]) -> PageTable:
    """Empties rows; those out of range are ignored."""
    count = table.lengths.shape[0]
    rows = first_of_each(rows, count)
    return PageTable(
        table.entries.at[rows].set(-1, mode="drop"),
        table.lengths.at[rows].set(0, mode="drop"),
        _refer(table.references, rows_of(table.entries, rows), -1),
    )


def share(
    table: PageTable, source: Int[Array, " n"], target: Int[Array, " n"], lengths: Int[Array, " n"], page_size: int
) -> PageTable:
    """Gives each target row, emptied first, the pages of the first tokens of its source row.

    Args:
      table: the table before.
      source: rows, as they were before; one out of range is empty.
      target: rows; one out of range, and any repetition of a row, is ignored.
      lengths: numbers of tokens, clipped to those of the source.
      page_size: in tokens.
    """
    count, slots = table.lengths.shape[0], jnp.arange(table.entries.shape[1], dtype=jnp.int32)
    lengths = jnp.clip(lengths, 0, table.lengths.at[source].get(mode="fill", fill_value=0))
    shared = jnp.where(slots[None] < -(-lengths // page_size)[:, None], rows_of(table.entries, source), -1)
    target = first_of_each(target, count)
    emptied = release(table, target)
    real = (target < count)[:, None]
    return PageTable(
        emptied.entries.at[target].set(shared, mode="drop"),
        emptied.lengths.at[target].set(lengths, mode="drop"),
        _refer(emptied.references, jnp.where(real, shared, -1), 1),
    )


def first_of_each(rows: Int[Array, " n"], count: int) -> Int[Array, " n"]:
    """Replaces every repetition of a row by `count`, which is out of range."""
    again = jnp.tril(rows[:, None] == rows[None], -1).any(axis=1)
    return jnp.where(again, count, rows)


def entry(entries: Int[Array, "R M"], slots: Int[Array, " R"]) -> Int[Array, " R"]:
    """Returns entries[r, slots[r]], with the slots clipped to the table."""
    found: jax.Array = jnp.take_along_axis(entries, slots[:, None], axis=1, mode="clip")[:, 0]
    return found


def rows_of(entries: Int[Array, "R M"], rows: Int[Array, " n"]) -> Int[Array, "n M"]:
    """Returns rows of the table; one out of range has no pages."""
    return entries.at[rows].get(mode="fill", fill_value=-1)


def as_rows(name: str, rows: Any, count: int) -> Int[Array, " n"]:
    """Reads the numbers of rows, one or [n].

    Returns:
      int32 [n]; under jit a row out of range becomes `count`, which indexing ignores.

    Raises:
      ShapeError: they are not integers, or have two dimensions or more.
      ArgumentError: one is known to be out of range.
    """
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if given.ndim > 1 or (given.size and not jnp.issubdtype(given.dtype, jnp.integer)):
        raise ShapeError(f"{name} must be an integer or integers [n], got {given.dtype}{list(given.shape)}.")
    array = jnp.atleast_1d(jnp.asarray(given, jnp.int32))
    outside = (array < 0) | (array >= count)
    if is_known(outside) and outside.any():
        raise ArgumentError(f"{name}={np.asarray(rows).tolist()} is out of range: the cache has rows 0 … {count - 1}.")
    return jnp.where(outside, count, array)


def _refer(references: Int[Array, " P"], entries: Int[Array, "n M"], by: int) -> Int[Array, " P"]:
    """Adds a number to the references of every page among the entries; −1 is not a page."""
    return references.at[jnp.where(entries < 0, references.shape[0], entries)].add(by, mode="drop")
