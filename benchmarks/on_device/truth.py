"""Whether what is timed is right: two corners of every result against float32, written out from the shape alone.

A corner is a batch row with a key/value head and the query heads that read it: all that their output and gradients
depend on, so that they are exact. It costs little compared with the whole.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from on_device.shapes import BOTH, Shape

LARGEST_ERROR = {"bfloat16": 0.03, "float16": 0.01, "float32": 0.005}
"""Relative error beyond which a result is wrong: far above the rounding of inputs, probabilities and output to 8 and 11
bits, and of products in TF32; far below a block, a head or a mask that is off."""

_STRETCHES = 16
"""Errors are relative to the norm of a stretch of tokens: under a causal mask the first few are far the largest."""
_BLOCK = 256
"""Queries whose logits are held at a time."""


def expected(shape: Shape, arrays: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """out, and where there is a backward pass d_query, d_key and d_value: [corner, tokens, …]."""
    corners = [_corner(shape, arrays, *place) for place in _places(shape)]
    found = jax.jit(lambda given: [_answer(shape, *corner) for corner in given])(corners)
    return {name: np.stack([np.asarray(each[name]) for each in found]) for name in found[0]}


def errors(shape: Shape, which: str, result: Any, truth: dict[str, np.ndarray]) -> dict[str, float]:
    """The greatest relative error over corners, heads and stretches of tokens, by array; inf where not finite."""
    given = dict(zip(("d_query", "d_key", "d_value"), result[1], strict=True)) if which == BOTH else {"out": result}
    return {name: _error(_corners(shape, array), truth[name]) for name, array in given.items()}


def is_wrong(shape: Shape, found: dict[str, float]) -> bool:
    return not all(error <= LARGEST_ERROR[shape.dtype] for error in found.values())


def _places(shape: Shape) -> list[tuple[int, int]]:
    """Batch row and key/value head: the first and the last."""
    return [(0, 0), (shape.batch - 1, shape.kv_heads - 1)]


def _heads(shape: Shape, array: Any, head: int) -> slice:
    """The heads of an array [B, L, heads, channels] that belong to a key/value head."""
    each = array.shape[2] // shape.kv_heads
    return slice(head * each, (head + 1) * each)


def _corner(shape: Shape, arrays: tuple[Any, ...], row: int, head: int) -> tuple[Any, ...]:
    query, key, value, weights, ids = arrays
    cut = (array[row, :, _heads(shape, array, head)].astype(jnp.float32) for array in (query, key, value, weights))
    return *cut, None if ids is None else ids[row]


def _corners(shape: Shape, array: Any) -> np.ndarray:
    cut = [np.asarray(array[row, :, _heads(shape, array, head)], np.float32) for row, head in _places(shape)]
    return np.stack(cut)


def _answer(shape: Shape, query: Any, key: Any, value: Any, weights: Any, ids: Any) -> dict[str, jax.Array]:
    if shape.passes[-1] != BOTH:
        return {"out": _attend(shape, ids, query, key, value)}
    out, pull = jax.vjp(lambda *moving: _attend(shape, ids, *moving), query, key, value)
    return {"out": out} | dict(zip(("d_query", "d_key", "d_value"), pull(weights), strict=True))


def _attend(shape: Shape, ids: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """[T, G, H], [S, 1, H], [S, 1, D] -> [T, G, D], a block of queries at a time."""
    block = math.gcd(shape.q_len, _BLOCK)
    slots = jnp.arange(shape.kv_len)

    @jax.checkpoint
    def rows(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, at = part
        logits = jnp.einsum("tgh,sh->gts", queries, key[:, 0], precision="highest") * shape.head_dim**-0.5
        if shape.soft_cap is not None:
            logits = shape.soft_cap * jnp.tanh(logits / shape.soft_cap)
        logits = jnp.where(_visible(shape, ids, at, slots)[None], logits, -jnp.inf)
        return jnp.einsum("gts,sd->tgd", jax.nn.softmax(logits), value[:, 0], precision="highest")

    blocks = query.reshape(-1, block, *query.shape[1:]), jnp.arange(shape.q_len).reshape(-1, block)
    return jax.lax.map(rows, blocks).reshape(*query.shape[:2], shape.out_dim)


def _visible(shape: Shape, ids: Any, at: jax.Array, slots: jax.Array) -> jax.Array:
    behind = at[:, None] - slots[None, :]
    seen = jnp.ones_like(behind, bool)
    if shape.causal:
        seen &= (behind >= 0) & (behind < (shape.window or shape.q_len))
    return seen if ids is None else seen & (ids[at][:, None] == ids[slots][None, :])


def _error(given: np.ndarray, truth: np.ndarray) -> float:
    """Both [corner, tokens, heads, channels]."""
    if not np.isfinite(given).all():
        return math.inf
    least = 1e-6 * float(np.sqrt(np.square(truth).mean()))
    worst = 0.0
    for stretch in np.array_split(np.arange(truth.shape[1]), min(_STRETCHES, truth.shape[1])):
        axes = (1, 3)
        off = np.sqrt(np.square(given[:, stretch] - truth[:, stretch]).sum(axes))
        size = np.sqrt(np.square(truth[:, stretch]).sum(axes))
        worst = max(worst, float((off / np.maximum(size, least)).max()))
    return worst
