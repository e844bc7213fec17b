"""The logits of one tile: a block of queries against a block of keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernelry.plugin import Inputs, Request, cast_finite
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.softmax import visible_of


class TileIndex(NamedTuple):
    """Where a tile is: its step over batch and heads, its block of queries, its block of keys."""

    step: Any
    row: Any
    column: Any


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Logits [b, k, G·block_q, block_kv] of a block of queries and one of keys, capped and masked with −inf.

    Args:
      key, value: [b, k, block_kv, H] and [b, k, block_kv, D], with zeros in slots that no row of the tile sees.
      visible: [b, k, G, block_q, block_kv], or sizes of 1; None where everything is visible.
      capped: the logits without a bias that is added after the cap; None where no bias is.
    """

    logits: Float[Array, "b k R S"]
    key: Float[Array, "b k S H"]
    value: Float[Array, "b k S D"]
    visible: Bool[Array, "#b #k #G T S"] | None
    capped: Float[Array, "b k R S"] | None


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Makes the tiles of one call.

    Args:
      request: what the call asks for. grid: its blocks. inputs: its arrays.
      hides: whether some slot may be seen by no row, so that what it holds must not be multiplied.
    """

    request: Request
    grid: Grid
    inputs: Inputs
    hides: bool

    @property
    def scaled(self) -> bool:
        """Whether queries come multiplied by the scale: where that rounds no more than the logits themselves."""
        return self.request.dtype == "float32" or math.frexp(self.request.scale)[0] == 0.5

    def scale(self, query: jax.Array) -> jax.Array:
        """Multiplies the queries by the scale where that is exact enough; a pass less over every tile."""
        return (query * jnp.asarray(self.request.scale, query.dtype)) if self.scaled else query

    @classmethod
    def of(cls, request: Request, grid: Grid, inputs: Inputs) -> Tiles:
        """The tiles of a call; the bias is laid out for the grid."""
        hides = request.mask.may_hide_slots(request.q_len, request.kv_len) or bool(grid.kv_padding)
        return cls(request, grid, dataclasses.replace(inputs, bias=padded_bias(inputs.bias, grid)), hides)

    def __call__(self, index: TileIndex, query: jax.Array, key: jax.Array, value: jax.Array, masked: bool) -> Tile:
        """Multiplies query [b, k, G·block_q, H] and key [b, k, block_kv, H]."""
        visible = self._visible(index) if masked else None
        if visible is not None and self.hides:
            seen = visible.any(axis=(2, 3))[..., None]
            key, value = jnp.where(seen, key, 0), jnp.where(seen, value, 0)
        logits = product("BKRH,BKSH->BKRS", query, key, self.request)
        if not self.scaled:
            logits = logits * jnp.float32(self.request.scale)
        late = self.request.bias_after_cap
        if self.inputs.bias is not None and not late:
            logits = self._biased(logits, index)
        if self.request.soft_cap is not None:
            cap = jnp.float32(self.request.soft_cap)
            logits = cap * jnp.tanh(logits / cap)
        capped = logits if late else None
        if late:
            logits = self._biased(logits, index)
        if visible is not None:
            logits = jnp.where(visible, self.apart(logits), -jnp.inf).reshape(logits.shape)
        return Tile(logits, key, value, visible, capped)

    def apart(self, tile: jax.Array) -> jax.Array:
        """[b, k, G·block_q, block_kv] → [b, k, G, block_q, block_kv]."""
        batch, heads, _, slots = tile.shape
        return tile.reshape(batch, heads, self.request.groups, self.grid.block_q, slots)

    def kept(self, index: TileIndex, shape: tuple[int, ...]) -> Bool[Array, "b k R S"]:
        """Which probabilities dropout keeps; the same in the backward pass."""
        assert self.inputs.dropout_rng is not None
        tile = (index.step * self.grid.rows + index.row) * self.grid.columns + index.column
        key = jax.random.fold_in(self.inputs.dropout_rng, tile)
        return jax.random.bernoulli(key, 1.0 - self.request.dropout_rate, shape)

    def _visible(self, index: TileIndex) -> Bool[Array, "#b #k #G T S"] | None:
        query = self.grid.query_side(index.row, self.request.q_heads)
        visible = visible_of(self.inputs.mask, query, self.grid.kv_side(index.column))
        if self.grid.kv_padding:
            inside = self.grid.kv_inside(index.column)[None, None, None]
            visible = inside if visible is None else visible & inside
        if visible is None:
            return None
        visible = self.grid.of_step(jnp.asarray(visible), index.step)
        visible = jnp.broadcast_to(visible, (*visible.shape[:2], self.grid.block_q, self.grid.block_kv))
        return by_group(visible, self.grid)

    def _biased(self, logits: jax.Array, index: TileIndex) -> jax.Array:
        return (self.apart(logits) + self._bias(index)).reshape(logits.shape)

    def _bias(self, index: TileIndex) -> Float[Array, "#b #k #G #T #S"]:
        bias = self.inputs.bias
        assert bias is not None
        starts, sizes = bias_window(bias.shape, self.grid, index)
        return by_group(cast_finite(lax.dynamic_slice(bias, starts, sizes), jnp.float32), self.grid)


def zero_of(*arrays: Any) -> Float[Array, ""]:
    """A zero that varies over the manual axes of a shard_map as the arrays do, as a loop's start must.

    No operation is left of it: what it selects is never what the arrays hold.
    """
    zero: jax.Array = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(arrays):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf)
        if data.size:
            zero = zero + jnp.where(False, data.reshape(-1)[0].astype(jnp.float32), 0.0)
    return zero


def by_group(array: jax.Array, grid: Grid) -> jax.Array:
    """[b, k·G or 1, T, S] → [b, k or 1, G or 1, T, S]."""
    heads = (1, 1) if array.shape[1] == 1 else (grid.step_heads, grid.groups)
    return array.reshape(array.shape[0], *heads, *array.shape[2:])


def padded_bias(bias: jax.Array | None, grid: Grid) -> jax.Array | None:
    """Lays zeros beyond T and S where the bias differs along them."""
    if bias is None:
        return None
    more_q = grid.q_padding if bias.shape[2] != 1 else 0
    more_kv = grid.kv_padding if bias.shape[3] != 1 else 0
    return jnp.pad(bias, ((0, 0), (0, 0), (0, more_q), (0, more_kv)))


def bias_window(shape: tuple[int, ...], grid: Grid, index: TileIndex) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Where a tile's part of a padded bias begins, and its shape."""
    parts = (
        (grid.batch_start(index.step), grid.step_batch),
        (grid.head_start(index.step) * grid.groups, grid.step_heads * grid.groups),
        (index.row * grid.block_q, grid.block_q),
        (grid.kv_start + index.column * grid.block_kv, grid.block_kv),
    )
    found = tuple(part if size != 1 else (0, 1) for size, part in zip(shape, parts, strict=True))
    return tuple(jnp.asarray(start, jnp.int32) for start, _ in found), tuple(size for _, size in found)


def product(equation: str, one: jax.Array, other: jax.Array, request: Request) -> jax.Array:
    """A product of blocks, summed in float32."""
    return jnp.einsum(equation, one, other, precision=request.precision, preferred_element_type=jnp.float32)
