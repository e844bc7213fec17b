"""Everything this kernel takes from flywheel-tpu, in one place; written against 0.3.0, which needs Python 3.12.

`flash_attn_varlen_func` is public. The body of the decode kernel is not: the public `flash_attn_with_kvcache` declares
the pool an output of the kernel as well as an input, so that XLA copies a pool that is only read (268.6 MB of 268 MB,
compiled for v6e). `kernelry_tpu_flywheel.paged.decode` calls the same body with the pool as an input alone. What the
body needs to know of its staging buffers and of its range of exponents comes from two more private functions.
"""

from flywheel_tpu import flash_attn_varlen_func
from flywheel_tpu.pallas.copy_utils import bank_safe_word_stride
from flywheel_tpu.pallas.flash_fwd_kvcache import kvcache_kernel
from flywheel_tpu.pallas.fwd_pipeline import overflow_guard_threshold

from kernelry_tpu_flywheel.dense._vendor import answering_for

__all__ = [
    "answering_for",
    "bank_safe_word_stride",
    "flash_attn_varlen_func",
    "kvcache_kernel",
    "overflow_guard_threshold",
]
