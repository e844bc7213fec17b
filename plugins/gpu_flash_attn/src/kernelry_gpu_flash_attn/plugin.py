"""What this plugin registers."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_gpu_flash_attn.fa4.spec import FA4

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [FA4]
