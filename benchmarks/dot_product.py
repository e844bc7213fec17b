"""dot_product against jax.nn on CPU, forward and backward: is it not slower? Run: make benchmark.

Forward+backward is `jax.value_and_grad` of Σ out · weights with respect to query, key and value. The two take turns,
and a ratio is one of neighbours in time, so that other work on the machine meets both alike.
"""

import statistics
import time

import jax
import jax.numpy as jnp

import kernelry
from kernelry import masks

REPEATS = 25
WARM_UP = 3
GOAL = 1.05
"""The largest median ratio of times that counts as not slower."""


def jax_nn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def dot_product(q, k, v):
    return kernelry.attention(q, k, v, mask=masks.Causal(), kernel="dot_product")


def forward(call):
    return jax.jit(lambda q, k, v, _: call(q, k, v))


def forward_and_backward(call):
    return jax.jit(jax.value_and_grad(lambda q, k, v, weights: (call(q, k, v) * weights).sum(), argnums=(0, 1, 2)))


def milliseconds(function, arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return (time.perf_counter() - start) * 1e3


def take_turns(ours, theirs, arguments):
    """Times [repeats] of ours and of theirs; who goes first changes every time."""
    times = {ours: [], theirs: []}
    for repeat in range(WARM_UP + REPEATS):
        for function in (ours, theirs) if repeat % 2 else (theirs, ours):
            elapsed = milliseconds(function, arguments)
            if repeat >= WARM_UP:
                times[function].append(elapsed)
    return times[ours], times[theirs]


def cell(values, digits):
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:7.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def main():
    print(f"jax {jax.__version__}, {jax.default_backend()}, B1 H64 causal float32; median (quartiles) of {REPEATS}")
    for length, heads, kv_heads in ((1024, 8, 8), (1024, 8, 2), (512, 8, 8)):
        keys = jax.random.split(jax.random.key(0), 4)
        counts = (heads, kv_heads, kv_heads, heads)
        shapes = [(1, length, count, 64) for count in counts]
        arguments = [jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True)]
        print(f"T{length} N{heads} K{kv_heads}")
        for what, built in (("forward", forward), ("forward+backward", forward_and_backward)):
            ours, theirs = take_turns(built(dot_product), built(jax_nn), arguments)
            ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
            verdict = "not slower" if statistics.median(ratios) <= GOAL else "SLOWER"
            print(
                f"  {what:<17} dot_product {cell(ours, 1)} ms   jax.nn {cell(theirs, 1)} ms"
                f"   ratio {cell(ratios, 2)} {verdict}"
            )


if __name__ == "__main__":
    main()
