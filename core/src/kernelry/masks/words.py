"""The names that mask expressions know, and what they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, final

import numpy as np

from kernelry.errors import ArgumentError
from kernelry.masks.band import Causal, Full, SlidingWindow
from kernelry.masks.base import Extent, Mask
from kernelry.masks.chunked import BlockCausal, Chunked, whole_size
from kernelry.masks.indexed import BidirectionalSpans, Dense, Lengths, Segments
from kernelry.masks.prefix import PrefixLM
from kernelry.masks.selection import BlockSelection


def _per_slot(make: Callable[..., Mask]) -> Callable[..., Mask]:
    """Reads `name(0, 0, 1)` as one array, `name([0, 0], [0, 1])` as two."""

    def read(*values: Any, **named: Any) -> Mask:
        numbers = [isinstance(value, int) for value in values]
        if not any(numbers):
            return make(*values, **named)
        if not all(numbers):
            raise ArgumentError("write either whole numbers or lists: segments(0, 0, 1) or segments([0, 0], [0, 1]).")
        return make(np.asarray(values), **named)

    return read


def _truth(values: Any) -> np.ndarray:
    array = np.asarray(values)
    if not np.isin(array, (0, 1)).all():
        raise ArgumentError(f"write 1 for visible and 0 for hidden, got {array.tolist()}.")
    return array.astype(bool)


def _dense(visible: Any) -> Mask:
    return Dense(_truth(visible))


def _block_selection(keep: Any, block_size: int) -> Mask:
    return BlockSelection(_truth(keep), block_size)


def _from_flags(*flags: Any) -> Mask:
    return BidirectionalSpans.from_flags(_truth(flags[0] if len(flags) == 1 else flags))


WORDS: Mapping[str, Callable[..., Mask]] = MappingProxyType(
    {
        "full": Full,
        "causal": Causal,
        "window": SlidingWindow,
        "chunked": Chunked,
        "block_causal": BlockCausal,
        "prefix_lm": PrefixLM,
        "segments": _per_slot(Segments),
        "spans": _per_slot(BidirectionalSpans),
        "lengths": _per_slot(Lengths),
        "dense": _dense,
        "block_selection": _block_selection,
    }
)
"""As forms are written."""

CLASSES: Mapping[str, Callable[..., Mask]] = MappingProxyType(
    {
        "Full": Full,
        "Causal": Causal,
        "SlidingWindow": SlidingWindow,
        "Chunked": Chunked,
        "BlockCausal": BlockCausal,
        "PrefixLM": PrefixLM,
        "Segments": _per_slot(Segments),
        "BidirectionalSpans": _per_slot(BidirectionalSpans),
        "BidirectionalSpans.from_flags": _from_flags,
        "Lengths": _per_slot(Lengths),
        "Dense": _dense,
        "BlockSelection": _block_selection,
    }
)
"""As masks show themselves."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class StandIn:
    """A mask whose arrays have the right shapes and no meaning: only its form matters.

    Args:
      make: the mask of an extent.
      instead: what to write where arrays are needed.
      numbers: how many numbers it takes.
    """

    make: Callable[..., Mask]
    instead: str
    numbers: int = 0


def filled(value: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array of booleans or int32 that holds one value everywhere, and takes the memory of that one.

    Raises:
      ArgumentError: no array can have this shape.
    """
    one = np.asarray(value, bool if isinstance(value, bool) else np.int32)
    try:
        return np.broadcast_to(one, shape)
    except (ValueError, OverflowError) as error:
        raise ArgumentError(f"no array of a mask can have the shape {shape}; ask for smaller sizes.") from error


def _queries(extent: Extent) -> np.ndarray:
    return filled(0, (extent.batch, extent.q_len))


def _keys(extent: Extent) -> np.ndarray:
    return filled(0, (extent.batch, extent.kv_len))


def _all_visible(extent: Extent) -> Mask:
    return Dense(filled(True, (extent.batch, 1, extent.q_len, extent.kv_len)))


def _all_kept(extent: Extent, size: int) -> Mask:
    shape = extent.batch, extent.kv_heads, extent.q_len, -(-extent.kv_len // whole_size("block_selection: size", size))
    return BlockSelection(filled(True, shape), size)


STAND_INS: Mapping[str, StandIn] = MappingProxyType(
    {
        "segments": StandIn(lambda at: Segments(_queries(at)), "segments(0, 0, 1, 1)"),
        "segments_separate": StandIn(lambda at: Segments(_queries(at), _keys(at)), "segments([0, 0], [0, 1])"),
        "spans": StandIn(lambda at: BidirectionalSpans(_queries(at)), "spans(-1, 0, 0, -1)"),
        "spans_separate": StandIn(lambda at: BidirectionalSpans(_queries(at), _keys(at)), "spans([0, 0], [0, 1])"),
        "lengths": StandIn(lambda at: Lengths(filled(at.kv_len, (at.batch,))), "lengths(2)"),
        "prefix_lm": StandIn(lambda at: PrefixLM(filled(0, (at.batch,))), "prefix_lm(2)"),
        "dense": StandIn(_all_visible, "dense([[1, 0], [1, 1]])"),
        "block_selection": StandIn(_all_kept, "block_selection([[1, 0], [1, 1]], 2)", numbers=1),
    }
)
"""What forms may leave out."""
