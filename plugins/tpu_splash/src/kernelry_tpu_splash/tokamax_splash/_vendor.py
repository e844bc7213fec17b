"""Everything this plugin takes from tokamax, in one place.

Written against tokamax 0.0.12 … 0.0.17. All of it is private: tokamax's public attention ignores positions of queries
and has no statistics. `MaskInfo` and `SplashAttentionKernel` are made directly, for the vendor's own preparation
evaluates every chunk of T × S; `_splash_attention_bwd` takes the output and the logsumexp of the whole attention.
`attend` is what a SplashAttentionKernel calls, and gives the names for `jax.checkpoint` policies itself: the vendor's
`residual_checkpoint_name` stands before a `stop_gradient`, which JAX computes again, and the kernel with it.
"""

import inspect
from typing import Any

import jax
from tokamax._src.ops.experimental.tpu.splash_attention.base import SegmentIds
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel import (
    QKVLayout,
    SplashAttentionKernel,
    SplashConfig,
    _splash_attention,
    _splash_attention_custom,
)
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel import (
    _splash_attention_bwd as splash_attention_bwd,
)
from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from kernelry.plugin import named

# In 0.0.17 a key for dropout stands last among what the backward pass is given; 0.0.12 has none.
MORE_RESIDUALS = (None,) if "prng_key" in inspect.signature(_splash_attention).parameters else ()

_OUT, _LSE = 5, 6
"""Where the output and the logsumexp are among what the backward pass is given."""


def attend(kernel: SplashAttentionKernel, *arrays: Any) -> Any:
    """Returns the output, and where the kernel saves residuals its statistics, with the vendor's derivative."""
    return _attention(kernel.fwd_mask_info, kernel.dkv_mask_info, *arrays, **kernel.kwargs)


def _with_names(vendor: Any) -> Any:
    def forward(*arguments: Any) -> tuple[Any, Any]:
        result, kept = vendor.fwd(*arguments)
        out, lse = named((kept[_OUT], kept[_LSE]))
        kept = (*kept[:_OUT], out, lse, *kept[_LSE + 1 :])
        return (out, result[1]) if isinstance(result, tuple) else out, kept

    function: Any = jax.custom_vjp(vendor.fun, nondiff_argnums=vendor.nondiff_argnums)
    function.defvjp(forward, vendor.bwd)
    # Jitted as the vendor's is: JAX eliminates a jitted function whose results are not used, and no `pallas_call`.
    return jax.jit(function, static_argnums=vendor.nondiff_argnums)


_attention = _with_names(_splash_attention_custom)

__all__ = [
    "MORE_RESIDUALS",
    "MaskInfo",
    "QKVLayout",
    "SegmentIds",
    "SplashAttentionKernel",
    "SplashConfig",
    "attend",
    "splash_attention_bwd",
]
