"""The forward pass: softmax over the blocks of keys as they come, with a running maximum and sum."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias, final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernelry.plugin import Inputs, Request
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.tile import Tiles, product, zero_of
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_queries

_LOWEST = float(jnp.finfo(jnp.float32).min)  # type: ignore[no-untyped-call]
"""Where the running maximum begins: finite, so that the difference to the −inf of a hidden key is −inf, not NaN."""

_Running: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Σ p·v [B, K, R, D], max [B, K, R], Σ p [B, K, R], of R = G·block_q rows."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Attention without sinks, float32."""

    out: Float[Array, "B T N D"]
    lse: Float[Array, "B N T"]
    max_logits: Float[Array, "B N"] | None


def forward(inputs: Inputs, request: Request, grid: Grid) -> Result:
    """Attends, one block of queries at a time."""
    tiles = Tiles.of(request, grid, inputs)
    visits = visits_of_queries(kinds_of(inputs.mask, grid))
    query = grid.split_queries(tiles.scale(inputs.query), request.groups)
    keys, values = grid.split_keys(inputs.key), grid.split_keys(inputs.value)

    zero = zero_of(inputs)

    def of_row(_: None, blocks: tuple[jax.Array, ...]) -> tuple[None, _Running]:
        row, own, order, full, some = blocks

        def visit(masked: bool, place: jax.Array, running: _Running) -> _Running:
            column = order[place]
            key = lax.dynamic_index_in_dim(keys, column, keepdims=False)
            value = lax.dynamic_index_in_dim(values, column, keepdims=False)
            return _step(tiles, (row, column), own, (key, value), running, masked)

        running = _nothing(own, request.value_dim, zero)
        if visits.any_full:
            running = lax.fori_loop(0, full, lambda place, now: visit(False, place, now), running)
        if visits.any_partial:
            running = lax.fori_loop(full, some, lambda place, now: visit(True, place, now), running)
        total, top, weight = running
        empty = weight == 0
        divisor = jnp.where(empty, 1.0, weight)
        out = jnp.where(empty[..., None], 0.0, total / divisor[..., None])
        return None, (out, jnp.where(empty, -jnp.inf, top), jnp.where(empty, -jnp.inf, top + jnp.log(divisor)))

    rows = jnp.arange(grid.rows, dtype=jnp.int32)
    _, (out, top, lse) = lax.scan(of_row, None, (rows, query, visits.order, visits.full, visits.some))
    join = grid.join_queries
    max_logits = None
    if request.max_logits:
        max_logits = join(top, request.groups).max(axis=1, initial=-jnp.inf)
    return Result(join(out, request.groups), join(lse, request.groups).swapaxes(1, 2), max_logits)


def _nothing(query: jax.Array, value_dim: int, zero: jax.Array) -> _Running:
    rows = query.shape[:3]
    start = jnp.full(rows, zero)
    return jnp.full((*rows, value_dim), zero), start + _LOWEST, start


def _step(
    tiles: Tiles,
    place: tuple[jax.Array, jax.Array],
    query: jax.Array,
    key_value: tuple[jax.Array, jax.Array],
    running: _Running,
    masked: bool,
) -> _Running:
    total, top, weight = running
    tile = tiles(*place, query, *key_value, masked)
    highest = jnp.maximum(top, tile.logits.max(axis=-1))
    probability = jnp.exp(tile.logits - highest[..., None])
    before = jnp.exp(top - highest)
    weight = weight * before + probability.sum(axis=-1)
    rate = tiles.request.dropout_rate
    if rate:
        probability = jnp.where(tiles.kept(*place, probability.shape), probability / (1.0 - rate), 0.0)
    more = product("BKRS,BKSD->BKRD", probability.astype(tile.value.dtype), tile.value, tiles.request)
    return total * before[..., None] + more, highest, weight
