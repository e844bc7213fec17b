"""Attention in float64, and how attention over parts of the keys merges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Float64

from kernelry.errors import ArgumentError
from kernelry.masks import Mask
from kernelry.testing.reference.softmax import AttentionArguments, sink_share, softmax_of


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """Attention and its statistics, float64.

    The statistics are those of the keys alone: no sink is in them, and no dropout.

    Args:
      out: normalised output, sinks and dropout included; 0 for a fully masked row. Without sinks,
        the unnormalised form of a Partial is `out · sum` with `(max, sum)`.
      lse: log Σ exp(logits), natural logarithm; −inf for a fully masked row.
      max_logits: the largest visible logit, after cap and bias; −inf where nothing is visible.
      max, sum: the largest visible logit and Σ exp(logits − max) of each row; −inf and 0 for a
        fully masked row.
    """

    out: Float64[np.ndarray, "B T N D"]
    lse: Float64[np.ndarray, "B N T"]
    max_logits: Float64[np.ndarray, "B N"]
    max: Float64[np.ndarray, "B N T"]
    sum: Float64[np.ndarray, "B N T"]


def reference_attention(
    query: Float[Any, "B T N H"],
    key: Float[Any, "B S K H"],
    value: Float[Any, "B S K D"],
    *,
    mask: Mask,
    scale: float | None = None,
    bias: Float[Any, "*bias"] | None = None,
    soft_cap: float | None = None,
    bias_after_cap: bool = False,
    sinks: Float[Any, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keep: Bool[Any, "B N T S"] | None = None,
) -> Reference:
    """Computes attention in float64.

    logits = scale · ⟨query, key⟩ + bias, then soft_cap · tanh(logits / soft_cap), then the mask; with `bias_after_cap`
    the bias comes after the cap;
    out = Σ dropout(softmax(logits) · sigmoid(lse − sink)) · value.

    Args:
      query, key, value: arrays of any floating dtype, NumPy or JAX.
      mask, scale, soft_cap, bias_after_cap, sinks: as in `kernelry.attention`.
      bias: broadcastable to B N T S.
      dropout_rate: in [0, 1); kept probabilities are multiplied by 1/(1 − rate).
      dropout_keep: True for each probability that stays; broadcastable to B N T S.

    Raises:
      ArgumentError: a rate outside [0, 1), or a rate without `dropout_keep`.
      NotImplementedError: a mask that `reference_mask` does not know.
    """
    arguments = AttentionArguments(
        query, key, value, mask, scale, bias, soft_cap, bias_after_cap, sinks, dropout_rate, dropout_keep
    )
    softmax = softmax_of(arguments)
    return Reference(softmax.out, softmax.lse, softmax.max_logits, softmax.max, softmax.sum)


def reference_merge(parts: Sequence[Reference], *, sinks: Float[Any, " N"] | None = None) -> Reference:
    """Merges attention over disjoint parts of the keys, and lets sinks join once, at the end.

    out = Σᵢ outᵢ · exp(lseᵢ − lse) · sigmoid(lse − sink), lse = log Σᵢ exp(lseᵢ). A row that a part
    does not see contributes nothing.

    Args:
      parts: at least one, each computed without sinks.
      sinks: one logit per query head.

    Raises:
      ArgumentError: no parts.
    """
    if not parts:
        raise ArgumentError("reference_merge got no parts; there is no shape to give an empty result.")
    maxima = np.stack([part.max for part in parts])
    top = maxima.max(axis=0)
    empty = np.isneginf(top)
    rescale = np.exp(maxima - np.where(empty, 0, top))
    sums = np.stack([part.sum for part in parts]) * rescale
    total = sums.sum(axis=0)
    some = np.where(empty, 1, total)
    lse = np.where(empty, -np.inf, np.log(some) + top)
    weights = sums / some * (1 if sinks is None else sink_share(lse, sinks))
    out = np.einsum("pbnt,pbtnd->btnd", weights, np.stack([part.out for part in parts]))
    return Reference(out, lse, np.stack([part.max_logits for part in parts]).max(axis=0), top, total)
