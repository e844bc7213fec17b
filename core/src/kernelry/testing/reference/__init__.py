"""Attention in NumPy float64, written from the definition of the semantics and independent of the kernels.

Internal: `kernelry.testing` exports the names below.
"""

from kernelry.testing.reference.attention import Reference, reference_attention, reference_merge
from kernelry.testing.reference.gradients import ReferenceGradients, reference_gradients
from kernelry.testing.reference.masks import reference_mask
from kernelry.testing.reference.moba import reference_select_blocks

__all__ = [
    "Reference",
    "ReferenceGradients",
    "reference_attention",
    "reference_gradients",
    "reference_mask",
    "reference_merge",
    "reference_select_blocks",
]
