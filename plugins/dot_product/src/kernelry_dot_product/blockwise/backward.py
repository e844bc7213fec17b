"""The backward pass: probabilities recomputed from lse, one pass over the tiles."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Operand, Request
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.keys import plain
from kernelry_dot_product.blockwise.loops import scanned, visited
from kernelry_dot_product.blockwise.tile import Tile, TileIndex, Tiles, bias_window, padded_bias, product, zero_of
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_keys

_Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""d_query [rows, b, k, R, H], d_key and d_value [b, k, H or D, block_kv] of one block of keys, d_bias."""


class _Rows(NamedTuple):
    """A block of R = G·block_q queries, or all of a step, or of all steps, with these dimensions in front.

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
    inputs = plain(inputs, request)
    tiles = Tiles.of(request, grid, inputs)
    visits = visits_of_keys(kinds_of(inputs.mask, grid))
    zero = zero_of(inputs, lse, delta, d_out)
    wanted = Operand.BIAS in request.gradients and inputs.bias is not None
    d_bias = jnp.full(padded_bias(inputs.bias, grid).shape, zero) if wanted else None  # type: ignore[union-attr]
    columns = jnp.arange(grid.columns, dtype=jnp.int32)

    def of_step(d_bias: jax.Array | None, blocks: tuple[Any, ...]):  # type: ignore[no-untyped-def]
        step, rows, keys, values = blocks
        own = visits.of_step(step, grid)

        def of_column(sums: tuple[jax.Array, jax.Array | None], blocks: tuple[jax.Array, ...]):  # type: ignore[no-untyped-def]
            column, key, value, order, full, some = blocks

            def visit(masked: bool, at: jax.Array, now: _Sums) -> _Sums:
                index = TileIndex(step, order[at], column)
                row = rows.at(index.row)
                return _add(tiles, index, tiles(index, row.query, key, value, masked), row, now)

            now: _Sums = (sums[0], _zeros_turned(key, zero), _zeros_turned(value, zero), sums[1])
            d_query, d_key, d_value, d_bias = visited(own, visit, (full, some), now, grid.rows)
            return (d_query, d_bias), (_turned(d_key), _turned(d_value))

        start = (jnp.full(rows.query.shape, zero), d_bias)
        blocks = (columns, keys, values, own.order, own.full, own.some)
        (d_query, d_bias), (d_key, d_value) = scanned(of_column, start, blocks, grid.columns)
        return d_bias, (d_query, d_key, d_value)

    steps = jnp.arange(grid.steps, dtype=jnp.int32)
    keys, values = grid.split_keys(inputs.key), grid.split_keys(inputs.value)
    blocks = (steps, _rows_of(tiles, lse, delta, d_out), keys, values)
    d_bias, (d_query, d_key, d_value) = scanned(of_step, d_bias, blocks, grid.steps)
    scale = jnp.float32(request.scale)
    if d_bias is not None and inputs.bias is not None:
        d_bias = d_bias[:, :, : inputs.bias.shape[2], : inputs.bias.shape[3]]
    return Gradients(
        grid.join_queries(d_query * scale),
        grid.join_keys(d_key if tiles.scaled else d_key * scale),
        grid.join_keys(d_value),
        d_bias,
    )


def _rows_of(tiles: Tiles, lse: jax.Array, delta: jax.Array, d_out: jax.Array) -> _Rows:
    request, grid = tiles.request, tiles.grid
    query, d_out = tiles.scale(tiles.inputs.query), d_out.astype(tiles.inputs.value.dtype)
    if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        sees = (lse < jnp.inf).swapaxes(1, 2)[..., None]
        query, d_out = jnp.where(sees, query, 0), jnp.where(sees, d_out, 0)
    query, d_out = grid.split_queries(query), grid.split_queries(d_out)
    return _Rows(
        query,
        d_out,
        _turned(query),
        _turned(d_out),
        grid.split_queries(lse.swapaxes(1, 2), fill=jnp.inf),
        grid.split_queries(delta.swapaxes(1, 2)),
    )


def _turned(array: jax.Array) -> jax.Array:
    return array.swapaxes(-1, -2)


def _zeros_turned(array: jax.Array, zero: jax.Array) -> jax.Array:
    return jnp.full(_turned(array).shape, zero)


def _add(tiles: Tiles, index: TileIndex, tile: Tile, row: _Rows, sums: _Sums) -> _Sums:
    d_query, d_key, d_value, d_bias = sums
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
    more = product("BKRS,BKSH->BKRH", d_logits, tile.key, request)
    d_query = d_query.at[index.row].add(more)
    d_key = d_key + _over_rows("BKHR,BKRS->BKHS", row.query_turned, d_logits, tiles)
    d_value = d_value + _over_rows("BKDR,BKRS->BKDS", row.d_out_turned, kept, tiles)
    return d_query, d_key, d_value, d_bias


def _over_rows(equation: str, turned: jax.Array, tile: jax.Array, tiles: Tiles) -> jax.Array:
    """Sums over the rows of a tile.

    Without a loop around it XLA on CPU folds the turn into the product, and then has none for bfloat16 (0.10 … 0.12).
    """
    if tiles.grid.rows == 1:
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
