"""Compiles `pallas_flash`, value and gradients, and `pallas_decode` with their default tilings, for one GPU and dtype.

Run by tests in a process of its own, because XLA_FLAGS are read once: `gpu_program.py gpu:h100 bfloat16 128/128 …`.
Prints the name of each program that does not compile, and why. `flash:` and `decode:` are followed by head dims,
`mla:` and `mla_pages:`, with values in the keys, also by the number of query heads.
"""

import functools
import sys

import jax
import jax.numpy as jnp

import kernelry
from kernelry import aot, masks
from kernelry.plugin import PagedArray, QuantizedArray, ValueInKey

LENGTH, ROWS, PAGE = 2048, 8, 64


def flash(dims, dtype):
    def loss(query, key, value):
        out = kernelry.attention(query, key, value, mask=masks.Causal(), kernel="pallas_flash")
        return out.astype(jnp.float32).sum()

    sizes = ((4, dims[0]), (2, dims[0]), (2, dims[1]))
    arguments = [jax.ShapeDtypeStruct((1, LENGTH, *size), dtype) for size in sizes]
    return jax.value_and_grad(loss, argnums=(0, 1, 2)), arguments


def decode(dims, dtype):
    def step(query, key, value, lengths):
        mask = masks.Lengths(lengths)
        return kernelry.attention(query, key, value, mask=mask, mode="decode", kernel="pallas_decode")

    sizes = ((1, 32, dims[0]), (LENGTH, 8, dims[0]), (LENGTH, 8, dims[1]))
    arguments = [jax.ShapeDtypeStruct((ROWS, *size), dtype) for size in sizes]
    return step, [*arguments, jax.ShapeDtypeStruct((ROWS,), jnp.int32)]


def mla(dims, dtype, *, in_pages=False):
    """Absorbed multi-head latent attention: dims are H, D and N; int8 of queries of bfloat16."""

    def step(query, key, lengths, *table):
        held = PagedArray(key, *table) if in_pages else key
        options = {"mode": "decode", "kernel": "pallas_decode"}
        return kernelry.attention(query, held, ValueInKey(dims[1]), mask=masks.Lengths(lengths), **options)

    shape = (ROWS * LENGTH // PAGE, PAGE, 1, dims[0]) if in_pages else (ROWS, LENGTH, 1, dims[0])
    key = jax.ShapeDtypeStruct(shape, dtype)
    if dtype == "int8":
        key = QuantizedArray(key, jax.ShapeDtypeStruct((*shape[:3], 1), jnp.bfloat16))
    query = jax.ShapeDtypeStruct((ROWS, 1, dims[2], dims[0]), "bfloat16" if dtype == "int8" else dtype)
    table = [jax.ShapeDtypeStruct((ROWS, LENGTH // PAGE), jnp.int32)] if in_pages else []
    return step, [query, key, jax.ShapeDtypeStruct((ROWS,), jnp.int32), *table]


PROGRAMS = {"flash": flash, "decode": decode, "mla": mla, "mla_pages": functools.partial(mla, in_pages=True)}


def main():
    target, dtype, *wanted = sys.argv[1:]
    for each in wanted:
        name, _, text = each.partition(":")
        dims = [int(dim) for dim in text.split("/")]
        dims = dims * 2 if len(dims) == 1 else dims
        function, arguments = PROGRAMS[name](dims, dtype)

        def program(*arrays, function=function):
            return function(*arrays)

        program.__name__ = "_".join(map(str, (name, *dims)))
        found = aot.compile_for(target, program, *arguments)
        if not found.ok:
            sys.stdout.write(f"{program.__name__}: {found.reason}\n")


main()
