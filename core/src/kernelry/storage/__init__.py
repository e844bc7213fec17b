"""How keys and values are stored: plain arrays, quantised ones, and pages with a table.

Internal; `kernelry.cache` and `kernelry.plugin` export what others may use. Imports `_pytree`, `errors` and JAX.
"""

from kernelry.storage.paged import PagedArray
from kernelry.storage.quantized import QUANTIZATIONS, Quantization, QuantizedArray

__all__ = ["QUANTIZATIONS", "PagedArray", "Quantization", "QuantizedArray"]
