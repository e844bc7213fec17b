"""The forward pass: softmax over the blocks of keys as they come, with a running maximum and sum."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from kernelry.plugin import Inputs, Partial, Request, log_sum
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.keys import reader_of
from kernelry_dot_product.blockwise.loops import scanned, visited
from kernelry_dot_product.blockwise.tile import TileIndex, Tiles, product, zero_of
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_queries

_LOWEST = float(jnp.finfo(jnp.float32).min)  # type: ignore[no-untyped-call]
"""Where the running maximum begins: finite, so that the difference to the −inf of a hidden key is −inf, not NaN."""

_Running: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Σ p·v [b, k, R, D], max [b, k, R], Σ p [b, k, R], of R = G·block_q rows."""


def forward(inputs: Inputs, request: Request, grid: Grid) -> Partial:
    """Attends without sinks, step by step over batch and heads, one block of queries at a time; in float32."""
    tiles = Tiles.of(request, grid, inputs)
    visits = visits_of_queries(kinds_of(inputs.mask, grid))
    reader = reader_of(inputs, request, grid)
    zero = zero_of(inputs)
    rows = jnp.arange(grid.rows, dtype=jnp.int32)

    def of_step(_: None, blocks: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        step, queries, held = blocks
        own = visits.of_step(step, grid)

        def of_row(_: None, blocks: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
            row, query, order, full, some = blocks

            def visit(masked: bool, at: jax.Array, running: _Running) -> _Running:
                column = order[at]
                key, value = reader.read(held, step, column)
                return _add(tiles, TileIndex(step, row, column), query, key, value, running, masked)

            start = _nothing(query, request.value_dim, zero)
            return None, _finished(visited(own, visit, (full, some), start, grid.columns))

        return scanned(of_row, None, (rows, queries, own.order, own.full, own.some), grid.rows)

    steps = jnp.arange(grid.steps, dtype=jnp.int32)
    query = grid.split_queries(tiles.scale(inputs.query))
    _, (out, top, lse, rest) = scanned(of_step, None, (steps, query, reader.held), grid.steps)
    max_logits = None
    if request.max_logits:
        max_logits = grid.join_queries(top).max(axis=1, initial=-jnp.inf)
    lse, rest = (grid.join_queries(each).swapaxes(1, 2) for each in (lse, rest))
    out = grid.join_queries(out)
    return Partial(out, lse=lse, max_logits=max_logits, dtype=request.dtype, lse_rest=rest)


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
    rate = tiles.request.dropout_rate
    if rate:
        probability = jnp.where(tiles.kept(index, probability.shape), probability / (1.0 - rate), 0.0)
    more = product("BKRS,BKSD->BKRD", probability.astype(tile.value.dtype), tile.value, tiles.request)
    return total * before[..., None] + more, highest, weight


def _finished(running: _Running) -> tuple[jax.Array, ...]:
    """Output, maximum, lse and what rounding took from it, of a block of queries."""
    total, top, weight = running
    empty = weight == 0
    divisor = jnp.where(empty, 1.0, weight)
    out = jnp.where(empty[..., None], 0.0, total / divisor[..., None])
    lse, rest = log_sum(top, divisor)
    return out, jnp.where(empty, -jnp.inf, top), jnp.where(empty, -jnp.inf, lse), rest
