"""blockwise's block sizes on CPU: every tiling of its search space against its default. Run: make benchmark.

Every ratio is measured within one run. benchmarks/choosing.py compares the kernels, benchmarks/against_peers.py other
libraries.
"""

import statistics
import time

import jax
import jax.numpy as jnp

import kernelry
from kernelry import masks

REPEATS = 7
SHAPES = (
    (256, masks.Causal()),
    (512, masks.Causal()),
    (1024, masks.Causal()),
    (1024, masks.SlidingWindow(63)),
    (1024, masks.SlidingWindow(255)),
    (4096, masks.Causal()),
    (4096, masks.SlidingWindow(511)),
)


def arrays(length):
    return tuple(jax.random.normal(key, (1, length, 8, 64)) for key in jax.random.split(jax.random.key(0), 3))


def milliseconds(function, *arguments):
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), min(times), max(times)


def attend(mask):
    def call(q, k, v):
        return kernelry.attention(q, k, v, mask=mask, kernel="blockwise")

    gradient = jax.grad(lambda q, k, v: call(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(call), jax.jit(gradient)


def tilings(length, mask):
    """Those of blockwise for a shape, its default first."""
    request = kernelry.Request(q_len=length, q_heads=8, head_dim=64, dtype="float32", mask=mask, target="cpu")
    [spec] = (kernel.spec for kernel in kernelry.kernels() if kernel.name == "blockwise")
    return spec.tilings(request)


def cell(what, measured, base):
    median, low, high = measured
    return f"   {what} {median:8.1f} ms ({low:.1f} – {high:.1f}), ×{base / median:.2f}"


def main():
    for length, mask in SHAPES:
        print(f"block_q × block_kv, B1 N8 H64 float32, T={length}, {mask}")
        base = None
        for tiling in tilings(length, mask):
            with kernelry.use(tiling=dict(tiling.values)):
                forward, gradient = (milliseconds(function, *arrays(length)) for function in attend(mask))
            base = base or (forward[0], gradient[0])
            name = f"{tiling['block_q']} × {tiling['block_kv']}"
            print(f"  {name:<12}" + cell("forward", forward, base[0]) + cell("forward+gradient", gradient, base[1]))


if __name__ == "__main__":
    main()
