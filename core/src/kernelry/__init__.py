"""kernelry: the attention-kernel registry for JAX.

    out = kernelry.attention(query, key, value, mask=kernelry.masks.Causal())

picks the best installed kernel that honours every argument, or says why none can.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from kernelry import _compat as _compat  # makes its part of the key of JAX's caches, before anything is traced
from kernelry._version import __version__

if TYPE_CHECKING:
    from kernelry import aot as aot
    from kernelry import cache as cache
    from kernelry import config as config
    from kernelry import errors as errors
    from kernelry import flax as flax
    from kernelry import masks as masks
    from kernelry import moba as moba
    from kernelry import models as models
    from kernelry import parallel as parallel
    from kernelry import plugin as plugin
    from kernelry import testing as testing
    from kernelry.api import attention
    from kernelry.execution.normalization import finalize, merge
    from kernelry.execution.plan import Plan
    from kernelry.kernel.partial import Partial
    from kernelry.phases.model_shape import ModelShape
    from kernelry.phases.resolving import resolve_phases
    from kernelry.policy.scope import record, use
    from kernelry.registry.installed import kernels, plugins
    from kernelry.request.request import Mode, Request
    from kernelry.request.target import Target
    from kernelry.resolution.explanation import Resolution
    from kernelry.resolution.resolver import explain, resolve

_MODULES = ("aot", "cache", "config", "errors", "flax", "masks", "moba", "models", "parallel", "plugin", "testing")
"""Modules that are imported when they are first used."""

_NAMES = {
    "api": ("attention",),
    "execution.normalization": ("finalize", "merge"),
    "execution.plan": ("Plan",),
    "kernel.partial": ("Partial",),
    "phases.model_shape": ("ModelShape",),
    "phases.resolving": ("resolve_phases",),
    "policy.scope": ("record", "use"),
    "registry.installed": ("kernels", "plugins"),
    "request.request": ("Mode", "Request"),
    "request.target": ("Target",),
    "resolution.explanation": ("Resolution",),
    "resolution.resolver": ("explain", "resolve"),
}
"""The names of modules that are imported when one of these is first used."""

_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Mode",
    "ModelShape",
    "Partial",
    "Plan",
    "Request",
    "Resolution",
    "Target",
    "__version__",
    "attention",
    "cache",
    "errors",
    "explain",
    "finalize",
    "kernels",
    "masks",
    "merge",
    "moba",
    "parallel",
    "plugins",
    "record",
    "resolve",
    "resolve_phases",
    "use",
]


if not TYPE_CHECKING:  # or every name would be right

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"kernelry.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'kernelry' has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(f"kernelry.{_HOME[name]}"), name)
        return found


def __dir__() -> list[str]:
    missing = set() if _has_flax() else {"flax"}  # what is listed can be had: inspect.getmembers asks for all of it
    return sorted({*__all__, *_MODULES} - missing)


def _has_flax() -> bool:
    if "flax" in sys.modules:
        return sys.modules["flax"] is not None
    return importlib.util.find_spec("flax") is not None
