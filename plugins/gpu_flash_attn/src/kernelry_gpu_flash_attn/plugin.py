"""What this plugin registers."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_gpu_flash_attn.dew_flash.spec import DEW_FLASH

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [DEW_FLASH]
