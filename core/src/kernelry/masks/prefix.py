"""The mask of prefix language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, final

from kernelry._pytree import pytree
from kernelry.masks.arrays import as_limits, check_limits, filled
from kernelry.masks.base import Extent, Mask, Placeholder
from kernelry.masks.chunked import looks_back_only
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.side import ArrayLike, Side

if TYPE_CHECKING:
    from kernelry.masks.padding import Padding


@final
@pytree("prefix_lengths")
@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class PrefixLM(Mask):
    """Every query sees the prefix, and causally what follows it: p_k < prefix or p_k ≤ p_q.

    `PrefixLM(2)`:

        1 1 . .
        1 1 . .
        1 1 1 .
        1 1 1 1

    Args:
      prefix_lengths: an integer, or integers [B]: positions below it are the prefix.
    """

    prefix_lengths: ArrayLike

    word: ClassVar[str] = "prefix_lm"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.PREFIX_LM,)
    positional: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, str]] = {"prefix_lengths": "B"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix_lengths", as_limits("PrefixLM: prefix_lengths", self.prefix_lengths))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        prefix = self.prefix_lengths.reshape(-1, 1, 1, 1)
        return (kv.positions < prefix) | (kv.positions <= query.positions)

    def check(self, extent: Extent) -> None:
        check_limits("PrefixLM: prefix_lengths", self.prefix_lengths, extent.batch)

    @classmethod
    def placeholders(cls) -> dict[str, Placeholder]:
        return {"prefix_lm": Placeholder(lambda at: PrefixLM(filled(0, (at.batch,))), "prefix_lm(2)")}

    @classmethod
    def sees_itself(cls, atom: Atom) -> bool:
        return True

    @classmethod
    def follows_from(cls, atom: Atom, other: Atom) -> bool:
        return looks_back_only(other)

    def padded(self, padding: Padding) -> Mask:
        return self
