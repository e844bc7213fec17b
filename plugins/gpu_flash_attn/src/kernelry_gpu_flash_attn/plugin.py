"""What this plugin registers: `fa4` and `dew_flash`, for NVIDIA GPUs."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_gpu_flash_attn.dew_flash.spec import DEW_FLASH
from kernelry_gpu_flash_attn.fa4.spec import FA4

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [FA4, DEW_FLASH]
