"""dot_product and blockwise against jax.nn on CPU: where the shipped threshold comes from. Run: make benchmark."""

import statistics
import time

import jax
import jax.numpy as jnp

import kernelry
from kernelry import masks

REPEATS = 7


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


def main():
    for length, window in (
        (256, 63),
        (512, 63),
        (512, None),
        (768, None),
        (1024, 63),
        (1024, None),
        (2048, 255),
        (2048, None),
        (4096, None),
    ):
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (1, length, 8, 64)) for key in keys)
        mask = masks.Causal() if window is None else masks.SlidingWindow(window)
        local = None if window is None else (window, 0)
        calls = {
            "jax.nn": lambda q, k, v, local=local: jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=local, implementation="xla"
            ),
            "dot_product": lambda q, k, v, mask=mask: kernelry.attention(q, k, v, mask=mask, kernel="dot_product"),
            "blockwise": lambda q, k, v, mask=mask: kernelry.attention(q, k, v, mask=mask, kernel="blockwise"),
        }
        print(f"B1 N8 H64 float32, T={length}, {mask}")
        base = None
        for name, call in calls.items():
            forward, gradient = (milliseconds(f, q, k, v) for f in forward_and_gradient(call))
            base = base or (forward[0], gradient[0])
            print(f"  {name:<12}" + cell("forward", forward, base[0]) + cell("forward+gradient", gradient, base[1]))


if __name__ == "__main__":
    main()
