"""Whether a result is right: two corners of it against attention in float32.

A corner is a batch row with a key/value head and the query heads that read it: all that their output, and the gradients
of query, key and value, depend on. It costs little compared with the whole.
"""

from __future__ import annotations

import math
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.bench.cases import Case, Pass
from kernelry.execution.normalization import finalize
from kernelry.kernel.partial import Partial
from kernelry.masks.side import Axis, Side
from kernelry.storage import PagedArray, QuantizedArray, ValueInKey

LARGEST_ERROR = {"bfloat16": 0.03, "float16": 0.01}
"""Relative error beyond which a result is wrong: far above the rounding of inputs, probabilities and output to 8 and 11
bits; far below a block, a head or a mask that is off."""
_LARGEST_ELSE = 0.005
"""Of float32, above products in TF32."""
_STRETCHES = 16
"""Errors are relative to the norm of a stretch of tokens: under a causal mask the first few are far the largest."""
_USUAL = 0.25
"""Of the median stretch: the least that errors are relative to. The gradient of a query that sees one key is 0, and
what is computed of it is rounding alone."""
_BLOCK = 256
"""Queries whose logits are in memory at a time."""
_GRADIENTS = ("d_query", "d_key", "d_value")


@final
class Truth:
    """What the corners of a case's result are.

    Args:
      case: the case.
      arguments: its arrays.
    """

    def __init__(self, case: Case, arguments: tuple[Any, ...]) -> None:
        self.case = case
        request = case.request
        self._places = list(dict.fromkeys([(0, 0), (request.batch - 1, request.kv_heads - 1)]))
        found = [self._corner(arguments, row, head) for row, head in self._places]
        self.expected = {name: np.stack([np.asarray(each[name]) for each in found]) for name in found[0]}

    @property
    def why_not(self) -> str:
        """Why results cannot be compared; else empty."""
        request = self.case.request
        return "dropout is random" if request.dropout_rate else ""

    def errors(self, result: Any) -> dict[str, float]:
        """The greatest relative error over corners, heads and stretches of tokens, by array; inf where not finite."""
        given = self._outputs(result)
        return {name: _error(self._corners(array), self.expected[name]) for name, array in given.items()}

    def is_wrong(self, errors: dict[str, float]) -> bool:
        """Whether an error is larger than rounding explains."""
        largest = LARGEST_ERROR.get(self.case.request.dtype, _LARGEST_ELSE)
        return not all(error <= largest for error in errors.values())

    def _outputs(self, result: Any) -> dict[str, Any]:
        if self.case.which is Pass.BOTH:
            return dict(zip(_GRADIENTS, result[1], strict=False))  # those of sinks and bias sum over the batch
        out = result[0] if self.case.request.max_logits else result
        return {"out": finalize(out) if isinstance(out, Partial) else out}

    def _heads(self, array: Any, head: int) -> slice:
        """The heads of an array [B, L, heads, channels] that belong to a key/value head."""
        each = array.shape[2] // self.case.request.kv_heads
        return slice(head * each, (head + 1) * each)

    def _corners(self, array: Any) -> np.ndarray:
        cut = [np.asarray(array[row, :, self._heads(array, head)], np.float32) for row, head in self._places]
        return np.stack(cut)

    def _corner(self, arguments: tuple[Any, ...], row: int, head: int) -> dict[str, jax.Array]:
        query, key, value, sinks, bias, _, weights = arguments
        key, value = dense(key, value)
        moving = [each[row, :, self._heads(each, head)].astype(jnp.float32) for each in (query, key, value)]
        heads = self._heads(query, head)
        own = None if sinks is None else sinks[heads].astype(jnp.float32)
        added = None if bias is None else jnp.broadcast_to(bias, (bias.shape[0], query.shape[2], *bias.shape[2:]))
        added = None if added is None else added[min(row, len(added) - 1), heads].astype(jnp.float32)
        mask = self.case.mask_of(arguments)

        def attend(*moving: jax.Array) -> jax.Array:
            return self._attend(mask, (row, heads), own, added, *moving)

        @jax.jit
        def answer(weights: jax.Array) -> dict[str, jax.Array]:
            if self.case.which is not Pass.BOTH:
                return {"out": attend(*moving)}
            _, pull = jax.vjp(attend, *moving)
            return dict(zip(_GRADIENTS, pull(weights), strict=True))

        found: dict[str, jax.Array] = answer(weights[row, :, heads].astype(jnp.float32))
        return found

    def _attend(self, mask: Any, place: Any, sinks: Any, bias: Any, query: Any, key: Any, value: Any) -> jax.Array:
        """[T, G, H], [S, 1, H], [S, 1, D] -> [T, G, D], a block of queries at a time."""
        request, (row, heads) = self.case.request, place
        q_len, block = request.q_len, min(request.q_len, _BLOCK)
        blocks = -(-q_len // block)

        @jax.checkpoint
        def rows(slots: jax.Array) -> jax.Array:
            logits = jnp.einsum("tgh,sh->gts", query[slots], key[:, 0], precision="highest") * request.scale
            added = 0.0 if bias is None else bias if bias.shape[1] == 1 else bias[:, slots]
            logits = logits if request.bias_after_cap else logits + added
            if request.soft_cap is not None:
                logits = request.soft_cap * jnp.tanh(logits / request.soft_cap)
            logits = logits + added if request.bias_after_cap else logits
            visible = mask.evaluate(
                Side.of_slots(Axis.QUERY, slots, q_heads=request.q_heads), Side.kv(request.kv_len, jnp)
            )
            visible = visible[min(row, visible.shape[0] - 1)]
            visible = visible if visible.shape[0] == 1 else visible[heads]
            return _weighted(logits, visible, sinks, value[:, 0])

        slots = jnp.minimum(jnp.arange(blocks * block), q_len - 1).reshape(blocks, block)
        found: jax.Array = jax.lax.map(rows, slots)
        return found.reshape(blocks * block, *found.shape[2:])[:q_len]


def _weighted(logits: jax.Array, visible: jax.Array, sinks: Any, value: jax.Array) -> jax.Array:
    """The softmax of [G, T, S] over visible keys and a sink, times values [S, D]: 0 where no key is visible."""
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks[:, None, None] - top)
    return jnp.einsum("gts,sd->tgd", weights / jnp.where(total > 0, total, 1.0), value, precision="highest")


def dense(key: Any, value: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values as an array each, [B, S, K, H] and [B, S, K, D], however they are stored."""
    if isinstance(key, PagedArray) and key.interleaved:
        return key.gather_pair()
    found = _plain(key)
    if isinstance(value, ValueInKey):
        return found, found[..., : value.width]
    return found, _plain(value)


def _plain(stored: Any) -> jax.Array:
    stored = stored.gather() if isinstance(stored, PagedArray) else stored
    plain: jax.Array = stored.dequantize() if isinstance(stored, QuantizedArray) else stored
    return plain


def _error(given: np.ndarray, truth: np.ndarray) -> float:
    """Both [corner, tokens, heads, channels]."""
    if not np.isfinite(given).all():
        return math.inf
    stretches = np.array_split(np.arange(truth.shape[1]), min(_STRETCHES, truth.shape[1]))
    difference = given - truth
    offs = np.array([np.sqrt(np.square(difference[:, each]).sum((1, 3))) for each in stretches])
    sizes = np.array([np.sqrt(np.square(truth[:, each]).sum((1, 3))) for each in stretches])
    least = max(1e-6 * float(np.sqrt(np.square(truth).mean())), 1e-30)
    return float((offs / np.maximum(sizes, np.maximum(_USUAL * np.median(sizes, axis=0), least))).max())
