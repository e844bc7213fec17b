"""Decoders whose layers are reproduced, with the options that are varied."""

from model_case import Case

DECODERS = [
    Case("llama"),
    Case("mistral"),
    Case("mistral", {"sliding_window": None}),
    Case("mistral", {"is_causal": False}),
    Case("qwen2"),
    Case("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("gemma2"),
    Case("gpt_oss"),
]
SPLASH = [case for case in DECODERS if case.model_type in ("gemma2",)]
