"""What this plugin registers: cuDNN's fused attention."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_cudnn_te.cudnn_jax.spec import CUDNN_JAX

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [CUDNN_JAX]
