"""Flash attention in Pallas for Triton: a kernel of our own."""
