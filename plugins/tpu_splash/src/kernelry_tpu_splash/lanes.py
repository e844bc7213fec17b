"""The shape of a TPU's vector registers."""

LANES = 128
"""Elements of a row of a vector register; every block of splash is a multiple of it."""

SUBLANES = 8
"""Rows of a vector register of 32-bit elements."""
