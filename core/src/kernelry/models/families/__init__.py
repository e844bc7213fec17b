"""The table of facts: which row describes a model type. Internal.

Each row says what the code of transformers does, where the config does not; `tests/models` runs that code against it.
Internal.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kernelry.models.families.decoders import DECODERS
from kernelry.models.families.encoders import ENCODERS
from kernelry.models.families.hybrids import HYBRIDS
from kernelry.models.families.multimodal import TEXT
from kernelry.models.rules import Family


@functools.cache
def families() -> Mapping[str, tuple[Family, ...]]:
    """The rows by model type: one for each stack of the model."""
    tables = (DECODERS, HYBRIDS, ENCODERS)
    return {model_type: row for table in tables for types, row in table.items() for model_type in types.split()}


def text_families() -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """The multimodal model types, whose `text_config` is read."""
    return TEXT
