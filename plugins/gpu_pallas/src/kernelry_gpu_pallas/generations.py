"""Which matrix instructions a GPU has."""

from __future__ import annotations

from kernelry.plugin import Request

AMPERE, HOPPER, BLACKWELL = 80, 90, 100
"""Compute capability times ten."""

_AS_AMPERE = 120
"""RTX Blackwell has neither a warp group's products (wgmma, 9.0 only) nor tensor memory (tcgen05, 10.x only).

Source: PTX ISA, "Target ISA Notes" of wgmma.mma_async and tcgen05.mma."""


def multiplies_as(request: Request) -> int:
    """The generation whose matrix instructions a request's device has; 0 where the device is not known."""
    generation = request.target.generation or 0
    return AMPERE if generation >= _AS_AMPERE else generation
