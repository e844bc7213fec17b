"""What this plugin registers: `fa4` and `dew_flash`, for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from kernelry.plugin import KernelSpec, Ranking, Request, hookimpl
from kernelry_gpu_flash_attn.dew_flash.spec import DEW_FLASH
from kernelry_gpu_flash_attn.fa4.spec import FA4

contract = (1, 1)

_BLACKWELL = 100
_SLOWER_ON_BLACKWELL = ("cudnn_jax", "cudnn_te", "pallas_flash", "pallas_mha")
"""cuDNN's kernels and Triton's, with which FlashAttention-4's authors compare theirs."""

_PUBLISHED = (
    "published: FlashAttention-4 is up to 1.3 times as fast as cuDNN 9.13 and 2.7 times as Triton on B200 in bfloat16 "
    "(abstract of its paper, 2026), in its authors' package; fa4-jax publishes no speed"
)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [FA4, DEW_FLASH]


@hookimpl
def kernelry_rank(request: Request, candidates: Sequence[str]) -> Ranking | None:
    """Places fa4 first where it meets what it was compared with, on the one device of which numbers are published."""
    if FA4.name not in candidates or request.target.generation != _BLACKWELL or request.dtype != "bfloat16":
        return None
    compared = any(name in candidates for name in _SLOWER_ON_BLACKWELL)
    return Ranking((FA4.name,), _PUBLISHED) if compared else None
