"""Masks: which keys each query may see.

Positional masks (`Causal`, `SlidingWindow`, `Chunked`, `BlockCausal`, `PrefixLM`, `BlockSelection`,
`Predicate`) are predicates over positions, which `.at` sets; indexed masks (`Segments`,
`BidirectionalSpans`, `Lengths`, `Dense`) are about array slots. All compose with `&`, `|` and `~`.

The names below are public, its modules are internal. Imports `storage` and what is below.
"""

from kernelry.masks.band import Causal, Full, SlidingWindow
from kernelry.masks.base import Extent, Mask
from kernelry.masks.chunked import BlockCausal, Chunked
from kernelry.masks.dense import Dense
from kernelry.masks.form import Atom, AtomKind, MaskForm, PositionForm, PositionKind
from kernelry.masks.ids import BidirectionalSpans, Segments
from kernelry.masks.lengths import Lengths
from kernelry.masks.predicate import Predicate
from kernelry.masks.prefix import PrefixLM
from kernelry.masks.run_time import BlockKind
from kernelry.masks.selection import BlockSelection
from kernelry.masks.side import Axis, Side

__all__ = [
    "Atom",
    "AtomKind",
    "Axis",
    "BidirectionalSpans",
    "BlockCausal",
    "BlockKind",
    "BlockSelection",
    "Causal",
    "Chunked",
    "Dense",
    "Extent",
    "Full",
    "Lengths",
    "Mask",
    "MaskForm",
    "PositionForm",
    "PositionKind",
    "Predicate",
    "PrefixLM",
    "Segments",
    "Side",
    "SlidingWindow",
]
