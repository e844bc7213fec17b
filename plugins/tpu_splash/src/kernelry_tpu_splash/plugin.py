"""What this plugin registers: `splash` and `ragged`, for TPUs."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_tpu_splash.ragged.spec import RAGGED
from kernelry_tpu_splash.splash.spec import SPLASH

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [SPLASH, RAGGED]
