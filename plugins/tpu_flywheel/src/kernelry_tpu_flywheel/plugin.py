"""What this plugin registers."""

from __future__ import annotations

from kernelry.plugin import KernelSpec, hookimpl

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return []
