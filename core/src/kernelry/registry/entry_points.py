"""The entry points of plugins: their group, and the distributions that they are from."""

from __future__ import annotations

import difflib
import re

import importlib_metadata

from kernelry.registry.hooks import PROJECT

GROUP = "kernelry.plugins"
UNKNOWN = "unknown distribution"
_ALIKE = 0.95
"""How much of two texts is the same where one is likely the other misspelt: 0.97 where one letter is missing."""


def is_ours(group: str) -> bool:
    """Whether a group is, or was meant to be, the group of plugins."""
    if group == GROUP or group.partition(".")[0] == PROJECT:
        return True
    dotted = re.sub("[_-]", ".", group)
    return dotted.startswith("k") and difflib.SequenceMatcher(None, dotted, GROUP).ratio() > _ALIKE


def distribution_of(point: importlib_metadata.EntryPoint) -> str:
    """`name version`, read by hand: `point.dist.name` imports a parser of e-mails first, 20 ms."""
    try:
        text = (point.dist.read_text("METADATA") or point.dist.read_text("PKG-INFO")) if point.dist else None
        lines = (text or "").partition("\n\n")[0].splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return f"{headers['name']} {headers['version']}"
    except Exception:  # half uninstalled: the folder is there, the metadata is not
        return UNKNOWN
