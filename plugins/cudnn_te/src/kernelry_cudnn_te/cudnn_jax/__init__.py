"""cuDNN's fused attention as JAX calls it."""
