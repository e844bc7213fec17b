"""Tools for testing kernels: interpret mode on CPU, and the float64 reference."""

from kernelry.scope import interpret
from kernelry.testing.reference import Reference, reference_attention, reference_mask

__all__ = ["Reference", "interpret", "reference_attention", "reference_mask"]
