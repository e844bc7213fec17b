"""dot_product and blockwise against jax.nn on CPU, and blockwise's block sizes: where the shipped numbers come from.

Run: make benchmark. Every ratio is measured within one run.
"""

import statistics
import time

import jax
import jax.numpy as jnp

import kernelry
from kernelry import masks

REPEATS = 7
LENGTHS = (256, 512, 768, 1024, 2048, 4096)
WINDOWED = ((256, 63), (512, 63), (1024, 63), (2048, 255), (4096, 511))
TILINGS = ((512, 256), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 512))


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


def forward_and_gradient(call):
    gradient = jax.grad(lambda q, k, v: call(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(call), jax.jit(gradient)


def cell(what, measured, base):
    median, low, high = measured
    return f"   {what} {median:8.1f} ms ({low:.1f} – {high:.1f}), ×{base / median:.2f}"


def attend(mask, kernel):
    return lambda q, k, v: kernelry.attention(q, k, v, mask=mask, kernel=kernel)


def against_peers(length, window):
    """Times the kernels and jax.nn on one shape."""
    mask = masks.Causal() if window is None else masks.SlidingWindow(window)
    local = None if window is None else (window, 0)
    calls = {
        "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=local, implementation="xla"
        ),
        "dot_product": attend(mask, "dot_product"),
        "blockwise": attend(mask, "blockwise"),
    }
    print(f"B1 N8 H64 float32, T={length}, {mask}")
    base = None
    for name, call in calls.items():
        forward, gradient = (milliseconds(f, *arrays(length)) for f in forward_and_gradient(call))
        base = base or (forward[0], gradient[0])
        print(f"  {name:<12}" + cell("forward", forward, base[0]) + cell("forward+gradient", gradient, base[1]))


def block_sizes(length, mask):
    """Times blockwise's tilings on one shape, against the first."""
    print(f"block_q × block_kv, B1 N8 H64 float32, T={length}, {mask}")
    base = None
    for block_q, block_kv in TILINGS:
        with kernelry.use(tiling={"block_q": block_q, "block_kv": block_kv}):
            functions = forward_and_gradient(attend(mask, "blockwise"))
            forward, gradient = (milliseconds(f, *arrays(length)) for f in functions)
        base = base or (forward[0], gradient[0])
        name = f"{block_q} × {block_kv}"
        print(f"  {name:<12}" + cell("forward", forward, base[0]) + cell("forward+gradient", gradient, base[1]))


def main():
    for length in LENGTHS:
        against_peers(length, None)
    for length, window in WINDOWED:
        against_peers(length, window)
    block_sizes(4096, masks.Causal())
    block_sizes(4096, masks.SlidingWindow(511))
    block_sizes(1024, masks.SlidingWindow(63))


if __name__ == "__main__":
    main()
