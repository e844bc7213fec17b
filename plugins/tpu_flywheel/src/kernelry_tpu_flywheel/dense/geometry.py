"""Which keys each query sees, in the vendor's terms: one band around a diagonal, over padded lengths.

A band shows query i the keys j with low ≤ j − i ≤ high. The vendor takes it as an offset, from which a query looks so
many keys back and ahead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import final

import numpy as np

from kernelry.plugin import AtomKind, Refusal, RefusalCode, Request, round_up
from kernelry_tpu_flywheel.lanes import LANES


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """The band of a call, and its lengths.

    Args:
      q_len, kv_len: T and S.
      low, high: the least and the greatest j − i that is seen; None where nothing is hidden on that side.
      packed: whether rows hold segments.
    """

    q_len: int
    kv_len: int
    low: int | None = None
    high: int | None = None
    packed: bool = False

    @classmethod
    def of(cls, request: Request) -> Geometry:
        """That of a request; atoms and positions that the kernel does not take are left out."""
        low, high = -request.q_len, request.kv_len
        for atom in request.mask.atoms:
            if not atom.is_band or atom.query.start is None or atom.kv.start is None:
                continue
            left, right = atom.params
            shift = atom.query.start - atom.kv.start
            low = low if left is None else max(low, shift - left)
            high = high if right is None else min(high, shift + right)
        return cls(
            request.q_len,
            request.kv_len,
            None if low <= 1 - request.q_len else low,
            None if high >= request.kv_len - 1 else high,
            any(atom.kind is AtomKind.SEGMENTS for atom in request.mask.atoms),
        )

    @property
    def is_window(self) -> bool:
        """Whether keys far behind a query are hidden, for which the vendor has no backward pass."""
        return self.low is not None

    @property
    def is_movable(self) -> bool:
        """Whether tokens of a segment may be put side by side: their order counts at most, not their distance."""
        return self.low is None and self.high in (None, 0)

    @property
    def offset(self) -> int:
        """Which key the first query is aligned with."""
        if self.high is not None:
            return self.high
        return self.low or 0

    @property
    def window(self) -> tuple[int | None, int | None]:
        """How many keys back and ahead of `offset` a query looks; None is all."""
        left = None if self.low is None else self.offset - self.low
        return left, None if self.high is None else self.high - self.offset

    @property
    def shows_all_rows_behind(self) -> bool:
        """Whether some query would see the zeros put behind the last key."""
        return self.high is None or self.q_len + self.high > self.kv_len

    @property
    def rows(self) -> int:
        """T with the zeros that make whole blocks."""
        return round_up(self.q_len, LANES)

    @property
    def keys(self) -> int:
        """The keys that are read, in whole blocks: none behind the last that some query sees."""
        last = self.kv_len if self.high is None else min(self.kv_len, self.q_len + self.high)
        return round_up(last, LANES)

    @property
    def empty_rows(self) -> np.ndarray:
        """Which queries see no key by the band alone, bool [T]."""
        row = np.arange(self.q_len)
        first = np.zeros_like(row) if self.low is None else np.maximum(row + self.low, 0)
        last = np.full_like(row, self.kv_len - 1) if self.high is None else np.minimum(row + self.high, self.kv_len - 1)
        return first > last

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """What of the mask and the lengths the vendor cannot express."""
        if self.empty_rows.all():
            detail = f"mask={request.mask} shows no key to any of q_len={self.q_len} queries"
            yield Refusal(RefusalCode.MASK_ATOM, detail)
        elif self.packed:
            yield from self._packed_refusals(request)
        elif self.kv_len % LANES and self.shows_all_rows_behind:
            padded = round_up(self.kv_len, LANES)
            detail = f"kv_len={self.kv_len} is not a multiple of {LANES}, and mask={request.mask} does not hide what"
            both = request.q_len == request.kv_len
            pad_to = (("q_len", padded), ("kv_len", padded)) if both else (("kv_len", padded),)
            yield Refusal(RefusalCode.SEQUENCE_LENGTH, f"{detail} would fill it up", f"pad to {padded}", pad_to)

    def _packed_refusals(self, request: Request) -> Iterator[Refusal]:
        count = sum(atom.kind is AtomKind.SEGMENTS for atom in request.mask.atoms)
        if count > 1:
            yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} has {count} arrays of ids")
        if (self.low or 0) > 0 or (self.high or 0) < 0:
            detail = f"mask={request.mask} hides from queries of a segment the keys at their own places"
            yield Refusal(RefusalCode.MASK_ATOM, detail)
