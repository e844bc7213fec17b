"""Key/value caches: immutable pytrees that attend over the same machinery as `kernelry.attention`.

The names below are public, its modules are internal. Imports `config` and what is below.
"""

from kernelry.cache.base import KVCache
from kernelry.cache.paged import PagedCache
from kernelry.cache.paged_view import PagedView
from kernelry.cache.prefix import SharedPrefix
from kernelry.cache.rolling import RollingCache
from kernelry.cache.two_part import TwoPartCache
from kernelry.storage import PagedArray, Quantization, QuantizedArray, ValueInKey

__all__ = [
    "KVCache",
    "PagedArray",
    "PagedCache",
    "PagedView",
    "Quantization",
    "QuantizedArray",
    "RollingCache",
    "SharedPrefix",
    "TwoPartCache",
    "ValueInKey",
]
