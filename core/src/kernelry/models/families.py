"""The table of facts: which row describes a model type.

Each row says what the code of transformers does, where the config does not; `tests/models` runs that code against it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kernelry.models import rules
from kernelry.models.rules import Family

decoder = functools.partial(
    Family,
    layers=rules.all_full,
    heads=rules.grouped,
    scale=rules.head_dim_scale,
    sinks=rules.no_sinks,
    rope=rules.everywhere,
)
"""A causal decoder with rotary embeddings and grouped heads: what a row does not say is this."""

encoder = functools.partial(decoder, causal=False)

_ROWS: Mapping[str, tuple[Family, ...]] = {
    "llama": (decoder(layer_types=None),),
    "mistral": (
        decoder(layers=rules.windowed("sliding_window"), layer_types=None, causal=rules.where("is_causal", True)),
    ),
    "qwen2 qwen3": (decoder(layers=rules.from_layer("use_sliding_window", "max_window_layers")),),
    "gemma2 vaultgemma": (
        decoder(layers=rules.every(2), scale=rules.root_of("query_pre_attn_scalar"), soft_cap="attn_logit_softcapping"),
    ),
    "gpt_oss": (decoder(layers=rules.every(2), sinks=rules.all_sinks),),
    "deepseek_v3": (decoder(layer_types=None, scale=rules.mla_scale),),
}


@functools.cache
def families() -> Mapping[str, tuple[Family, ...]]:
    """The rows by model type: one for each stack of the model."""
    return {model_type: row for types, row in _ROWS.items() for model_type in types.split()}


_TEXT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": ("gemma3_text", {"bidirectional": "image"}),
    "llava": ("llama", {}),
}
"""Multimodal model types: the type of a `text_config` that says none, and what the whole model changes of its rows."""


def text_families() -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """The multimodal model types, whose `text_config` is read."""
    return _TEXT
