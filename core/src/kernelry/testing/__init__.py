"""Tools for testing kernels."""

from kernelry.scope import interpret

__all__ = ["interpret"]
