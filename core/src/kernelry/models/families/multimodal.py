"""Multimodal models: which text model is in one, and what its images change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelry.models import encoding

_CAUSAL: Mapping[str, str] = {
    "aria_text": "aria",
    "cohere2": "aya_vision cohere2_vision",
    "embedding_gemma2_text": "embedding_gemma2",
    "exaone4": "exaone4_5",
    "gemma3n_text": "gemma3n",
    "glm4v_text": "glm4v",
    "granite": "granite_speech",
    "lfm2": "lfm2_vl",
    "llama": "llava llava_next llava_next_video vipllava video_llava idefics3 smolvlm deepseek_vl",
    "llama4_text": "llama4",
    "mistral": "idefics2 mistral3",
    "mllama_text_model": "mllama",
    "modernbert": "modernvbert",
    "qwen2": "internvl llava_onevision qwen2_audio got_ocr2",
    "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen2_vl_text": "qwen2_vl",
    "qwen3_5_text": "qwen3_5",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
    "qwen3_vl_text": "qwen3_vl",
    "ultrabert": "ultravbert",
}
"""By the text model that is in them: types whose images and sounds are seen as text is."""

_VISION = {"bidirectional": encoding.vision_on_sliding, "remarks": encoding.vision_in_window}

_IMAGES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": ("gemma3_text", {"bidirectional": "image", "remarks": encoding.image_in_window}),
    "gemma4": ("gemma4_text", _VISION),
    # As `generate` masks; a plain forward pass of transformers also lets images see each other on full layers.
    "gemma4_unified": ("gemma4_unified_text", _VISION),
    # Its text_config says that the text model sees later tokens: the whole model masks by the prefix instead.
    "paligemma": ("gemma", {"bidirectional": "prefix", "causal": True}),
}

TEXT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{outer: (inner, {}) for inner, types in _CAUSAL.items() for outer in types.split()},
    **_IMAGES,
}
"""The type of a `text_config` that says none, and what the whole model changes of its rows."""
