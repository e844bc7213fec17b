"""How keys and values are stored: plain arrays, quantised ones, and pages with a table; apart or together.

Internal; `kernelry.cache` and `kernelry.plugin` export what others may use. Imports `_pytree`, `errors` and JAX.
"""

from kernelry.storage.layout import (
    INTERLEAVED,
    KV_LAYOUTS,
    SEPARATE,
    VALUE_IN_KEY,
    ValueInKey,
    kv_layout_of,
    value_dim_of,
)
from kernelry.storage.paged import PagedArray
from kernelry.storage.quantized import QUANTIZATIONS, Quantization, QuantizedArray

__all__ = [
    "INTERLEAVED",
    "KV_LAYOUTS",
    "QUANTIZATIONS",
    "SEPARATE",
    "VALUE_IN_KEY",
    "PagedArray",
    "Quantization",
    "QuantizedArray",
    "ValueInKey",
    "kv_layout_of",
    "value_dim_of",
]
