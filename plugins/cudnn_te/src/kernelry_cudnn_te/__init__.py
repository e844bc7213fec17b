"""cuDNN attention for NVIDIA GPUs."""
