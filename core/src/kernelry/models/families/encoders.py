"""Encoders, models with an encoder and a decoder, and decoders with biases or learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelry.models.families.rows import Rows

ENCODERS: Rows = {}

TEXT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": ("gemma3_text", {"bidirectional": "image"}),
    "llava": ("llama", {}),
}
"""Multimodal model types: the type of a `text_config` that says none, and what the whole model changes of its rows."""
