"""Tools for testing kernels: interpret mode on CPU, and the float64 reference."""

from kernelry.scope import interpret
from kernelry.testing.reference import (
    Reference,
    ReferenceGradients,
    reference_attention,
    reference_gradients,
    reference_mask,
    reference_merge,
    reference_select_blocks,
)

__all__ = [
    "Reference",
    "ReferenceGradients",
    "interpret",
    "reference_attention",
    "reference_gradients",
    "reference_mask",
    "reference_merge",
    "reference_select_blocks",
]
