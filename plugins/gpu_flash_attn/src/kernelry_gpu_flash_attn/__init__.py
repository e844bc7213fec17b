"""FlashAttention for NVIDIA GPUs."""
