"""Configs: the options of an attention layer, read from TOML, YAML, mappings and MaxText's options.

The names below are public, its modules are internal. Imports `plugin`, `api` and what is below.
"""

from kernelry.config.editors import json_schema
from kernelry.config.layer import AttentionConfig, AttentionType, MoBA
from kernelry.config.loading import load_config, load_maxtext
from kernelry.config.maxtext import from_maxtext
from kernelry.policy.lock import Lock

__all__ = [
    "AttentionConfig",
    "AttentionType",
    "Lock",
    "MoBA",
    "from_maxtext",
    "json_schema",
    "load_config",
    "load_maxtext",
]
