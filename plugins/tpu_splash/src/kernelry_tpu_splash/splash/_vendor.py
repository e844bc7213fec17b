"""Everything this plugin takes from JAX's splash attention, in one place.

Written against jax 0.10.0 … 0.12.0, in which these names have the same signatures. `splash_attention_bwd`
is private: the public kernel cannot be differentiated once it returns its logsumexp, and core needs
exactly that to apply sinks and to merge parts. `MaskInfo` and `SplashAttentionKernel` are made directly: the
vendor's own preparation evaluates every chunk of T × S, and knows two masks that a kernel can compute.
"""

from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    BlockSizes,
    QKVLayout,
    SegmentIds,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    _splash_attention_bwd as splash_attention_bwd,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

__all__ = [
    "BlockSizes",
    "MaskInfo",
    "QKVLayout",
    "SegmentIds",
    "SplashAttentionKernel",
    "splash_attention_bwd",
]
