"""The shape of a TPU's vector registers."""

LANES = 128
"""Elements of a row of a vector register; every block of flywheel is a multiple of it."""
