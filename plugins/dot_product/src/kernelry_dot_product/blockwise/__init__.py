"""Attention tile by tile in plain XLA: a rolled loop over blocks of queries, inside it one over the blocks of keys."""

from kernelry_dot_product.blockwise.kernel import BlockwiseKernel

__all__ = ["BlockwiseKernel"]
