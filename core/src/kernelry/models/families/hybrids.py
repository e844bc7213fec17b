"""Decoders some of whose layers do not attend, or attend to keys that a config cannot describe."""

from __future__ import annotations

from kernelry.models.families.rows import Rows

HYBRIDS: Rows = {}
