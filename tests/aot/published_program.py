"""Compiles tokamax's attention for TPUs as its authors timed it, and writes the compiled program.

Run as `python tests/aot/published_program.py tpu:v5p '{"q": [4, 4096, 16, 128], …}'`, an entry of
published_timings.json, perhaps with another tiling.
"""

import json
import sys

import jax
import jax.numpy as jnp
from tokamax._src.ops.attention.base import Mask
from tokamax._src.ops.attention.pallas_mosaic_tpu import Config, PallasMosaicTpuFlashAttention
from tokamax._src.ops.attention.pallas_mosaic_tpu_vjp import Config as BackwardConfig
from tokamax._src.ops.attention.pallas_mosaic_tpu_vjp import PallasMosaicTpuFlashAttentionVjp

from kernelry import aot


class Forward(PallasMosaicTpuFlashAttention):
    """Whatever devices this machine has."""

    def supported_on(self, device):
        return True


class Backward(PallasMosaicTpuFlashAttentionVjp):
    """Whatever devices this machine has."""

    def supported_on(self, device):
        return True


def main(target, described):
    entry = json.loads(described)
    arrays = {name: jax.ShapeDtypeStruct(entry[name], jnp.bfloat16) for name in "qkv"}
    mask = Mask(is_causal=entry["mask"] == "causal")

    def forward(q, k, v):
        operation = Forward(config=Config(**entry["tiling"]))
        return operation(q, k, v, mask=mask, return_residuals=entry["residuals"])

    def backward(residuals, out, dout, q, k, v):
        operation = Backward(config=BackwardConfig(**entry["tiling"]))
        options = {"logits_dtype": jnp.dtype("float32"), "logits_scale": q.shape[-1] ** -0.5, "dropout_rate": 0.0}
        missing = ("bias", "logits_soft_cap", "dropout_mask", "paging_info", "q_indices", "k_indices")
        options |= dict.fromkeys(missing) | {"normalize_output": True, "return_residuals": False}
        precision = (jax.lax.DotAlgorithmPreset.BF16_BF16_F32,) * 2
        return operation(residuals, out, dout, q, k, v, precision=precision, mask=mask, **options)

    if entry["pass"] == "forward":
        found = aot.compile_for(target, forward, *arrays.values())
    else:
        batch, length, heads, _ = entry["q"]
        statistic = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
        out = jax.ShapeDtypeStruct((*entry["q"][:3], entry["v"][3]), jnp.bfloat16)
        found = aot.compile_for(target, backward, (statistic, statistic), out, out, *arrays.values())
    if found.compiled is None:
        raise SystemExit(str(found.reason))
    sys.stdout.write(found.compiled.as_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
