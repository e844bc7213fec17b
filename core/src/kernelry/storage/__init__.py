"""How keys and values are held: plain arrays, quantised ones, and pages behind a table."""

from kernelry.storage.paged import PagedArray
from kernelry.storage.quantized import QUANTIZATIONS, Quantization, QuantizedArray

__all__ = ["QUANTIZATIONS", "PagedArray", "Quantization", "QuantizedArray"]
