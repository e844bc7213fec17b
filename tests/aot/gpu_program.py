"""Compiles `pallas_flash`, value and gradients, and `pallas_decode` with their default tilings, for one GPU and dtype.

Run by tests in a process of its own, because XLA_FLAGS are read once: `gpu_program.py gpu:h100 bfloat16 128/128 …`.
Prints the name of each program that does not compile, and why. Of a head dim alone it compiles both kernels; after
`flash:` or `decode:` that kernel.
"""

import sys

import jax
import jax.numpy as jnp

import kernelry
from kernelry import aot, masks

LENGTH, ROWS = 2048, 8


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


def main():
    target, dtype, *wanted = sys.argv[1:]
    for each in wanted:
        name, _, dims = each.partition(":")
        head_dim, _, value_dim = dims.partition("/")
        function, arguments = {"flash": flash, "decode": decode}[name](
            (int(head_dim), int(value_dim or head_dim)), dtype
        )

        def program(*arrays, function=function):
            return function(*arrays)

        program.__name__ = f"{name}_{head_dim}_{value_dim or head_dim}"
        found = aot.compile_for(target, program, *arguments)
        if not found.ok:
            sys.stdout.write(f"{program.__name__}: {found.reason}\n")


main()
