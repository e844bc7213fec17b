"""What preparing a causal mask for splash costs on the host: ours, from its block map, and the vendor's own.

Run: JAX_PLATFORMS=cpu .venv/bin/python benchmarks/mask_preparation.py
"""

import statistics
import time
import tracemalloc

from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from kernelry import masks
from kernelry.plugin import Inputs, Request
from kernelry_tpu_splash.plugin import SPLASH
from kernelry_tpu_splash.splash import kernel as splash

REPEATS = 7
LENGTHS = (8192, 32768, 131072)
VENDORS_LENGTHS = (8192, 32768)
"""Its time grows with T²; the third would take minutes."""


def ours(length, offset):
    mask = masks.Causal().at(query_offset=offset)
    request = Request(target="tpu:v5e", q_len=length, head_dim=128, mask=mask)
    inputs = Inputs(None, None, None, mask.canonical())
    return splash._kernel_for(inputs, request, SPLASH.tilings(request)[0], False)


def vendors(length, offset):
    several = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length), offset)])
    names = (name for name, _ in SPLASH.tilings(Request(q_len=length))[0].values if name.startswith("block"))
    blocks = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, 512))
    return splash_attention_kernel.make_splash_mha(several, block_sizes=blocks, head_shards=1, q_seq_shards=1)


def measured(prepare, length):
    times = []
    for offset in range(REPEATS):  # both keep what they prepared: each time another mask
        start = time.perf_counter()
        prepare(length, offset)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    prepare(length, REPEATS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"{statistics.median(times):8.4f} s ({min(times):.4f} – {max(times):.4f}), peak {peak / 1e6:.1f} MB"


if __name__ == "__main__":
    for length in LENGTHS:
        print(f"T={length}\n  ours      {measured(ours, length)}")
        if length in VENDORS_LENGTHS:
            print(f"  vendor's  {measured(vendors, length)}")
