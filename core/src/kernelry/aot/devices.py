"""Published figures of accelerators, per device as JAX counts them."""

from __future__ import annotations

import dataclasses
from typing import final


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What one device can do.

    Args:
      flops: bfloat16 products, FLOP/s.
      bandwidth: of its main memory, bytes/s.
      topology: the smallest slice that the vendor's compiler describes, in its own words.
    """

    flops: float
    bandwidth: float
    topology: str


FIGURES: dict[str, Figures] = {
    "v4": Figures(137.5e12, 614e9, "v4:2x2x1"),
    "v5e": Figures(197e12, 819e9, "v5e:2x2"),
    "v5p": Figures(459e12, 2765e9, "v5p:2x2x1"),
    "v6e": Figures(918e12, 1640e9, "v6e:2x2"),
    "tpu7x": Figures(1153.5e12, 3690e9, "tpu7x:2x2x1"),
}
"""Source: Google Cloud's TPU documentation, one page per version. The compiler describes a v4 and a TPU7x chip as two
devices, each with half of what the chip has, and the others as one."""
