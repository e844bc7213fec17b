"""What this plugin registers: `splash`, `tokamax_splash`, `ragged` and `paged`, for TPUs."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl
from kernelry_tpu_splash.paged.spec import PAGED
from kernelry_tpu_splash.ragged.spec import RAGGED
from kernelry_tpu_splash.splash.spec import SPLASH
from kernelry_tpu_splash.tokamax_splash.spec import TOKAMAX_SPLASH

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [SPLASH, TOKAMAX_SPLASH, RAGGED, PAGED]
