"""What choosing a kernel costs: imports, cached and uncached resolution, tracing. Run: make benchmark."""

import logging
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

import kernelry
from kernelry import Request, masks
from kernelry.resolution import resolver

REPEATS = 9

PACKED = masks.Causal() & masks.Segments([0] * 200) & masks.Lengths([180])
HARD = {
    f"many adapters on {target}": Request(
        target=target, q_len=200, q_heads=8, kv_heads=2, head_dim=80, mask=PACKED, sinks=True, dtype="float16"
    )
    for target in ("cpu", "gpu:h100", "tpu:v5e")
}
"""Requests that only adapters serve, on their accelerators."""


def microseconds(function, calls):
    """Median and spread (min–max) over REPEATS of the mean of `calls` calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times), min(times), max(times)


def report(name, measured):
    median, low, high = measured
    print(f"{name:<58} {median:9.2f} µs  ({low:.2f} – {high:.2f})")


def import_milliseconds(statement):
    code = f"import time, jax; t = time.perf_counter(); {statement}; print((time.perf_counter() - t) * 1e3)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(REPEATS)
    ]
    return statistics.median(runs), min(runs), max(runs)


def fresh_requests(count):
    return iter([Request(q_len=1024, q_heads=8, mask=masks.Causal()) for _ in range(count)])


def main():
    logging.getLogger("kernelry").setLevel(logging.ERROR)  # else each uncached resolution warns of its adapters
    median, low, high = import_milliseconds("import kernelry")
    print(f"{'import kernelry, after import jax':<58} {median:9.2f} ms  ({low:.2f} – {high:.2f})")
    request = Request(q_len=1024, q_heads=8, mask=masks.Causal())
    kernelry.resolve(request)
    report("resolve, a request seen before", microseconds(lambda: kernelry.resolve(request), 20_000))
    requests = fresh_requests(REPEATS * 20_000)
    report("resolve, a fresh equal request", microseconds(lambda: kernelry.resolve(next(requests)), 20_000))
    report("build a request", microseconds(lambda: Request(q_len=1024, q_heads=8, mask=request.mask), 5_000))

    for name, asked in {"plain": request, **HARD}.items():

        def uncached(asked=asked):
            resolver.clear_cache()
            kernelry.resolve(asked)

        report(f"resolve, uncached, {len(kernelry.kernels())} kernels, {name}", microseconds(uncached, 100))
    query = jax.ShapeDtypeStruct((1, 128, 8, 64), jnp.float32)

    def trace():
        # A new function each time, so that JAX's own cache does not answer.
        jax.jit(lambda q: kernelry.attention(q, q, q, mask=masks.Causal())).trace(query)

    report("trace attention(...)", microseconds(trace, 20))


if __name__ == "__main__":
    main()
