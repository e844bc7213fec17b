"""Multimodal models: which text model is in one, and what its images change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelry.models import encoding

_CAUSAL: Mapping[str, str] = {
    "llama": "llava llava_next llava_next_video vipllava video_llava idefics3 smolvlm deepseek_vl",
    "mistral": "idefics2 mistral3",
    "qwen2": "internvl llava_onevision qwen2_audio got_ocr2",
}
"""By the text model that is in them: types whose images and sounds are seen as text is."""

_IMAGES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": ("gemma3_text", {"bidirectional": "image", "remarks": encoding.image_in_window}),
    # Its text_config may say that the text model sees later tokens: the whole model masks by the prefix instead.
    "paligemma": ("gemma", {"bidirectional": "prefix", "causal": True}),
}

TEXT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{outer: (inner, {}) for inner, types in _CAUSAL.items() for outer in types.split()},
    **_IMAGES,
}
"""The type of a `text_config` that says none, and what the whole model changes of its rows."""
