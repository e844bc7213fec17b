"""Pallas attention kernels for NVIDIA GPUs."""
