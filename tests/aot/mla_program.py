"""Compiles a step of absorbed MLA decode through ragged, with its default block: one head of 576, values of 512.

Run as `python tests/aot/mla_program.py tpu:v6e array 128`, of 128 query heads; or int8, or the slots of a page. Writes
the slots of a block.
"""

import sys

import jax
import jax.numpy as jnp

import kernelry
from kernelry import aot, masks
from kernelry.plugin import PagedArray, QuantizedArray, ValueInKey

ROWS, SLOTS, HEAD_DIM, VALUE_DIM = 8, 8192, 576, 512


def main(target, held, heads):
    page = int(held) if held.isdigit() else None

    def step(query, key, lengths, table):
        keys = PagedArray(key, table) if page else key
        options = {"mask": masks.Lengths(lengths), "mode": "decode", "kernel": "ragged"}
        return kernelry.attention(query, keys, ValueInKey(VALUE_DIM), **options)

    shape = jax.ShapeDtypeStruct
    slots = (ROWS * SLOTS // page, page) if page else (ROWS, SLOTS)
    key = shape((*slots, 1, HEAD_DIM), "int8" if held == "int8" else "bfloat16")
    if held == "int8":
        key = QuantizedArray(key, shape((*slots, 1, 1), "bfloat16"))
    query = shape((ROWS, 1, int(heads), HEAD_DIM), "bfloat16")
    lengths, table = shape((ROWS,), jnp.int32), shape((ROWS, SLOTS // (page or SLOTS)), jnp.int32)
    with kernelry.record() as resolutions:
        found = aot.compile_for(target, step, query, key, lengths, table)
    if not found.ok:
        raise SystemExit(str(found.reason))
    sys.stdout.write(str(resolutions[0].plan.tiling["block_kv"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
