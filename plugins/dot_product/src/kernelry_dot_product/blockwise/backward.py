"""The backward pass: probabilities recomputed from lse, one pass over the tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Operand, Request
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.keys import plain
from kernelry_dot_product.blockwise.loops import scanned, visited
from kernelry_dot_product.blockwise.spans import Span, spans_of
from kernelry_dot_product.blockwise.tile import Tile, TileIndex, Tiles, bias_window, padded_bias, product, zero_of
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_keys

_Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""d_query [rows, b, k, R, H], d_key and d_value [b, k, H or D, block_kv] of one block of keys, d_bias."""


class _Rows(NamedTuple):
    """A block of R = G·block_q queries, or all of a step, with one dimension in front.

    Queries and the cotangents of the output come in both orders: XLA's product on CPU is more than twice as fast where
    neither operand has to be transposed, and a row's are transposed once, not once a tile.
    """

    query: Float[Array, "... b k R H"]
    d_out: Float[Array, "... b k R D"]
    query_turned: Float[Array, "... b k H R"]
    d_out_turned: Float[Array, "... b k D R"]
    lse: Float[Array, "... b k R"]
    delta: Float[Array, "... b k R"]

    def at(self, row: jax.Array) -> _Rows:
        """One of the blocks in front."""
        return _Rows(*(lax.dynamic_index_in_dim(array, row, keepdims=False) for array in self))


class _Cotangents(NamedTuple):
    """What comes from the output: lse and delta [B, N, T], d_out [B, T, N, D]."""

    lse: jax.Array
    delta: jax.Array
    d_out: jax.Array

    def rows(self, tiles: Tiles, step: jax.Array) -> _Rows:
        """The blocks of queries of a step."""
        request, grid = tiles.request, tiles.grid
        query = tiles.scale(grid.split_queries(tiles.inputs.query, step))
        d_out = grid.split_queries(self.d_out.astype(tiles.inputs.value.dtype), step)
        lse = grid.split_queries(self.lse.swapaxes(1, 2), step, fill=jnp.inf)
        delta = grid.split_queries(self.delta.swapaxes(1, 2), step)
        if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
            sees = (lse < jnp.inf)[..., None]
            query, d_out = jnp.where(sees, query, 0), jnp.where(sees, d_out, 0)
        return _Rows(query, d_out, _turned(query), _turned(d_out), lse, delta)


_Step: TypeAlias = Callable[[Any, Any], tuple[Any, tuple[jax.Array, ...]]]
"""(d_bias, step) → d_bias, and the gradients of queries, keys and values of that step, in blocks."""


def backward(
    inputs: Inputs,
    request: Request,
    grid: Grid,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
) -> Gradients:
    """Returns the gradients of a part of the keys.

    Args:
      inputs: the arrays of the call. request: what it asks for. grid: its blocks.
      lse: [B, N, T] of the whole attention; +inf where this part's row is empty.
      delta: [B, N, T], Σ out · d_out of the whole attention, less the cotangent of lse.
      d_out: [B, T, N, D].
    """
    spans = spans_of(inputs.mask, request, grid)
    inputs = plain(inputs, request)
    tiles = Tiles.of(request, grid, inputs)
    cotangents = _Cotangents(lse, delta, d_out)
    zero = zero_of(inputs, lse, delta, d_out)
    wanted = Operand.BIAS in request.gradients and inputs.bias is not None
    d_bias = jnp.full(padded_bias(inputs.bias, grid).shape, zero) if wanted else None  # type: ignore[union-attr]
    of_step = _by_span(tiles, cotangents, spans, zero) if spans else _by_block(tiles, cotangents, zero)
    scale = jnp.float32(request.scale)

    def put(whole: tuple[Any, ...], step: jax.Array) -> tuple[tuple[Any, ...], None]:
        d_bias, (query, key, value) = of_step(whole[3], step)
        d_query = grid.put_queries(whole[0], query * scale, step)
        d_key = grid.put_keys(whole[1], key if tiles.scaled else key * scale, step)
        return (d_query, d_key, grid.put_keys(whole[2], value, step), d_bias), None

    steps = jnp.arange(grid.steps, dtype=jnp.int32)
    start = (*(jnp.full(array.shape, zero) for array in (inputs.query, inputs.key, inputs.value)), d_bias)
    (d_query, d_key, d_value, d_bias), _ = scanned(put, start, steps, grid.steps)
    if d_bias is not None and inputs.bias is not None:
        d_bias = d_bias[:, :, : inputs.bias.shape[2], : inputs.bias.shape[3]]
    return Gradients(d_query, d_key, d_value, d_bias)


