"""Logits and softmax of one call, from which the output and the gradients are computed."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float64

from kernelry.errors import ArgumentError
from kernelry.masks import Mask
from kernelry.testing.reference.masks import reference_mask


@final
@dataclasses.dataclass(frozen=True, slots=True)
class AttentionArguments:
    """The arguments of one attention call, as `reference_attention` documents them."""

    query: Any
    key: Any
    value: Any
    mask: Mask
    scale: float | None = None
    bias: Any = None
    soft_cap: float | None = None
    bias_after_cap: bool = False
    sinks: Any = None
    dropout_rate: float = 0.0
    dropout_keep: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.dropout_rate < 1:
            raise ArgumentError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}.")
        if self.dropout_rate and self.dropout_keep is None:
            raise ArgumentError(f"dropout_rate={self.dropout_rate} needs dropout_keep=, booleans [B, N, T, S].")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Softmax:
    """What the formulas give; slots that no query may see hold zeros instead of their values.

    Args:
      query: [B, T, N, H]. key: [B, S, N, H], value: [B, S, N, D], repeated to query's heads.
      scale: the factor of ⟨query, key⟩.
      visible: the mask.
      slope: derivative of the capped logits by scale · ⟨query, key⟩; 1 without a soft cap.
      max, sum, lse: maximum of the visible logits, Σ exp(logits − max), log Σ exp(logits).
      max_logits: maximum over the rows.
      share: sigmoid(lse − sink), what the sink leaves to the keys; 1 without sinks, 0 in empty rows.
      probabilities: softmax over the keys, times `share`; before dropout.
      kept: the factor of each probability in the output: 1, or 0 and 1/(1 − rate) with dropout.
    """

    query: Float64[np.ndarray, "B T N H"]
    key: Float64[np.ndarray, "B S N H"]
    value: Float64[np.ndarray, "B S N D"]
    scale: float
    visible: Bool[np.ndarray, "B N T S"]
    slope: Float64[np.ndarray, "B N T S"]
    max: Float64[np.ndarray, "B N T"]
    sum: Float64[np.ndarray, "B N T"]
    lse: Float64[np.ndarray, "B N T"]
    max_logits: Float64[np.ndarray, "B N"]
    share: Float64[np.ndarray, "B N T"]
    probabilities: Float64[np.ndarray, "B N T S"]
    kept: Float64[np.ndarray, "B N T S"]

    @property
    def out(self) -> Float64[np.ndarray, "B T N D"]:
        """The probabilities that dropout keeps, times the values."""
        return np.asarray(np.einsum("bnts,bsnd->btnd", self.probabilities * self.kept, self.value))


def softmax_of(arguments: AttentionArguments) -> Softmax:
    """Computes logits, statistics and probabilities in float64."""
    query, key, value = (np.asarray(array, np.float64) for array in (arguments.query, arguments.key, arguments.value))
    batch, q_len, q_heads, head_dim = query.shape
    visible = reference_mask(arguments.mask, batch, q_heads, q_len, key.shape[1])
    query, key, value = _without_hidden(query, key, value, visible)
    scale = head_dim**-0.5 if arguments.scale is None else arguments.scale

    raw, bias = scale * np.einsum("btnh,bsnh->bnts", query, key), _bias(arguments.bias, visible)
    raw, late = (raw, bias) if arguments.bias_after_cap else (raw + bias, 0.0)
    capped = raw if arguments.soft_cap is None else arguments.soft_cap * np.tanh(raw / arguments.soft_cap)
    slope = np.ones_like(raw) if arguments.soft_cap is None else 1 - np.tanh(raw / arguments.soft_cap) ** 2
    logits = np.where(visible, capped + late, -np.inf)

    top = logits.max(axis=-1, initial=-np.inf)
    empty = np.isneginf(top)
    weights = np.exp(logits - np.where(empty, 0, top)[..., None])
    total = weights.sum(axis=-1)
    some = np.where(empty, 1, total)
    lse = np.where(empty, -np.inf, np.log(some) + top)
    share = np.ones_like(lse) if arguments.sinks is None else sink_share(lse, arguments.sinks)
    return Softmax(
        query=query,
        key=key,
        value=value,
        scale=scale,
        visible=visible,
        slope=slope,
        max=top,
        sum=total,
        lse=lse,
        max_logits=top.max(axis=-1, initial=-np.inf),
        share=share,
        probabilities=weights / some[..., None] * share[..., None],
        kept=_kept(arguments, visible.shape),
    )


def sink_share(lse: Float64[np.ndarray, "B N T"], sinks: Any) -> Float64[np.ndarray, "B N T"]:
    """Returns sigmoid(lse − sink), with sinks [N]; 0 for a row that sees nothing, whatever its sink."""
    empty = np.isneginf(lse)
    difference = np.where(empty, 0, lse) - np.asarray(sinks, np.float64)[None, :, None]
    decay = np.exp(-np.abs(difference))
    return np.where(empty, 0, np.where(difference >= 0, 1, decay) / (1 + decay))


def _without_hidden(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, visible: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives each query head its key and value, and zeros where no row of any head of its group may look."""
    batch, q_heads, q_len, kv_len = visible.shape
    kv_heads = key.shape[2]
    groups = q_heads // kv_heads
    seen = np.any(visible.reshape(batch, kv_heads, groups, q_len, kv_len), axis=(2, 3))
    seen = np.swapaxes(seen, 1, 2)[..., None]
    sees = np.swapaxes(np.any(visible, axis=3), 1, 2)[..., None]
    key, value = (np.repeat(np.where(seen, array, 0), groups, axis=2) for array in (key, value))
    return np.where(sees, query, 0), key, value


def _bias(bias: Any, visible: np.ndarray) -> np.ndarray:
    """The bias broadcast to B N T S, 0 where the mask hides it."""
    return np.where(visible, 0 if bias is None else np.asarray(bias, np.float64), 0.0)


def _kept(arguments: AttentionArguments, shape: tuple[int, ...]) -> np.ndarray:
    if not arguments.dropout_rate:
        return np.ones(shape)
    return np.broadcast_to(np.asarray(arguments.dropout_keep, bool), shape) / (1 - arguments.dropout_rate)
