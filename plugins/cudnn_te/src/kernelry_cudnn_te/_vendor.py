"""Everything this plugin takes from JAX's cuDNN attention, in one place.

Written against jax 0.10.0 … 0.12.0. The version check is private: JAX offers no public way to ask
for cuDNN before an attention call fails for want of it.
"""

from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.nn import dot_product_attention

__all__ = ["dot_product_attention", "why_not_here"]

_fused_attention: Any = fused_attention_stablehlo


def why_not_here() -> str | None:
    """Returns what this process lacks to run cuDNN attention; None when it lacks nothing."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        return "JAX sees no CUDA device"
    try:
        _fused_attention.check_cudnn_version()
    except RuntimeError:
        return "JAX finds no cuDNN"
    return None
