"""Sequences shared out over an axis of the mesh, for kernels that attend across devices themselves."""

from __future__ import annotations

import dataclasses
from typing import final

from kernelry.errors import ArgumentError, nearest
from kernelry.masks.positions import load_balanced_order as load_balanced_order

STRATEGIES = ("all_gather", "ring")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ContextParallel:
    """How queries, keys and values that are sharded along T and S are attended to.

    Args:
      axis: the mesh axis that the sequences are sharded over.
      strategy: `all_gather` brings all keys to every device; `ring` passes them around.
      size: devices along the axis; None is what the active mesh says.

    Raises:
      ArgumentError: the strategy is unknown, or the size not positive.
    """

    axis: str
    strategy: str = "all_gather"
    size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.axis, str) or not self.axis or ":" in self.axis:
            raise ArgumentError(f"ContextParallel: axis must be the name of a mesh axis, got {self.axis!r}.")
        if self.strategy not in STRATEGIES:
            known = nearest(str(self.strategy), STRATEGIES)
            raise ArgumentError(f"ContextParallel: unknown strategy {self.strategy!r}{known}")
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise ArgumentError(f"ContextParallel: size must be a positive integer, got {self.size!r}.")

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.strategy, self.axis, self.size) if part is not None)

    @classmethod
    def parse(cls, text: str) -> ContextParallel:
        """Reads what `str` writes of one with a size, e.g. `ring:context:4`.

        Raises:
          ArgumentError: it has another form.
        """
        parts = text.split(":") if isinstance(text, str) else []
        if len(parts) != 3 or not parts[2].isdecimal():
            raise ArgumentError(f"context_parallel is written strategy:axis:size, e.g. ring:context:4, got {text!r}.")
        return cls(parts[1], parts[0], int(parts[2]))
