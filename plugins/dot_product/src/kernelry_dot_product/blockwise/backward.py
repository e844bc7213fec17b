"""The backward pass: probabilities recomputed from lse, one pass over the tiles."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Operand, Request
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.tile import Tile, Tiles, bias_window, padded_bias, product, zero_of
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_keys

_Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""d_query [rows, B, K, R, H], d_key and d_value [B, K, H or D, block_kv] of one block of keys, d_bias."""


class _Row(NamedTuple):
    """A block of R = G·block_q queries, or all of them with the blocks in front.

    Queries and the cotangents of the output come in both orders: XLA's product on CPU is more than twice as fast where
    neither operand has to be turned around, and a row's are turned once, not once a tile.
    """

    query: Float[Array, "... B K R H"]
    d_out: Float[Array, "... B K R D"]
    query_turned: Float[Array, "... B K H R"]
    d_out_turned: Float[Array, "... B K D R"]
    lse: Float[Array, "... B K R"]
    delta: Float[Array, "... B K R"]


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
      inputs: the arrays of the call. request: what it wants. grid: its blocks.
      lse: [B, N, T] of the whole attention; +inf where this part's row is empty.
      delta: [B, N, T], Σ out · d_out of the whole attention, less the cotangent of lse.
      d_out: [B, T, N, D].
    """
    tiles = Tiles.of(request, grid, inputs)
    visits = visits_of_keys(kinds_of(inputs.mask, grid))
    by_row = _by_row(tiles, lse, delta, d_out)
    queries = by_row.query
    wanted = Operand.BIAS in request.gradients and inputs.bias is not None
    zero = zero_of(inputs, lse, delta, d_out)
    d_bias = jnp.full(padded_bias(inputs.bias, grid).shape, zero) if wanted else None  # type: ignore[union-attr]

    def of_column(sums: tuple[jax.Array, jax.Array | None], blocks: tuple[jax.Array, ...]):  # type: ignore[no-untyped-def]
        column, key, value, order, full, some = blocks

        def visit(masked: bool, place: jax.Array, now: _Sums) -> _Sums:
            row = order[place]
            own = _Row(*(lax.dynamic_index_in_dim(array, row, keepdims=False) for array in by_row))
            tile = tiles(row, column, own.query, key, value, masked)
            return _step(tiles, (row, column), tile, own, now)

        nothing = (jnp.full(_turned(key).shape, zero), jnp.full(_turned(value).shape, zero))
        now: _Sums = (sums[0], *nothing, sums[1])
        if visits.any_full:
            now = lax.fori_loop(0, full, lambda place, now: visit(False, place, now), now)
        if visits.any_partial:
            now = lax.fori_loop(full, some, lambda place, now: visit(True, place, now), now)
        d_query, d_key, d_value, bias_sum = now
        return (d_query, bias_sum), (_turned(d_key), _turned(d_value))

    columns = jnp.arange(grid.columns, dtype=jnp.int32)
    blocks = (
        columns,
        grid.split_keys(inputs.key),
        grid.split_keys(inputs.value),
        visits.order,
        visits.full,
        visits.some,
    )
    start = (jnp.full(queries.shape, zero), d_bias)
    (d_query, d_bias), (d_key, d_value) = lax.scan(of_column, start, blocks)
    scale = jnp.float32(request.scale)
    if d_bias is not None and inputs.bias is not None:
        d_bias = d_bias[:, :, : inputs.bias.shape[2], : inputs.bias.shape[3]]
    return Gradients(
        grid.join_queries(d_query * scale, request.groups),
        grid.join_keys(d_key if tiles.scaled else d_key * scale),
        grid.join_keys(d_value),
        d_bias,
    )


def _by_row(tiles: Tiles, lse: jax.Array, delta: jax.Array, d_out: jax.Array) -> _Row:
    request, grid = tiles.request, tiles.grid
    query, d_out = tiles.scale(tiles.inputs.query), d_out.astype(tiles.inputs.value.dtype)
    if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        sees = (lse < jnp.inf).swapaxes(1, 2)[..., None]
        query, d_out = jnp.where(sees, query, 0), jnp.where(sees, d_out, 0)
    groups = request.groups
    query, d_out = grid.split_queries(query, groups), grid.split_queries(d_out, groups)
    return _Row(
        query,
        d_out,
        _turned(query),
        _turned(d_out),
        grid.split_queries(lse.swapaxes(1, 2), groups, fill=jnp.inf),
        grid.split_queries(delta.swapaxes(1, 2), groups),
    )


def _turned(array: jax.Array) -> jax.Array:
    return array.swapaxes(-1, -2)


def _step(
    tiles: Tiles,
    place: tuple[jax.Array, jax.Array],
    tile: Tile,
    row: _Row,
    sums: _Sums,
) -> _Sums:
    d_query, d_key, d_value, d_bias = sums
    request = tiles.request
    probability = jnp.exp(tile.logits - row.lse[..., None])
    d_probability = product("BKRD,BKSD->BKRS", row.d_out, tile.value, request)
    kept = probability
    if request.dropout_rate:
        keep = tiles.kept(*place, probability.shape)
        factor = 1.0 / (1.0 - request.dropout_rate)
        kept = jnp.where(keep, probability * factor, 0.0)
        d_probability = jnp.where(keep, d_probability * factor, 0.0)
    d_logits = probability * (d_probability - row.delta[..., None])
    if request.soft_cap is not None:
        d_logits = d_logits * (1.0 - jnp.square(tile.logits / jnp.float32(request.soft_cap)))
        if tile.visible is not None:
            d_logits = jnp.where(tile.visible, tiles.apart(d_logits), 0.0).reshape(d_logits.shape)
    if d_bias is not None:
        d_bias = _with_bias(d_bias, tiles, place, d_logits)
    d_logits, kept = d_logits.astype(row.query.dtype), kept.astype(row.query.dtype)
    more = product("BKRS,BKSH->BKRH", d_logits, tile.key, request)
    d_query = d_query.at[place[0]].add(more)
    d_key = d_key + product("BKHR,BKRS->BKHS", row.query_turned, d_logits, request)
    d_value = d_value + product("BKDR,BKRS->BKDS", row.d_out_turned, kept, request)
    return d_query, d_key, d_value, d_bias


def _with_bias(d_bias: jax.Array, tiles: Tiles, place: tuple[jax.Array, jax.Array], d_logits: jax.Array) -> jax.Array:
    """Adds a tile's share, summed over the dimensions along which the bias is the same."""
    tile = tiles.apart(d_logits)
    batch, _, _, rows, slots = tile.shape
    tile = tile.reshape(batch, tiles.request.q_heads, rows, slots)
    starts, sizes = bias_window(d_bias.shape, tiles.grid, *place)
    shared = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    share = tile.sum(axis=shared, keepdims=True) if shared else tile
    return lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, starts, sizes) + share, starts)
