"""Which GPUs dew-flash-attn has code for, and what it must know of one that is not in this process."""

from __future__ import annotations

HOPPER = 90
"""Compute capability times ten; FlashAttention-3 is compiled for it, FlashAttention-2 for the others."""

MULTIPROCESSORS = {
    "a100": 108,
    "l40s": 142,
    "rtx5090": 170,
    "rtxpro6000": 188,
}
"""Streaming multiprocessors. FlashAttention-2 splits few queries' keys among them, into buffers that the program holds,
so that a program for a part of a GPU must be made on that GPU.

Sources: of a100 and rtxpro6000 the device descriptions in XLA's repository, xla/backends/gpu/target_config/specs; of
rtx5090 NVIDIA's white paper on the architecture RTX Blackwell; of l40s its data sheet, 18176 CUDA cores, and the 128 of
a multiprocessor in the white paper on Ada. Of an l4 the numbers that are published differ."""


def is_served(generation: int) -> bool:
    """Whether the libraries hold code for a compute capability, times ten: `ARCHITECTURES` is sm80, sm90 and sm120.

    Code for sm80 runs on all 8.x; that for sm90 and for sm120 on no other.
    """
    return generation // 10 == 8 or generation in (HOPPER, 120)


def why_not_on_this_device() -> str | None:
    """Names the compute capability of this process's GPU where there is no code for it."""
    import jax

    try:
        capability = str(jax.devices("gpu")[0].compute_capability)
    except RuntimeError:
        return "JAX sees no GPU"
    generation = int(capability.replace(".", ""))
    return None if is_served(generation) else f"this GPU is of compute capability {capability}"
