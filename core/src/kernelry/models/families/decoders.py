"""Causal decoders whose every layer attends."""

from __future__ import annotations

from kernelry.models import rules
from kernelry.models.families.rows import Rows, decoder

DECODERS: Rows = {
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
