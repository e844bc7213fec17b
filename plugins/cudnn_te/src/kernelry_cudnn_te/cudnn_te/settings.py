"""A request in transformer-engine's terms, or why it has none: pure data, so that no vendor is imported to refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import final

from kernelry.plugin import Atom, AtomKind, Operand, PositionKind, Refusal, RefusalCode, Request
from kernelry_cudnn_te.cudnn_te import across_devices
from kernelry_cudnn_te.cudnn_te.across_devices import Shared

ATOMS = frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.LENGTHS, AtomKind.SEGMENTS})

FIRST_WITH_ALL = (2, 20)
"""The release that has maximum logits, and packed rows right in a ring whatever the lengths of their segments."""

SEGMENTS = 32
"""Of a packed row, unless a tiling says another number."""

UNBOUNDED = -1
"""transformer-engine's word for a window without an end."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class TeSettings:
    """The arguments of a call other than arrays.

    Args:
      causal: whether no key ahead of a query is seen.
      padding: whether queries or keys end before their arrays do.
      packed: whether a row holds several segments, one after another.
      bottom_right: whether the last query is aligned with the last key, instead of the first with the first.
      shared: who shares the sequences; None where each device has whole ones.
      window: how far back and ahead a query looks, both ends included; None where only `causal` limits it.
    """

    causal: bool = False
    padding: bool = False
    packed: bool = False
    bottom_right: bool = False
    window: tuple[int, int] | None = None
    shared: Shared | None = None

    @classmethod
    def of(cls, request: Request) -> TeSettings:
        """Reads a request that `refusals` has let pass."""
        band = _band(request)
        kinds = {atom.kind for atom in request.mask.atoms}
        packed = is_packed(request)
        left, right = (None, None) if band is None else band.params
        causal = right == 0
        window = None
        if left is not None or (right is not None and not causal):
            window = (UNBOUNDED if left is None else left, UNBOUNDED if right is None else right)
        return cls(
            causal=causal,
            padding=packed or AtomKind.LENGTHS in kinds or _rows_behind_all_keys(request, left),
            packed=packed,
            bottom_right=band is not None and _shift(band) != 0,
            window=window,
            shared=Shared.of(request),
        )

    @property
    def mask_type(self) -> str:
        """The name of transformer-engine's mask, e.g. `padding_causal`."""
        words = [name for name, given in (("padding", self.padding), ("causal", self.causal)) if given]
        return "_".join(words + ["bottom_right"] * self.bottom_right) or "no_mask"

    @property
    def left(self) -> int | None:
        """How far back a query looks; None where there is no end to it."""
        return None if self.window is None or self.window[0] == UNBOUNDED else self.window[0]


def is_packed(request: Request) -> bool:
    """Whether rows hold segments."""
    return any(atom.kind is AtomKind.SEGMENTS for atom in request.mask.atoms)


def _band(request: Request) -> Atom | None:
    return next((atom for atom in request.mask.atoms if atom.is_band), None)


def _shift(band: Atom) -> int:
    """Which key slot the first query is aligned with; 0 where positions are not plain offsets."""
    return (band.query.start or 0) - (band.kv.start or 0)


def _rows_behind_all_keys(request: Request, left: int | None) -> bool:
    return left is not None and request.q_len > request.kv_len + left


def refusals(request: Request) -> Iterator[Refusal]:
    """What of the mask, the bias and the statistics transformer-engine cannot express."""
    yield from _bands(request)
    yield from _indexed(request)
    yield from _bias(request)
    yield from _max_logits(request)
    yield from _dropout(request)
    yield from across_devices.refusals(request)


def _bands(request: Request) -> Iterator[Refusal]:
    bands = [atom for atom in request.mask.atoms if atom.is_band]
    if len(bands) > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} is more than one band")
    for band in bands:
        yield from _bounds(band, request)
        yield from _places(band, request)


def _bounds(band: Atom, request: Request) -> Iterator[Refusal]:
    for name, bound in zip(("left", "right"), band.params, strict=True):
        if bound is not None and bound < 0:
            yield Refusal(RefusalCode.MASK_ATOM, f"{band} has {name}={bound} < 0")
    right = band.params[1]
    if right != 0 and request.q_len != request.kv_len:
        # Which corner such a window starts in differs between releases.
        detail = f"{band} looks ahead, and q_len={request.q_len} differs from kv_len={request.kv_len}"
        yield Refusal(RefusalCode.MASK_ATOM, detail)


def _places(band: Atom, request: Request) -> Iterator[Refusal]:
    if PositionKind.STATIC in band.position_kinds:
        if request.context_parallel is None:
            yield Refusal(RefusalCode.POSITIONS, f"{band} has static positions, without context_parallel")
        return
    shift, corner = _shift(band), request.kv_len - request.q_len
    if shift == 0:
        return
    if shift != corner or corner < 0:
        detail = (
            f"{band} aligns the first query with key {shift}; served are key 0 and, aligning the last with the last, "
        )
        yield Refusal(RefusalCode.POSITIONS, f"{detail}kv_len - q_len = {corner}")
    elif band.params[1] != 0 or len(request.mask.atoms) > 1:
        # With lengths, transformer-engine would align the last query of each length with its last key.
        yield Refusal(RefusalCode.POSITIONS, f"mask={request.mask} is shifted by {shift} and not only causal")


def _indexed(request: Request) -> Iterator[Refusal]:
    kinds = [atom.kind for atom in request.mask.atoms if not atom.is_band]
    if len(kinds) > 1 and set(kinds) <= ATOMS:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} is more than one of lengths and segments")


def _bias(request: Request) -> Iterator[Refusal]:
    if request.bias is None:
        return
    if is_packed(request):
        yield Refusal(RefusalCode.BIAS, f"bias={request.bias} with segments")
    if Operand.BIAS in request.gradients and request.bias[:2] != (1, request.q_heads):
        detail = f"bias={request.bias} has a gradient only where it is [1, N, T, S] with N={request.q_heads}"
        yield Refusal(RefusalCode.GRADIENT, detail, "name the gradients that are needed, e.g. gradients=('query', …)")


def _max_logits(request: Request) -> Iterator[Refusal]:
    if not request.max_logits:
        return
    if request.sinks:
        yield Refusal(RefusalCode.SINKS, "max_logits might contain the sinks")
    if any(not atom.is_band for atom in request.mask.atoms) and request.batch > 1:
        detail = f"transformer-engine's max_logits is one for batch={request.batch} > 1 rows with mask={request.mask}"
        yield Refusal(RefusalCode.MAX_LOGITS, detail)


def _dropout(request: Request) -> Iterator[Refusal]:
    if not request.dropout_rate:
        return
    if request.partial or request.max_logits:
        asked = "partial" if request.partial else "max_logits"
        detail = (
            f"dropout_rate={request.dropout_rate} with {asked}: which probabilities were dropped is not known later"
        )
        yield Refusal(RefusalCode.DROPOUT, detail)
