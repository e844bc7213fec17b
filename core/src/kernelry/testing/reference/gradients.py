"""Gradients of attention in float64, from the formulas; without automatic differentiation."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Float64

from kernelry.errors import ArgumentError
from kernelry.masks import Mask
from kernelry.testing.reference.softmax import AttentionArguments, Softmax, softmax_of


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ReferenceGradients:
    """The gradients of Σ out · d_out + Σ lse · d_lse, float64, each in the shape of its operand.

    `bias` and `sinks` are None where the call has none.
    """

    query: Float64[np.ndarray, "B T N H"]
    key: Float64[np.ndarray, "B S K H"]
    value: Float64[np.ndarray, "B S K D"]
    bias: Float64[np.ndarray, "*bias"] | None
    sinks: Float64[np.ndarray, " N"] | None


def reference_gradients(
    query: Float[Any, "B T N H"],
    key: Float[Any, "B S K H"],
    value: Float[Any, "B S K D"],
    *,
    d_out: Float[Any, "B T N D"],
    mask: Mask,
    scale: float | None = None,
    bias: Float[Any, "*bias"] | None = None,
    soft_cap: float | None = None,
    bias_after_cap: bool = False,
    sinks: Float[Any, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keep: Bool[Any, "B N T S"] | None = None,
    d_lse: Float[Any, "B N T"] | None = None,
) -> ReferenceGradients:
    """Computes the gradients of `reference_attention` in float64.

    With probabilities p (sinks included, before dropout), the factor m of dropout and the capped
    logits' slope 1 − tanh²:

        delta = Σ_d out · d_out
        d_logits = p · (m · ⟨d_out, value⟩ − delta + d_lse)
        d_raw = d_logits · slope, d_query = scale · Σ_s d_raw · key, d_key = scale · Σ_t d_raw · query
        d_bias = d_logits with `bias_after_cap`, else d_raw
        d_value = Σ_t p · m · d_out, d_sink = −Σ_bt (1 − sigmoid(lse − sink)) · delta

    Fully masked rows have zero gradients, and so have hidden pairs and slots, whatever they and
    the cotangents of such rows hold.

    Args:
      query, key, value, mask, scale, bias, soft_cap, bias_after_cap, sinks, dropout_rate, dropout_keep: as in
        `reference_attention`.
      d_out: cotangent of the output.
      d_lse: cotangent of lse, for attention over a part of the keys.

    Raises:
      ArgumentError: `d_lse` with `sinks`, which no part of an attention contains; or dropout as in
        `reference_attention`.
      NotImplementedError: a mask that `reference_mask` does not know.
    """
    if d_lse is not None and sinks is not None:
        raise ArgumentError("d_lse belongs to a part of an attention, and no part contains sinks; drop one of them.")
    arguments = AttentionArguments(
        query, key, value, mask, scale, bias, soft_cap, bias_after_cap, sinks, dropout_rate, dropout_keep
    )
    softmax = softmax_of(arguments)
    empty = np.isneginf(softmax.lse)
    d_out = np.where(empty.swapaxes(1, 2)[..., None], 0, np.asarray(d_out, np.float64))
    delta = np.einsum("btnd,btnd->bnt", softmax.out, d_out)
    row = delta if d_lse is None else delta - np.where(empty, 0, np.asarray(d_lse, np.float64))
    d_kept = np.einsum("btnd,bsnd->bnts", d_out, softmax.value) * softmax.kept
    d_logits = softmax.probabilities * (d_kept - row[..., None])
    d_raw = d_logits * softmax.slope
    weights = softmax.probabilities * softmax.kept
    kv_heads = np.shape(key)[2]
    return ReferenceGradients(
        query=softmax.scale * np.einsum("bnts,bsnh->btnh", d_raw, softmax.key),
        key=softmax.scale * _per_group(np.einsum("bnts,btnh->bsnh", d_raw, softmax.query), kv_heads),
        value=_per_group(np.einsum("bnts,btnd->bsnd", weights, d_out), kv_heads),
        bias=None if bias is None else _summed_to(d_logits if bias_after_cap else d_raw, np.shape(bias)),
        sinks=None if sinks is None else _d_sinks(softmax, delta),
    )


def _d_sinks(softmax: Softmax, delta: np.ndarray) -> np.ndarray:
    """−Σ (probability of the sink) · delta; a fully masked row has delta 0."""
    return np.asarray(-np.sum((1 - softmax.share) * delta, axis=(0, 2)))


def _per_group(gradient: np.ndarray, kv_heads: int) -> np.ndarray:
    """Sums [B, S, N, ·] over the query heads n that share the key/value head n // G."""
    batch, kv_len, q_heads, width = gradient.shape
    grouped = gradient.reshape(batch, kv_len, kv_heads, q_heads // kv_heads, width)
    return np.asarray(np.sum(grouped, axis=3))


def _summed_to(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes a broadcast from `shape` by summing over what it repeated."""
    gradient = np.sum(gradient, axis=tuple(range(gradient.ndim - len(shape))))
    repeated = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return np.asarray(np.sum(gradient, axis=repeated, keepdims=True))
