"""Key/value caches: immutable pytrees that attend over the same machinery as `kernelry.attention`."""

from kernelry.cache.base import KVCache
from kernelry.cache.prefix import SharedPrefix
from kernelry.storage import PagedArray, Quantization, QuantizedArray

__all__ = ["KVCache", "PagedArray", "Quantization", "QuantizedArray", "SharedPrefix"]
