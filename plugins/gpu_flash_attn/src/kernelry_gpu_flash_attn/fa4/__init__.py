"""FlashAttention-4 for NVIDIA GPUs, as fa4-jax calls it."""
