"""The plugins of this process, found when they are first needed, and where kernels that are missing come from."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kernelry.request.checks import DTYPES

if TYPE_CHECKING:
    from kernelry.kernel.spec import KernelSpec
    from kernelry.registry.contents import InstalledKernel, Plugin, Registry
    from kernelry.request.request import Request

PLAIN = "kernelry-dot-product"
"""The distribution whose kernels serve every mask and option on every platform."""

KERNELS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        PLAIN: ("dot_product", "blockwise"),
        "kernelry-gpu-pallas": ("pallas_decode", "pallas_flash", "pallas_mha", "tokamax_mosaic"),
        "kernelry-cudnn-te": ("cudnn_jax", "cudnn_te"),
        "kernelry-tpu-splash": ("splash", "tokamax_splash", "ragged", "paged"),
    }
)
"""The kernels of this project's distributions."""

_MADE_FOR = {
    "gpu": ("kernelry-gpu-pallas", "kernelry-cudnn-te"),
    "tpu": ("kernelry-tpu-splash",),
}
_PLAIN_NORMALIZATIONS = ("softmax", "softmax_max_sum")


@functools.lru_cache(maxsize=1)
def registry() -> Registry:
    """Returns what the installed plugins provide; the entry points are scanned once."""
    # Imported here because `import kernelry` needs neither pluggy nor importlib-metadata, nor these modules.
    from kernelry.registry import discovery

    return discovery.find()


def not_installed(spec: KernelSpec, source: str) -> InstalledKernel:
    """Returns a kernel that no plugin registers as if it were installed; `source` says where it was given."""
    from kernelry.registry.contents import InstalledKernel

    return InstalledKernel(spec, source, f"given to {source}")


def kernels() -> tuple[InstalledKernel, ...]:
    """Returns the installed kernels, sorted by name. Imports no vendor library."""
    return tuple(registry().kernels.values())


def plugins() -> tuple[Plugin, ...]:
    """Returns the plugins that were found, sorted by name. Imports no vendor library."""
    return registry().plugins


def native_kernels() -> str:
    """Says what to pass to get a kernel that JAX differentiates in every way."""
    from kernelry.kernel.capabilities import Gradient

    found = registry().kernels
    names = sorted(name for name, kernel in found.items() if kernel.spec.capabilities.gradient is Gradient.NATIVE)
    return " or ".join(f'kernel="{name}"' for name in names) or "a kernel that declares gradient=NATIVE"


def how_to_get(kernel: str) -> str | None:
    """Returns what to do to have a kernel of this project that is missing; None for a kernel of others."""
    distribution = next((name for name, kernels in KERNELS_OF.items() if kernel in kernels), None)
    return None if distribution is None else _how_to_get(distribution)


def why_none() -> str:
    """Says why there are no kernels to choose from."""
    found = registry()
    if found.kernels:
        return "there is none to choose from: kernels= leaves out those that are installed"
    if not found.plugins:
        return "no kernels are installed"
    left_out = [plugin.name for plugin in found.plugins if not plugin.enabled]
    faulty = "the plugins that are loaded provide none that can be used: run kernelry doctor"
    excluded = f"KERNELRY_PLUGINS leaves out {', '.join(left_out)}"
    return "; ".join([excluded] * bool(left_out) + [faulty] * (len(left_out) < len(found.plugins)))


def has_plain_kernel(names: Collection[str]) -> bool:
    """Says whether one of the kernels serves every mask and option on every platform."""
    return not set(KERNELS_OF[PLAIN]).isdisjoint(names)


def without_plain_kernel(platform: str, names: Collection[str]) -> str | None:
    """Returns what to do where none of the kernels `names` is a plain one; None where one is.

    Args:
      platform: whose other distributions are named, where they are not installed.
      names: of the kernels to choose among.
    """
    if has_plain_kernel(names):
        return None
    advice = f"No plain kernel is available, which would serve every mask and option: {_how_to_get(PLAIN)}"
    absent = [distribution for distribution in _MADE_FOR.get(platform, ()) if not _plugins_of(distribution)]
    if absent:
        advice += f". Kernels made for {platform}: pip install {' '.join(absent)}"
    return f"{advice}."


def advice_on(request: Request, names: Collection[str]) -> str | None:
    """Returns what to do where no kernel serves a request that a plain kernel would; None where it would not."""
    served = request.dtype in DTYPES and request.normalization in _PLAIN_NORMALIZATIONS
    if not served or request.context_parallel is not None or request.sharding is not None:
        return None
    return without_plain_kernel(request.target.platform, names)


def _how_to_get(distribution: str) -> str:
    plugins = _plugins_of(distribution)
    if not plugins:
        return f"pip install {distribution}"
    if not any(plugin.enabled for plugin in plugins):
        return f"add {plugins[0].name} to KERNELRY_PLUGINS, or unset it"
    if not set(KERNELS_OF[distribution]).isdisjoint(registry().kernels):
        return f"{distribution} is installed, but kernels= leaves it out"
    return f"{distribution} is installed and faulty; run kernelry doctor"


def _plugins_of(distribution: str) -> list[Plugin]:
    return [plugin for plugin in registry().plugins if plugin.distribution.split(" ")[0] == distribution]
