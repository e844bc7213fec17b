"""Shared memory: what a program of the grid may have on a device."""

from __future__ import annotations

import dataclasses
from typing import final

from kernelry.plugin import Request

_BYTES = {80: 166912, 90: 232448, 100: 232448}
"""What a block of threads may have, by compute capability times ten. Source: NVIDIA's CUDA programming guide."""

_LEAST_BYTES = 101376
"""Of compute capabilities 8.6, 8.9 and 12.0, and of a device that is not known."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one kernel asks for.

    Args:
      least: what is certainly needed. most: what certainly suffices.
    """

    least: int
    most: int


def available(request: Request) -> int:
    """Bytes of shared memory that a program of the grid may have on the request's device."""
    return _BYTES.get(request.target.generation or 0, _LEAST_BYTES)
