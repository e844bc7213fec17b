"""The plugins of this process, found when they are first needed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelry.catalogue import InstalledKernel, Plugin, Registry
    from kernelry.kernel import KernelSpec


@functools.lru_cache(maxsize=1)
def installed() -> Registry:
    """Returns what the installed plugins bring; the entry points are scanned once."""
    # Imported here because `import kernelry` needs neither pluggy nor importlib-metadata, nor these rooms.
    from kernelry import registry

    return registry.find()


def not_installed(spec: KernelSpec, source: str) -> InstalledKernel:
    """Lets a kernel that no plugin registers stand among the others; `source` says who gave it."""
    from kernelry.catalogue import InstalledKernel

    return InstalledKernel(spec, source, f"given to {source}")


def kernels() -> tuple[InstalledKernel, ...]:
    """Returns the installed kernels, sorted by name. Imports no vendor library."""
    return tuple(installed().kernels.values())


def plugins() -> tuple[Plugin, ...]:
    """Returns the plugins that were found, sorted by name. Imports no vendor library."""
    return installed().plugins
