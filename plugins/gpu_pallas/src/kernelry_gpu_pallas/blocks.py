"""What Triton asks of tiles: sides that are powers of two, and not too small for a product."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import Tiling

SMALLEST_BLOCK = 16
"""Elements; the smallest side of a matrix product."""

_MOST_WARPS = 32
"""Of 32 threads each, of the 1024 that CUDA allows."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def problems(kernel: str, tiling: Tiling) -> Iterator[str]:
    """Why Triton can compile no such tiling, whatever the device.

    Args:
      kernel: its name.
    """
    for name, value in tiling.values:
        if value < 1:
            yield f"{name}={value} of {kernel} < 1"
        elif name.startswith(("block", "num_warps")) and value & (value - 1):
            yield f"{name}={value} of {kernel} is not a power of two; Triton has no other tiles"
        elif name.startswith("num_warps") and value > _MOST_WARPS:
            yield f"{name}={value} of {kernel} > {_MOST_WARPS}, the most that a block of threads has"
        if name.startswith("block") and 0 < value < SMALLEST_BLOCK:
            yield f"{name}={value} of {kernel} < {SMALLEST_BLOCK}, the smallest side of a product"
