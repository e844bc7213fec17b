"""Tools for testing kernels: interpret mode on CPU, the float64 reference, and the conformance kit.

The names below are public, its modules are internal. Imports everything but the command and `aot`.
"""

from kernelry.policy.scope import interpret
from kernelry.testing import conformance
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
    "conformance",
    "interpret",
    "reference_attention",
    "reference_gradients",
    "reference_mask",
    "reference_merge",
    "reference_select_blocks",
]
