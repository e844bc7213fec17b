"""Arrays to time a call with: of the call's shapes, with values that make it do the most work.

A cache is full, the query is at its end, a row is one segment, no token is in a span, and every block is selected.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.aot.layers import arguments_of
from kernelry.masks import BidirectionalSpans, Lengths
from kernelry.masks.base import Mask
from kernelry.masks.composition import And, At, Not, Or
from kernelry.masks.positions import Positions, TracedOffset, TracedPositions
from kernelry.phases.calls import PhaseCall
from kernelry.request.request import Request
from kernelry.storage import PagedArray, QuantizedArray


def operands(call: PhaseCall) -> tuple[Any, ...]:
    """Returns the arguments of `kernelry.aot.layers.program_of`, as arrays."""
    *given, leaves = arguments_of(call)
    random = np.random.default_rng(0)
    query, key, value, sinks, bias = (_filled(shapes, random) for shapes in given)
    of_mask = jax.tree.leaves(_valued(call.mask, call.request))
    arrays = [jnp.asarray(array, leaf.dtype) for array, leaf in zip(of_mask, leaves, strict=True)]
    return query, key, value, sinks, bias, arrays


def _filled(shapes: Any, random: np.random.Generator) -> Any:
    if isinstance(shapes, PagedArray):
        rows, pages = shapes.table.shape
        table = np.arange(rows * pages, dtype=np.int32).reshape(rows, pages) % jax.tree.leaves(shapes.pages)[0].shape[0]
        return PagedArray(_filled(shapes.pages, random), jnp.asarray(table), shapes.interleaved)
    if isinstance(shapes, QuantizedArray):
        return _quantized(shapes, random)

    def array(leaf: Any) -> jax.Array:
        return jnp.asarray(random.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(array, shapes)


def _quantized(shapes: QuantizedArray, random: np.random.Generator) -> QuantizedArray:
    """Of variance 1, as arrays are: with larger logits a softmax sees one key, and rounding decides which."""
    dtype = shapes.values.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        largest = 7 if dtype == jnp.int4 else 127
        values, size = random.integers(-largest, largest, shapes.values.shape, np.int8, endpoint=True), 3**0.5 / largest
    else:
        values, size = random.standard_normal(shapes.values.shape, np.float32), 1.0
    return QuantizedArray(jnp.asarray(values).astype(dtype), jnp.full(shapes.scale.shape, size, shapes.scale.dtype))


def _valued(mask: Mask, request: Request) -> Mask:
    """The mask with arrays in place of shapes."""
    match mask:
        case At(mask=inside, query=query, kv=kv):
            first = max(request.kv_len - request.q_len, 0)
            at = _placed(query, first, request.q_len), _placed(kv, 0, request.kv_len)
            return At(_valued(inside, request), *at)
        case And(parts=parts):
            return And(tuple(_valued(part, request) for part in parts))
        case Or(parts=parts):
            return Or(tuple(_valued(part, request) for part in parts))
        case Not(mask=inside):
            return Not(_valued(inside, request))
    found: Mask = jax.tree_util.tree_map_with_path(lambda path, leaf: _value(mask, path, leaf, request), mask)
    return found


def _value(mask: Mask, path: Any, leaf: Any, request: Request) -> np.ndarray:
    if isinstance(mask, Lengths):
        return np.full(leaf.shape, request.q_len if path[0].name == "query_lengths" else request.kv_len, np.int32)
    if isinstance(mask, BidirectionalSpans):
        return np.full(leaf.shape, -1, leaf.dtype)
    return np.full(leaf.shape, leaf.dtype == np.bool_, leaf.dtype)  # selected, or of segment 0


def _placed(where: Positions | None, first: int, length: int) -> Positions | None:
    match where:
        case TracedOffset(value=value):
            return TracedOffset(jnp.full(value.shape, first, value.dtype))
        case TracedPositions(value=value):
            places = jnp.arange(first, first + length, dtype=value.dtype)
            return TracedPositions(jnp.broadcast_to(places, value.shape))
    return where
