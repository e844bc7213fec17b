"""blockwise against jax.nn.dot_product_attention and, where torch is installed, its scaled_dot_product_attention.

Run: make benchmark-peers. B1 N8 H64 float32. Every ratio is measured within one run; so is the floor: the time of the
call's matrix products at the rate of a 2048³ product, and of its exponentials at the rate in cache. The first call's
time is what it takes beyond a later one: tracing and compiling.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kernelry
from kernelry import masks

REPEATS = 7
HEADS, HEAD_DIM = 8, 64
PRODUCTS = {"forward": 2, "forward+backward": 7}
EXPONENTIALS = {"forward": 1, "forward+backward": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, its mask, and how many of the T × S logits anyone sees."""

    name: str
    length: int
    mask: masks.Mask
    visible: int
    window: int | None = None
    segments: jax.Array | None = None


def cases() -> list[Case]:
    """The shapes of the table."""
    causal = [Case("causal", n, masks.Causal(), n * (n + 1) // 2) for n in (1024, 4096)]
    length, seen = 8192, 512
    window = Case("window 512", length, masks.SlidingWindow(seen - 1), seen * length - seen * (seen - 1) // 2, seen)
    each = length // 16
    ids = jnp.repeat(jnp.arange(16, dtype=jnp.int32), each)[None]
    packed_mask = masks.Causal() & masks.Segments(ids)
    packed = Case("16 segments, causal", length, packed_mask, 16 * (each * (each + 1) // 2), segments=ids)
    return [*causal, window, packed]


def blockwise(case: Case) -> Callable[..., jax.Array]:
    return functools.partial(kernelry.attention, mask=case.mask, kernel="blockwise")


def jax_nn(case: Case) -> Callable[..., jax.Array]:
    ids = case.segments
    return functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=None if case.window is None else (case.window - 1, 0),
        mask=None if ids is None else ids[:, None, :, None] == ids[:, None, None, :],
        implementation="xla",
    )


def seconds(call: Callable[[], Any]) -> tuple[float, float, float, float]:
    """The first call, then median, least and greatest of the others."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:]), min(times[1:]), max(times[1:])


def passes(attend: Callable[..., jax.Array]) -> dict[str, Any]:
    """The compiled-on-first-use forms of both passes."""
    both = jax.value_and_grad(lambda q, k, v, w: (attend(q, k, v) * w).sum(), argnums=(0, 1, 2))
    return {"forward": jax.jit(lambda q, k, v, _: attend(q, k, v)), "forward+backward": jax.jit(both)}


def of_torch(case: Case, arrays: tuple[jax.Array, ...]) -> dict[str, Callable[[], Any]]:
    """The same in torch, which knows windows and segments only as a dense mask."""
    import numpy as np
    import torch

    torch.set_num_threads(2)
    q, k, v, w = (torch.from_numpy(np.array(array.swapaxes(1, 2))) for array in arrays)
    for array in (q, k, v):
        array.requires_grad_()
    plain = case.window is None and case.segments is None
    dense = None if plain else torch.from_numpy(np.array(case.mask.materialize(case.length, case.length)))

    def forward() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=plain)

    def both() -> Any:
        return torch.autograd.grad((forward() * w).sum(), (q, k, v))

    def alone() -> Any:
        with torch.no_grad():
            return forward()

    return {"forward": alone, "forward+backward": both}


def rates() -> tuple[float, float]:
    """FLOP/s of a float32 product, exponentials per second in cache."""
    square = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda a: a @ a)
    flops = 2 * 2048**3 / seconds(lambda: product(square).block_until_ready())[1]
    small, times = jax.random.normal(jax.random.key(0), (256, 512)), 200
    exponentials = jax.jit(lambda a: jax.lax.fori_loop(0, times, lambda _, b: jnp.exp(-b), a))
    return flops, times * small.size / seconds(lambda: exponentials(small).block_until_ready())[1]


def floor(case: Case, which: str, flops: float, exponentials: float) -> float:
    """Seconds that the products and exponentials of the visible logits take by themselves."""
    logits = case.visible * HEADS
    return PRODUCTS[which] * 2 * logits * HEAD_DIM / flops + EXPONENTIALS[which] * logits / exponentials


def show(case: Case, flops: float, exponentials: float) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = tuple(jax.random.normal(key, (1, case.length, HEADS, HEAD_DIM)) for key in keys)
    calls: dict[str, dict[str, Any]] = {}
    temporary: dict[str, dict[str, int]] = {}
    for name, attend in (("blockwise", blockwise(case)), ("jax.nn", jax_nn(case))):
        compiled = passes(attend)
        calls[name] = {
            which: functools.partial(lambda call: jax.block_until_ready(call(*arrays)), call)
            for which, call in compiled.items()
        }
        temporary[name] = {
            which: call.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
            for which, call in compiled.items()
        }
    if importlib.util.find_spec("torch"):
        calls["torch"] = of_torch(case, arrays)
    for which in PRODUCTS:
        print(f"T={case.length} {case.name}, {which}")
        base = None
        for name, of_peer in calls.items():
            jax.clear_caches()
            first, median, low, high = seconds(of_peer[which])
            base = base or median
            memory = f", temporary {temporary[name][which] / 2**20:.0f} MiB" if name in temporary else ""
            line = f"{median * 1e3:8.1f} ms ({low * 1e3:.1f} – {high * 1e3:.1f}), first call +{first - median:.2f} s"
            share = floor(case, which, flops, exponentials) / median
            note = (
                f", {share:.0%} of the floor's rate" if name == "blockwise" else f", blockwise is {median / base:.1f}×"
            )
            print(f"  {name:<10}{line}{memory}{note}", flush=True)


def main() -> None:
    flops, exponentials = rates()
    print(f"products at {flops / 1e9:.0f} GFLOP/s, {exponentials / 1e9:.1f} G exponentials/s, jax {jax.__version__}")
    for case in cases():
        show(case, flops, exponentials)


if __name__ == "__main__":
    main()
