"""What the rows of a call see of their pages, in the terms of the vendor's kernels."""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Int32

from kernelry.plugin import Inputs, Request, Side, Tiling, pytree, round_up
from kernelry_tpu_flywheel.paged.layout import (
    TILE,
    has_query_lengths,
    is_causal,
    left_of,
    page_size_of,
    pages_seen,
)


@final
@pytree("table", "ends", "queries", "nothing", "absent", "expressible")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a call, each from its first page that a query sees.

    Args:
      table: int32 [B, M'], no entry is negative: one of no page, or behind the last page, is 0 and never read.
      ends: [B], the slots of each row from there up to the last that a query sees; 0 for a row that sees nothing, or
        that sees a page that does not exist.
      queries: [B], how many of the T queries there are.
      nothing: [B, T], the queries that see nothing.
      absent: [B, T], the queries that see a page that does not exist: their result is NaN.
      expressible: whether the vendor's kernels compute these rows: each query sees the slots up to its own distance
        from the last, as far back as the window goes, and what is copied with them is finite.
    """

    table: Int32[Array, "B M"]
    ends: Int32[Array, " B"]
    queries: Int32[Array, " B"]
    nothing: Bool[Array, "B T"]
    absent: Bool[Array, "B T"]
    expressible: Bool[Array, ""]

    @classmethod
    def of(cls, inputs: Inputs, request: Request, tiling: Tiling) -> Rows:
        """Reads the mask and the table, and looks at the slots that are copied although no query sees them."""
        keys, page_size = inputs.key, page_size_of(request)
        seen = visible(inputs, request, Side.kv(request.kv_len))[:, 0]
        slots = jnp.arange(request.kv_len, dtype=jnp.int32)[None, None]
        end = jnp.where(seen, slots + 1, 0).max(axis=2)
        first = jnp.minimum(jnp.where(seen, slots, request.kv_len).min(axis=2), end)
        nothing = end == 0
        nth = jnp.arange(request.q_len, dtype=jnp.int32)[None]
        queries = jnp.full(request.batch, request.q_len, jnp.int32)
        if has_query_lengths(request):
            queries = jnp.where(nothing, 0, nth + 1).max(axis=1)
        ends, first_slot = end.max(axis=1), jnp.where(nothing, request.kv_len, first).min(axis=1)
        first_slot = jnp.minimum(first_slot, ends)
        meant_first, meant_end = _meant(ends[:, None], nth - queries[:, None], request)
        meant_end = jnp.where(nth < queries[:, None], meant_end, 0)
        alike = (end == meant_end) & (nothing | (first == meant_first))
        alike &= seen.sum(axis=2) == end - first
        exists = (keys.table >= 0) & (keys.table < keys.pages.shape[0])
        page = jnp.arange(keys.table.shape[1], dtype=jnp.int32)[None, None] * page_size
        reached = (page < end[:, :, None]) & (page + page_size > first[:, :, None])
        absent = (reached & ~exists[:, None]).any(axis=2)
        first_page = first_slot // page_size
        table = _from_page(jnp.where(exists, keys.table, 0).astype(jnp.int32), first_page, request, tiling)
        served = jnp.where(absent.any(axis=1), 0, ends)
        clean = _copied_is_finite(keys.pages, jnp.where(exists, keys.table, 0), first_slot, served, request)
        # A row of which some queries see no page is computed page by page, so that the others have their result.
        whole = (absent | nothing).all(axis=1) | ~absent.any(axis=1)
        return cls(
            table,
            jnp.where(served > 0, served - first_page * page_size, 0),
            queries,
            nothing,
            absent,
            alike.all() & clean & whole.all(),
        )


def visible(inputs: Inputs, request: Request, kv: Side) -> Bool[Array, "B 1 T L"]:
    """Which of some slots each query sees."""
    query = Side.query(request.q_len)
    found: jax.Array = jnp.ones((request.batch, 1, request.q_len, kv.slots.shape[-1]), bool)
    for mask in inputs.mask:
        found = found & mask.evaluate(query, kv)
    return found


def _meant(
    ends: Int32[Array, "B 1"], behind: Int32[Array, "B T"], request: Request
) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """What the vendor's kernels let each query see: the first slot, and one behind the last; 0 where it sees nothing.

    Args:
      ends: of the rows.
      behind: how far each query is from one behind the last; negative.
    """
    own = ends + behind
    end = jnp.maximum(own + 1, 0) if is_causal(request) else jnp.broadcast_to(ends, own.shape)
    left = left_of(request)
    first = jnp.zeros_like(own) if left is None else jnp.maximum(own - left, 0)
    return first, jnp.where(ends > 0, end, 0)


def _from_page(
    table: Int32[Array, "B M"], first_page: Int32[Array, " B"], request: Request, tiling: Tiling
) -> Int32[Array, "B M"]:
    """The table from the first page that a row sees, as long as whole blocks are."""
    unit = tiling["block_kv"] // page_size_of(request)
    if left_of(request) is not None:
        places = first_page[:, None] + jnp.arange(pages_seen(request), dtype=jnp.int32)[None]
        table = jnp.take_along_axis(table, jnp.minimum(places, table.shape[1] - 1), axis=1)
    more = round_up(table.shape[1], unit) - table.shape[1]
    return jnp.pad(table, ((0, 0), (0, more))) if more else table


def _copied_is_finite(
    pages: BFloat16[Array, "P page_size twice_K H"],
    table: Int32[Array, "B M"],
    first_slot: Int32[Array, " B"],
    ends: Int32[Array, " B"],
    request: Request,
) -> Bool[Array, ""]:
    """Whether values that the kernels copy, and multiply by 0, are finite.

    They are in the last tile of each row, and in its first page before a window.
    """
    page_size = page_size_of(request)
    nth = jnp.arange(TILE, dtype=jnp.int32)[None]
    last = jnp.maximum(ends - 1, 0) // TILE * TILE
    slots = last[:, None] + nth
    tile = pages[_page_at(table, last // page_size)[:, None], slots % page_size]
    fine = (jnp.isfinite(tile[:, :, 1::2]).all(axis=(2, 3)) | (slots < ends[:, None])).all(axis=1)
    if left_of(request) is not None:
        nth = jnp.arange(page_size, dtype=jnp.int32)[None]
        page = pages[_page_at(table, first_slot // page_size)[:, None], nth]
        before = nth < (first_slot % page_size)[:, None]
        fine &= (jnp.isfinite(page[:, :, 1::2]).all(axis=(2, 3)) | ~before).all(axis=1)
    return (fine | (ends == 0)).all()


def _page_at(table: Int32[Array, "B M"], place: Int32[Array, " B"]) -> Int32[Array, " B"]:
    return jnp.take_along_axis(table, jnp.minimum(place, table.shape[1] - 1)[:, None], axis=1)[:, 0]
