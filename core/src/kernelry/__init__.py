"""kernelry: the attention-kernel registry for JAX.

    out = kernelry.attention(query, key, value, mask=kernelry.masks.Causal())

picks the best installed kernel that honours every argument, or says why none can.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from kernelry import errors, masks
from kernelry._version import __version__
from kernelry.api import attention
from kernelry.execution.normalization import finalize, merge
from kernelry.execution.plan import Plan
from kernelry.kernel.partial import Partial
from kernelry.policy.scope import record, use
from kernelry.registry.installed import kernels, plugins
from kernelry.request.request import Mode, Request
from kernelry.request.target import Target
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.resolver import explain, resolve

if TYPE_CHECKING:
    from kernelry import aot as aot
    from kernelry import cache as cache
    from kernelry import config as config
    from kernelry import flax as flax
    from kernelry import moba as moba
    from kernelry import models as models
    from kernelry import parallel as parallel
    from kernelry import plugin as plugin
    from kernelry import testing as testing
    from kernelry.phases.model_shape import ModelShape
    from kernelry.phases.resolving import resolve_phases

_LAZY = ("aot", "cache", "config", "flax", "moba", "models", "parallel", "plugin", "testing")
"""Modules that are imported when they are first used: training needs none of them."""

_LAZY_NAMES = {"ModelShape": "kernelry.phases.model_shape", "resolve_phases": "kernelry.phases.resolving"}
"""Names whose modules are imported when they are first used."""

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


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    if name not in _LAZY:
        raise AttributeError(f"module 'kernelry' has no attribute {name!r}")
    return importlib.import_module(f"kernelry.{name}")


def __dir__() -> list[str]:
    missing = set() if _has_flax() else {"flax"}  # what is listed can be had: inspect.getmembers asks for all of it
    return sorted({*__all__, *_LAZY} - missing)


def _has_flax() -> bool:
    if "flax" in sys.modules:
        return sys.modules["flax"] is not None
    return importlib.util.find_spec("flax") is not None
