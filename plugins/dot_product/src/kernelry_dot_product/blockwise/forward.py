"""The forward pass: softmax over the keys at once where they are few, else over their blocks as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from kernelry.plugin import Inputs, Partial, Request, log_sum
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.keys import reader_of
from kernelry_dot_product.blockwise.loops import scanned, visited
from kernelry_dot_product.blockwise.spans import Span, spans_of
from kernelry_dot_product.blockwise.tile import TileIndex, Tiles, product, zero_of
from kernelry_dot_product.blockwise.visits import Visits, kinds_of, visits_of_queries

_LOWEST = float(jnp.finfo(jnp.float32).min)  # type: ignore[no-untyped-call]
"""Where the running maximum begins: finite, so that the difference to the −inf of a hidden key is −inf, not NaN."""

_Running: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Σ p·v [b, k, R, D], max [b, k, R], Σ p [b, k, R], of R = G·block_q rows."""

_Step: TypeAlias = Callable[[jax.Array], tuple[jax.Array, ...]]
"""step → what `_finished` returns, for all blocks of queries of the step."""


def forward(inputs: Inputs, request: Request, grid: Grid) -> Partial:
    """Attends without sinks, step by step over batch and heads, one block of queries at a time; in float32."""
    tiles = Tiles.of(request, grid, inputs)
    spans = spans_of(inputs.mask, request, grid)
    of_step = _by_span(tiles, spans) if spans else _by_block(tiles, visits_of_queries(kinds_of(inputs.mask, grid)))
    batch, length, heads, _ = inputs.query.shape
    statistic = jnp.full((batch, length, heads), zero_of(inputs))
    start = (jnp.full((batch, length, heads, request.value_dim), zero_of(inputs)), *(statistic,) * 3)

    def put(whole: tuple[jax.Array, ...], step: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        parts = zip(whole, of_step(step), strict=True)
        return tuple(grid.put_queries(array, blocks, step) for array, blocks in parts), None

    steps = jnp.arange(grid.steps, dtype=jnp.int32)
    (out, top, lse, rest), _ = scanned(put, start, steps, grid.steps)
    max_logits = top.max(axis=1, initial=-jnp.inf) if request.max_logits else None
    return Partial(
        out, lse=lse.swapaxes(1, 2), max_logits=max_logits, dtype=request.dtype, lse_rest=rest.swapaxes(1, 2)
    )


def _by_block(tiles: Tiles, visits: Visits) -> _Step:
    """Loops over blocks of queries and over blocks of keys, with a running maximum and sum."""
    inputs, request, grid = tiles.inputs, tiles.request, tiles.grid
    reader = reader_of(inputs, request, grid)
    zero = zero_of(inputs)
    rows = jnp.arange(grid.rows, dtype=jnp.int32)

    def of_step(step: jax.Array) -> tuple[jax.Array, ...]:
        own = visits.of_step(step, grid)
        queries, held = tiles.scale(grid.split_queries(inputs.query, step)), reader.of_step(step)

        def of_row(_: None, blocks: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
            row, query, order, full, some = blocks

            def visit(masked: bool, at: jax.Array, running: _Running) -> _Running:
                column = order[at]
                key, value = reader.read(held, step, column)
                return _add(tiles, TileIndex(step, row, column), query, key, value, running, masked)

            start = _nothing(query, request.value_dim, zero)
            return None, _finished(visited(own, visit, (full, some), start, grid.columns))

        _, found = scanned(of_row, None, (rows, queries, own.order, own.full, own.some), grid.rows)
        return tuple(found)

    return of_step


def _by_span(tiles: Tiles, spans: tuple[Span, ...]) -> _Step:
    """One tile for a block of queries, of just the keys that it sees: no running maximum, and no loop."""
    inputs, grid = tiles.inputs, tiles.grid

    def of_step(step: jax.Array) -> tuple[jax.Array, ...]:
        queries = tiles.scale(grid.split_queries(inputs.query, step))
        keys, values = (grid.split_keys(array, step)[0] for array in (inputs.key, inputs.value))

        def of_row(row: int, span: Span) -> tuple[jax.Array, ...]:
            own, index = span.of(tiles), TileIndex(step, row, 0)
            tile = own(index, queries[row], span.cut(keys), span.cut(values), span.masked)
            top = jnp.maximum(tile.logits.max(axis=-1), _LOWEST)
            probability = jnp.exp(tile.logits - top[..., None])
            return _finished((_weighted(own, index, probability, tile.value), top, probability.sum(axis=-1)))

        found = [of_row(row, span) for row, span in enumerate(spans)]
        return tuple(jnp.stack(each) for each in zip(*found, strict=True))

    return of_step


def _nothing(query: jax.Array, value_dim: int, zero: jax.Array) -> _Running:
    rows = query.shape[:3]
    start = jnp.full(rows, zero)
    return jnp.full((*rows, value_dim), zero), start + _LOWEST, start


def _add(
    tiles: Tiles, index: TileIndex, query: jax.Array, key: jax.Array, value: jax.Array, running: _Running, masked: bool
) -> _Running:
    total, top, weight = running
    tile = tiles(index, query, key, value, masked)
    highest = jnp.maximum(top, tile.logits.max(axis=-1))
    probability = jnp.exp(tile.logits - highest[..., None])
    before = jnp.exp(top - highest)
    weight = weight * before + probability.sum(axis=-1)
    return total * before[..., None] + _weighted(tiles, index, probability, tile.value), highest, weight


def _weighted(tiles: Tiles, index: TileIndex, probability: jax.Array, value: jax.Array) -> jax.Array:
    """Σ p·v [b, k, R, D] of a tile, with dropout."""
    rate = tiles.request.dropout_rate
    if rate:
        probability = jnp.where(tiles.kept(index, probability.shape), probability / (1.0 - rate), 0.0)
    return product("BKRS,BKSD->BKRD", probability.astype(value.dtype), value, tiles.request)


def _finished(running: _Running) -> tuple[jax.Array, ...]:
    """Output, maximum, lse and what rounding took from it, of a block of queries."""
    total, top, weight = running
    empty = weight == 0
    divisor = jnp.where(empty, 1.0, weight)
    out = jnp.where(empty[..., None], 0.0, total / divisor[..., None])
    lse, rest = log_sum(top, divisor)
    return out, jnp.where(empty, -jnp.inf, top), jnp.where(empty, -jnp.inf, lse), rest