def _by_block(tiles: Tiles, cotangents: _Cotangents, zero: jax.Array) -> _Step:
    """Loops over blocks of keys and over the blocks of queries that see them."""
    inputs, grid = tiles.inputs, tiles.grid
    visits = visits_of_keys(kinds_of(inputs.mask, grid))
    columns = jnp.arange(grid.columns, dtype=jnp.int32)

    def of_step(d_bias: jax.Array | None, step: jax.Array) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
        own = visits.of_step(step, grid)
        rows = cotangents.rows(tiles, step)

        def of_column(sums: tuple[jax.Array, jax.Array | None], blocks: tuple[jax.Array, ...]):  # type: ignore[no-untyped-def]
            column, key, value, order, full, some = blocks

            def visit(masked: bool, at: jax.Array, now: _Sums) -> _Sums:
                index = TileIndex(step, order[at], column)
                row = rows.at(index.row)
                d_query, d_key, d_value, d_bias = now
                tile = tiles(index, row.query, key, value, masked)
                d_bias, (of_query, of_key, of_value) = _shares(tiles, index, tile, row, d_bias)
                return d_query.at[index.row].add(of_query), d_key + of_key, d_value + of_value, d_bias

            now: _Sums = (sums[0], _zeros_turned(key, zero), _zeros_turned(value, zero), sums[1])
            d_query, d_key, d_value, d_bias = visited(own, visit, (full, some), now, grid.rows)
            return (d_query, d_bias), (_turned(d_key), _turned(d_value))

        start = (jnp.full(rows.query.shape, zero), d_bias)
        keys, values = grid.split_keys(inputs.key, step), grid.split_keys(inputs.value, step)
        blocks = (columns, keys, values, own.order, own.full, own.some)
        (d_query, d_bias), (d_key, d_value) = scanned(of_column, start, blocks, grid.columns)
        return d_bias, (d_query, d_key, d_value)

    return of_step


def _by_span(tiles: Tiles, cotangents: _Cotangents, spans: tuple[Span, ...], zero: jax.Array) -> _Step:
    """One tile for a block of queries, as in the forward pass; the gradients of keys are summed over them."""
    inputs, grid = tiles.inputs, tiles.grid

    def of_step(d_bias: jax.Array | None, step: jax.Array) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
        rows = cotangents.rows(tiles, step)
        keys, values = (grid.split_keys(array, step)[0] for array in (inputs.key, inputs.value))
        d_query, d_key, d_value = [], _zeros_turned(keys, zero), _zeros_turned(values, zero)
        for number, span in enumerate(spans):
            own, index, row = span.of(tiles), TileIndex(step, number, 0), _Rows(*(array[number] for array in rows))
            tile = own(index, row.query, span.cut(keys), span.cut(values), span.masked)
            d_bias, (of_query, of_key, of_value) = _shares(own, index, tile, row, d_bias)
            d_query.append(of_query)
            d_key = d_key.at[..., span.start : span.stop].add(of_key)
            d_value = d_value.at[..., span.start : span.stop].add(of_value)
        return d_bias, (jnp.stack(d_query), _turned(d_key)[None], _turned(d_value)[None])

    return of_step


def _turned(array: jax.Array) -> jax.Array:
    return array.swapaxes(-1, -2)


def _zeros_turned(array: jax.Array, zero: jax.Array) -> jax.Array:
    return jnp.full(_turned(array).shape, zero)


def _shares(
    tiles: Tiles, index: TileIndex, tile: Tile, row: _Rows, d_bias: jax.Array | None
) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array, jax.Array]]:
    """d_bias with a tile's share, and the shares of the query [b, k, R, H], key [b, k, H, S] and value [b, k, D, S]."""
    request = tiles.request
    probability = jnp.exp(tile.logits - row.lse[..., None])
    d_probability = product("BKRD,BKSD->BKRS", row.d_out, tile.value, request)
    kept = probability
    if request.dropout_rate:
        keep = tiles.kept(index, probability.shape)
        factor = 1.0 / (1.0 - request.dropout_rate)
        kept = jnp.where(keep, probability * factor, 0.0)
        d_probability = jnp.where(keep, d_probability * factor, 0.0)
    d_logits = probability * (d_probability - row.delta[..., None])
    d_biased = d_logits
    if request.soft_cap is not None:
        capped = tile.logits if tile.capped is None else tile.capped
        d_logits = d_logits * (1.0 - jnp.square(capped / jnp.float32(request.soft_cap)))
        if tile.visible is not None:
            d_logits = jnp.where(tile.visible, tiles.apart(d_logits), 0.0).reshape(d_logits.shape)
    if d_bias is not None:
        d_bias = _with_bias(d_bias, tiles, index, d_biased if request.bias_after_cap else d_logits)
    d_logits, kept = d_logits.astype(row.query.dtype), kept.astype(row.query.dtype)
    of_query = product("BKRS,BKSH->BKRH", d_logits, tile.key, request)
    of_key = _over_rows("BKHR,BKRS->BKHS", row.query_turned, d_logits, tiles)
    of_value = _over_rows("BKDR,BKRS->BKDS", row.d_out_turned, kept, tiles)
    return d_bias, (of_query, of_key, of_value)


def _over_rows(equation: str, turned: jax.Array, tile: jax.Array, tiles: Tiles) -> jax.Array:
    """Sums over the rows of a tile.

    Without a loop around it XLA on CPU folds the turn into the product, and then has none for bfloat16 (0.10 … 0.12).
    """
    if 1 in (tiles.grid.rows, tiles.grid.columns):
        turned, tile = turned.astype(jnp.float32), tile.astype(jnp.float32)
    return product(equation, turned, tile, tiles.request)


def _with_bias(d_bias: jax.Array, tiles: Tiles, index: TileIndex, d_logits: jax.Array) -> jax.Array:
    """Adds a tile's share, summed over the dimensions along which the bias is the same."""
    tile = tiles.apart(d_logits)
    batch, heads, groups, rows, slots = tile.shape
    tile = tile.reshape(batch, heads * groups, rows, slots)
    starts, sizes = bias_window(d_bias.shape, tiles.grid, index)
    shared = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    share = tile.sum(axis=shared, keepdims=True) if shared else tile
    return lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, starts, sizes) + share, starts)
