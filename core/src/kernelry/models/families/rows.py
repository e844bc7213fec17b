"""What every row of a kind has in common: a row says only what differs from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from kernelry.models import layerwise, patterns, rules
from kernelry.models.rules import Family

Rows = Mapping[str, tuple[Family, ...]]
"""Rows by the model types that they describe, in one text with spaces between: one row for each stack of the model."""

decoder = functools.partial(
    Family,
    layers=patterns.all_full,
    heads=rules.grouped,
    scale=rules.head_dim_scale,
    sinks=rules.no_sinks,
    rope=layerwise.everywhere,
    causal=rules.is_causal,
)
"""A causal decoder with rotary embeddings and grouped heads: what a row does not say is this."""

encoder = functools.partial(decoder, causal=False)
"""An encoder: as `decoder`, and every token sees later ones."""
