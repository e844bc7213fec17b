"""What this plugin registers: `flywheel` and `flywheel_paged`, for TPUs."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_tpu_flywheel.dense.spec import FLYWHEEL
from kernelry_tpu_flywheel.paged.spec import FLYWHEEL_PAGED

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [FLYWHEEL, FLYWHEEL_PAGED]
