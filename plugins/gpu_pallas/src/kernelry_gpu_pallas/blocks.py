"""What Triton asks of tiles: sides that are powers of two, and not too small for a product."""

from __future__ import annotations

SMALLEST_BLOCK = 16
"""Elements; the smallest side of a matrix product."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
