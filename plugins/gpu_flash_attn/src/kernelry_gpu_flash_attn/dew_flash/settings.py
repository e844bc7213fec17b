"""A request as FlashAttention is told of it, or why it cannot be: pure data, so that refusing imports no vendor."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import final

import numpy as np

from kernelry.plugin import Atom, AtomKind, Refusal, RefusalCode, Request, Target, Tiling

ATOMS = frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.SEGMENTS, AtomKind.LENGTHS})

UNBOUNDED = -1
"""FlashAttention's word for a window without an end."""

MOST_SEQUENCES = 65535
"""What CUDA allows for the grid's second axis, which FlashAttention-2 has the sequences on."""


@final
class Packing(enum.Enum):
    """What a row of the batch is to FlashAttention."""

    WHOLE = "whole"
    """One sequence."""
    SEGMENTS = "segments"
    """As many sequences as it has runs of equal ids."""
    LENGTHS = "lengths"
    """All queries with the first keys, and a sequence of the other keys, which has no queries."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The static side of a call.

    Args:
      target: where it will run.
      scale: the factor on the logits.
      causal: whether no key behind the diagonal is seen, which ends at the last query and the last key.
      window: how many keys before and behind the diagonal a query sees, −1 all.
      longest: T and S, the most queries and keys of a sequence.
      packing: what a row is.
      runs: the most runs that a row of segments may have.
    """

    target: Target
    scale: float
    causal: bool
    window: tuple[int, int]
    longest: tuple[int, int]
    packing: Packing
    runs: int

    @classmethod
    def of(cls, request: Request, tiling: Tiling) -> Settings:
        """Reads a request that `refusals` has let pass."""
        left, right = bounds_of(request)
        packing = packing_of(request)
        return cls(
            target=request.target,
            scale=float(request.scale),
            causal=right == 0,
            window=_window(left, right),
            longest=(request.q_len, request.kv_len),
            packing=packing,
            runs=min(tiling["max_segments"], request.q_len) if packing is Packing.SEGMENTS else 1,
        )


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    """Written as in the vendor's README: plain causal has no window, a causal one ends at 0."""
    if left is None and right == 0:
        return UNBOUNDED, UNBOUNDED
    return UNBOUNDED if left is None else left, UNBOUNDED if right is None else right


def packing_of(request: Request) -> Packing:
    """What a row of a request's batch is."""
    kinds = {atom.kind for atom in request.mask.atoms}
    if AtomKind.SEGMENTS in kinds:
        return Packing.SEGMENTS
    return Packing.LENGTHS if AtomKind.LENGTHS in kinds else Packing.WHOLE


def bounds_of(request: Request) -> tuple[int | None, int | None]:
    """How many keys before and behind the diagonal a query sees; None where that bound hides nothing."""
    band = _band(request)
    if band is None:
        return None, None
    left, right = band.params
    # The last query stands at the last key: T − 1 keys are behind the first query's, S − 1 before the last's.
    return (
        None if left is None or left >= request.kv_len - 1 else left,
        None if right is None or right >= request.q_len - 1 else right,
    )


def seen_by_band(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Which queries see some key, bool [T], and which keys some query sees, bool [S], as far as the band decides."""
    left, right = bounds_of(request)
    q_len, kv_len = request.q_len, request.kv_len
    place = np.arange(q_len) + kv_len - q_len
    first = np.maximum(place - left, 0) if left is not None else np.zeros(q_len, int)
    last = np.minimum(place + right, kv_len - 1) if right is not None else np.full(q_len, kv_len - 1)
    rows = first <= last
    # Both ends grow from query to query, by 1 at most: what all queries see is one range, without a gap.
    slots = np.zeros(kv_len, bool)
    if rows.any():
        slots[first[rows][0] : last[rows][-1] + 1] = True
    return rows, slots


def refusals(request: Request) -> Iterator[Refusal]:
    """What of the mask and of the sizes FlashAttention cannot express."""
    yield from _bands(request)
    yield from _indexed(request)
    if request.batch > MOST_SEQUENCES:
        yield Refusal(RefusalCode.SEQUENCE_LENGTH, f"batch={request.batch} > {MOST_SEQUENCES}, CUDA's limit of a grid")


def _band(request: Request) -> Atom | None:
    return next((atom for atom in request.mask.atoms if atom.is_band), None)


def _bands(request: Request) -> Iterator[Refusal]:
    bands = [atom for atom in request.mask.atoms if atom.is_band]
    if len(bands) > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} is more than one band")
    for band in bands:
        for name, bound in zip(("left", "right"), band.params, strict=True):
            if bound is not None and bound < 0:  # a negative bound is none to FlashAttention
                yield Refusal(RefusalCode.MASK_ATOM, f"{band} has {name}={bound} < 0")
        yield from _alignment(band, request)
        yield from _reach(band, request)


def _alignment(band: Atom, request: Request) -> Iterator[Refusal]:
    query, kv, corner = band.query.start, band.kv.start, request.kv_len - request.q_len
    if query is None or kv is None:
        return  # core refuses positions that are not offsets
    if query - kv != corner:
        yield Refusal(
            RefusalCode.POSITIONS,
            f"{band} aligns the first query with key {query - kv}; FlashAttention aligns the last with the last, which "
            f"is kv_len - q_len = {corner}",
        )


def _reach(band: Atom, request: Request) -> Iterator[Refusal]:
    """FlashAttention-2 cuts how far a window looks ahead to S, which hides keys where T > S + 1.

    Source: flash_attn_jax, csrc/flash_attn: mha_fwd_impl drops a right bound of S or more, and set_params_fprop gives a
    window that has a left bound alone the right bound S.
    """
    left, right = bounds_of(request)
    if request.q_len <= request.kv_len + 1 or (left is None and right is None):
        return
    if right is None or right >= request.kv_len:
        detail = f"{band} looks ahead by more than kv_len={request.kv_len} < q_len={request.q_len}"
        yield Refusal(RefusalCode.MASK_ATOM, f"{detail}, where FlashAttention-2 stops")


def _indexed(request: Request) -> Iterator[Refusal]:
    indexed = [atom for atom in request.mask.atoms if atom.kind in (AtomKind.SEGMENTS, AtomKind.LENGTHS)]
    if len(indexed) > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} is more than one of lengths and segments")
    if packing_of(request) is Packing.LENGTHS and _band(request) is not None:
        detail = f"mask={request.mask}: FlashAttention would align the last query with the last key of each length"
        yield Refusal(RefusalCode.MASK_ATOM, detail)
