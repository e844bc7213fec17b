"""Masks: which keys each query may see.

Positional masks (`Causal`, `SlidingWindow`) are predicates over positions, which `.at` sets;
indexed masks (`Segments`, `Lengths`, `Dense`) are about array slots. All compose with `&`, `|`
and `~`.
"""

from kernelry.masks.band import Causal, Full, SlidingWindow
from kernelry.masks.base import Extent, Mask
from kernelry.masks.blocks import BlockKind
from kernelry.masks.form import Atom, AtomKind, MaskForm, PositionForm, PositionKind
from kernelry.masks.indexed import Dense, Lengths, Segments
from kernelry.masks.positions import Axis, Side

__all__ = [
    "Atom",
    "AtomKind",
    "Axis",
    "BlockKind",
    "Causal",
    "Dense",
    "Extent",
    "Full",
    "Lengths",
    "Mask",
    "MaskForm",
    "PositionForm",
    "PositionKind",
    "Segments",
    "Side",
    "SlidingWindow",
]
