"""Compiles a step of decode through ragged: 32 heads on 8 of 128, blocks of 512 slots, rows of any length.

Run as `python tests/aot/decode_program.py tpu:v5e bfloat16`; or int8, or pages (of 128 slots).
"""

import sys

import jax
import jax.numpy as jnp

import kernelry
from kernelry import aot, masks
from kernelry.plugin import PagedArray, QuantizedArray

ROWS, SLOTS, HEADS, KV_HEADS, WIDTH, BLOCK, PAGE = 8, 8192, 32, 8, 128, 512, 128


def main(target, held):
    def step(query, key, lengths, table):
        keys = PagedArray(key, table) if held == "pages" else key
        return kernelry.attention(query, keys, keys, mask=masks.Lengths(lengths), mode="decode", kernel="ragged")

    shape = jax.ShapeDtypeStruct
    key = shape((ROWS, SLOTS, KV_HEADS, WIDTH), "int8" if held == "int8" else "bfloat16")
    if held == "int8":
        key = QuantizedArray(key, shape((ROWS, SLOTS, KV_HEADS, 1), "bfloat16"))
    elif held == "pages":
        key = shape((ROWS * SLOTS // PAGE, PAGE, KV_HEADS, WIDTH), "bfloat16")
    query = shape((ROWS, 1, HEADS, WIDTH), "bfloat16")
    lengths, table = shape((ROWS,), jnp.int32), shape((ROWS, SLOTS // PAGE), jnp.int32)
    with kernelry.use(tiling={"block_kv": BLOCK}):
        found = aot.compile_for(target, step, query, key, lengths, table)
    if not found.ok:
        raise SystemExit(str(found.reason))


if __name__ == "__main__":
    main(*sys.argv[1:])
