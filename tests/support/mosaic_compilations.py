"""tokamax_mosaic through Mosaic GPU's compiler and NVIDIA's assembler: `python mosaic_compilations.py TARGET CASE ...`.

A process for each target: the compiler keeps the compute capability that it was first asked for. Prints a line of JSON.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

import kernelry
from kernelry import aot, masks
from kernelry.errors import KernelRefusedError
from kernelry.plugin import Request
from kernelry_gpu_pallas.plugin import TOKAMAX_MOSAIC

LENGTH, HEADS, KV_HEADS = 1024, 4, 2
DENSE = masks.Dense(np.ones((1, HEADS, LENGTH, LENGTH), bool))
BIAS = ((1, HEADS, LENGTH, LENGTH), "float32")

CASES = {
    "full": {},
    "causal": {"mask": masks.Causal()},
    "window": {"mask": masks.SlidingWindow(300)},
    "later_chunk": {"mask": masks.Chunked(256).at(query_offset=512)},
    "prefix": {"mask": masks.PrefixLM(100)},
    "packed": {"mask": masks.Causal() & masks.Segments(np.repeat([0, 1], LENGTH // 2))},
    "dense_by_head": {"mask": DENSE},
    "bias": {"bias": BIAS, "mask": masks.Causal()},
    "short_bias": {"bias": (BIAS[0], "bfloat16"), "mask": DENSE},
    "sinks": {"sinks": ((HEADS,), "float32"), "mask": masks.Causal()},
    "float16": {"dtype": "float16", "mask": masks.Causal()},
    "head_dim_16": {"head_dim": 16},
    "head_dim_64": {"head_dim": 64, "mask": masks.Causal()},
    "head_dim_80": {"head_dim": 80, "mask": masks.Causal()},
    "head_dim_192_128": {"head_dim": 192, "value_dim": 128, "mask": masks.Causal()},
    "head_dim_256": {"head_dim": 256, "mask": masks.Causal(), "mode": "prefill"},
    "head_dim_256_with_gradients": {"head_dim": 256, "mask": masks.Causal()},
    "tilings": {"mask": masks.Causal()},
}


def compiled(target, *, head_dim=128, value_dim=None, dtype="bfloat16", bias=None, sinks=None, mode="train", **options):
    """Compiles the value, in train mode with all gradients; returns why it could not be, or None."""
    dims = {"query": (HEADS, head_dim), "key": (KV_HEADS, head_dim), "value": (KV_HEADS, value_dim or head_dim)}
    shapes = {name: jax.ShapeDtypeStruct((1, LENGTH, *dim), jnp.dtype(dtype)) for name, dim in dims.items()}
    more = {name: jax.ShapeDtypeStruct(*given) for name, given in (("bias", bias), ("sinks", sinks)) if given}
    names = (*shapes, *more)

    def loss(*arrays):
        named = dict(zip(names, arrays, strict=True))
        return kernelry.attention(**named, kernel=TOKAMAX_MOSAIC.name, mode=mode, **options).astype(jnp.float32).sum()

    function = jax.value_and_grad(loss, tuple(range(len(names)))) if mode == "train" else loss
    with kernelry.record() as resolutions:
        try:
            found = aot.compile_for(target, function, *shapes.values(), *more.values())
        except KernelRefusedError as error:
            return str(error)
    if not found.ok:
        return str(found.reason)
    for resolution in resolutions:
        resolution.verify(found.compiled)
    kernels = found.compiled.as_text().count('custom_call_target="mosaic_gpu_v2"')
    return None if kernels == (3 if mode == "train" else 1) else f"{kernels} kernels in the program"


def problem(target, case):
    """Why a case does not compile, or None."""
    if case != "tilings":
        return compiled(target, **CASES[case])
    request = Request(target=target, q_len=LENGTH, q_heads=HEADS, kv_heads=KV_HEADS, head_dim=128, dtype="bfloat16")
    tilings = TOKAMAX_MOSAIC.tilings(request)
    assert len(tilings) > 2
    for tiling in tilings:
        with kernelry.use(tiling=dict(tiling.values)):
            reason = compiled(target, **CASES[case])
        if reason is not None:
            return f"{tiling}: {reason}"
    return None


if __name__ == "__main__":
    where, *wanted = sys.argv[1:]
    sys.stdout.write(json.dumps({case: problem(where, case) for case in wanted}) + "\n")
