"""kernelry: the attention-kernel registry for JAX.

    out = kernelry.attention(query, key, value, mask=kernelry.masks.Causal())

picks the best installed kernel that honours every argument, or says why none can.
"""

from typing import TYPE_CHECKING, Any

from kernelry import errors, masks, moba, parallel
from kernelry._version import __version__
from kernelry.api import attention
from kernelry.installation import kernels, plugins
from kernelry.model_shape import ModelShape
from kernelry.normalization import finalize, merge
from kernelry.partial import Partial
from kernelry.phases import resolve_phases
from kernelry.request import Mode, Request
from kernelry.resolution import Plan, Resolution
from kernelry.resolver import explain, resolve
from kernelry.scope import record, use
from kernelry.target import Target

if TYPE_CHECKING:
    from kernelry import cache

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
    """Imports `kernelry.cache` when it is first used: training never is."""
    if name != "cache":
        raise AttributeError(f"module 'kernelry' has no attribute {name!r}")
    import importlib

    return importlib.import_module("kernelry.cache")
