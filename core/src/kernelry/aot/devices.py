"""Published figures of accelerators, per device as JAX counts them."""

from __future__ import annotations

import dataclasses
from typing import final


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What one device can do.

    Args:
      flops: bfloat16 products, FLOP/s, of dense matrices.
      bandwidth: of its main memory, bytes/s.
    """

    flops: float
    bandwidth: float


FIGURES: dict[str, Figures] = {
    "v4": Figures(137.5e12, 614e9),
    "v5e": Figures(197e12, 819e9),
    "v5p": Figures(459e12, 2765e9),
    "v6e": Figures(918e12, 1640e9),
    "tpu7x": Figures(1153.5e12, 3690e9),
    "a100": Figures(312e12, 2039.04e9),
    "h100": Figures(989.4e12, 3352.32e9),
    "h200": Figures(989.4e12, 4800e9),
    "b200": Figures(2250e12, 7672.32e9),
}
"""Source of the TPUs: Google Cloud's TPU documentation, one page per version. The compiler describes a v4 and a TPU7x
chip as two devices, each with half of what the chip has, and the others as one. Source of the GPUs: for FLOP/s NVIDIA's
data sheets of the SXM modules (of HGX B200, an eighth), halved where they count sparse matrices; for bandwidth what XLA
says of the same modules (see `gpus`)."""
