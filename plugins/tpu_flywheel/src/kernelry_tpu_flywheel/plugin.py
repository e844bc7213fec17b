"""What this plugin registers: `flywheel`, for TPUs."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_tpu_flywheel.dense.spec import FLYWHEEL

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [FLYWHEEL]
