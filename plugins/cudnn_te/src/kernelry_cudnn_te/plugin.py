"""What this plugin registers: cuDNN's fused attention, as JAX calls it and as transformer-engine does."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_cudnn_te.cudnn_jax.spec import CUDNN_JAX
from kernelry_cudnn_te.cudnn_te.spec import CUDNN_TE

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [CUDNN_JAX, CUDNN_TE]
