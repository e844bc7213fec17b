"""Everything this plugin takes from tokamax, in one place.

Written against tokamax 0.0.12 … 0.0.17. All of it is private: tokamax's public attention ignores positions of queries
and has no statistics. `MaskInfo` and `SplashAttentionKernel` are made directly, for the vendor's own preparation
evaluates every chunk of T × S; `_splash_attention_bwd` takes the output and the logsumexp of the whole attention.
"""

import inspect

from tokamax._src.ops.experimental.tpu.splash_attention.base import SegmentIds
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel import (
    QKVLayout,
    SplashAttentionKernel,
    SplashConfig,
    _splash_attention,
)
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel import (
    _splash_attention_bwd as splash_attention_bwd,
)
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask_info import MaskInfo

# In 0.0.17 a key for dropout stands last among what the backward pass is given; 0.0.12 has none.
MORE_RESIDUALS = (None,) if "prng_key" in inspect.signature(_splash_attention).parameters else ()

__all__ = [
    "MORE_RESIDUALS",
    "MaskInfo",
    "QKVLayout",
    "SegmentIds",
    "SplashAttentionKernel",
    "SplashConfig",
    "splash_attention_bwd",
]
