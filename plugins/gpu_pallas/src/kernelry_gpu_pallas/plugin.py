"""What this plugin registers: our own kernels, JAX's Pallas Triton attention, and tokamax's, for NVIDIA GPUs."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_gpu_pallas.pallas_decode.spec import PALLAS_DECODE
from kernelry_gpu_pallas.pallas_flash.spec import PALLAS_FLASH
from kernelry_gpu_pallas.pallas_mha.spec import PALLAS_MHA
from kernelry_gpu_pallas.tokamax_mosaic.spec import TOKAMAX_MOSAIC

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [PALLAS_DECODE, PALLAS_FLASH, PALLAS_MHA, TOKAMAX_MOSAIC]
