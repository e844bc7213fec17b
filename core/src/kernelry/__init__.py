"""kernelry: the attention-kernel registry for JAX.

    out = kernelry.attention(query, key, value, mask=kernelry.masks.Causal())

picks the best installed kernel that honours every argument, or says why none can.
"""

from kernelry import errors, masks, moba
from kernelry._version import __version__
from kernelry.api import attention
from kernelry.installation import kernels, plugins
from kernelry.normalization import finalize, merge
from kernelry.partial import Partial
from kernelry.phases import ModelShape, resolve_phases
from kernelry.request import Mode, Request
from kernelry.resolution import Plan, Resolution
from kernelry.resolver import explain, resolve
from kernelry.scope import record, use
from kernelry.target import Target

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
    "errors",
    "explain",
    "finalize",
    "kernels",
    "masks",
    "merge",
    "moba",
    "plugins",
    "record",
    "resolve",
    "resolve_phases",
    "use",
]
