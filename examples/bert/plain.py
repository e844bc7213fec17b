"""The same forward pass in plain NumPy and float64: one sentence, no padding, neither JAX nor kernelry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_erf = np.frompyfunc(math.erf, 1, 1)


def sentence_vector(ids: np.ndarray, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the vector [F] of one sentence, of length 1.

    Args:
      ids: [T], all of them tokens.
      config: what config.json says.
      tensors: arrays by the names that PyTorch gives them.
    """
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    table = {name: tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = table["word"][ids].astype(np.float64) + table["position"][: len(ids)] + table["token_type"][0]
    x = _norm(x, tensors, "embeddings.LayerNorm", eps)
    for number in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{number}"
        mixed = _dense(
            _attention(x, tensors, f"{name}.attention.self", heads), tensors, f"{name}.attention.output.dense"
        )
        x = _norm(x + mixed, tensors, f"{name}.attention.output.LayerNorm", eps)
        hidden = _gelu(_dense(x, tensors, f"{name}.intermediate.dense"))
        x = _norm(x + _dense(hidden, tensors, f"{name}.output.dense"), tensors, f"{name}.output.LayerNorm", eps)
    mean = x.mean(axis=0)
    return mean / np.sqrt((mean**2).sum())


def _attention(x: np.ndarray, tensors: Mapping[str, np.ndarray], name: str, heads: int) -> np.ndarray:
    query, key, value = (
        np.stack(np.split(_dense(x, tensors, f"{name}.{each}"), heads, axis=-1)) for each in ("query", "key", "value")
    )  # each [N, T, H]
    logits = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.concatenate([*(weights / weights.sum(axis=-1, keepdims=True) @ value)], axis=-1)


def _dense(x: np.ndarray, tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors[f"{name}.bias"]


def _norm(x: np.ndarray, tensors: Mapping[str, np.ndarray], name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * tensors[f"{name}.weight"]
        + tensors[f"{name}.bias"]
    )


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + _erf(x / math.sqrt(2)).astype(np.float64)) / 2
