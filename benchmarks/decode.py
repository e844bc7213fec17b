"""A decode step over a cache: blockwise against dot_product and jax.nn, by how much of the capacity is filled.

Run: make benchmark-decode. B1 H64 float32 queries, two CPU cores. What a cache of int8 numbers or of pages costs; every
ratio is measured within one run. Which kernel serves from which length on is recorded by benchmarks/choosing.py.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import kernelry
from kernelry import masks
from kernelry.cache import PagedArray, QuantizedArray

REPEATS = 21
HEAD_DIM, PAGE = 64, 16
CAPACITIES = (256, 512, 1024, 2048, 8192)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of T queries of N heads over S slots of K heads, of which `filled` hold tokens."""

    slots: int
    filled: int
    q_heads: int = 8
    kv_heads: int = 8
    q_len: int = 1

    def __str__(self) -> str:
        return f"S={self.slots} filled {self.filled} N={self.q_heads} K={self.kv_heads} T={self.q_len}"

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        held = (1, self.slots, self.kv_heads, HEAD_DIM)
        query = jax.random.normal(keys[0], (1, self.q_len, self.q_heads, HEAD_DIM))
        return query, jax.random.normal(keys[1], held), jax.random.normal(keys[2], held)


def attend(kernel: str, filled: int, table: jax.Array | None = None) -> Callable[..., jax.Array]:
    """A step by a kernel; key and value are pages where there is a table."""

    def step(query: jax.Array, key: Any, value: Any, lengths: jax.Array) -> jax.Array:
        if table is not None:
            key, value = PagedArray(key, table), PagedArray(value, table)
        return kernelry.attention(query, key, value, mask=masks.Lengths(lengths), mode="decode", kernel=kernel)

    compiled, lengths = jax.jit(step), jnp.full(1, filled, jnp.int32)
    return lambda query, key, value: compiled(query, key, value, lengths)


def jax_nn(filled: int) -> Callable[..., jax.Array]:
    compiled, lengths = jax.jit(jax.nn.dot_product_attention), jnp.full(1, filled, jnp.int32)
    return lambda query, key, value: compiled(query, key, value, key_value_seq_lengths=lengths)


def calls(case: Case) -> Iterator[tuple[str, Callable[[], jax.Array]]]:
    query, key, value = case.arrays()
    yield "jax.nn", functools.partial(jax_nn(case.filled), query, key, value)
    for kernel in ("dot_product", "blockwise"):
        yield kernel, functools.partial(attend(kernel, case.filled), query, key, value)
    small = [QuantizedArray.quantize(array) for array in (key, value)]
    yield "blockwise, int8", functools.partial(attend("blockwise", case.filled), query, *small)
    count = case.slots // PAGE
    table = jax.random.permutation(jax.random.key(3), count).reshape(1, count).astype(jnp.int32)
    pages = [array.reshape(count, PAGE, case.kv_heads, HEAD_DIM) for array in (key, value)]
    yield "blockwise, pages", functools.partial(attend("blockwise", case.filled, table), query, *pages)


def milliseconds(call: Callable[[], Any]) -> list[float]:
    jax.block_until_ready(call())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
    return times


def quartiles(times: list[float]) -> str:
    low, median, high = statistics.quantiles(times, n=4)
    return f"{median:8.2f} ms ({low:.2f} – {high:.2f})"


def show(case: Case) -> dict[str, float]:
    print(case)
    found = {}
    for name, call in calls(case):
        times = milliseconds(call)
        found[name] = statistics.median(times)
        ratio = f"  ×{found['jax.nn'] / found[name]:.2f}" if name != "jax.nn" else ""
        print(f"  {name:<18}{quartiles(times)}{ratio}", flush=True)
    return found


def main() -> None:
    print(f"jax {jax.__version__}")
    for slots in CAPACITIES:
        for kv_heads in (8, 2):
            show(Case(slots, slots, kv_heads=kv_heads))
    show(Case(8192, 8192, q_len=4))
    full, part = show(Case(8192, 8192)), show(Case(8192, 512))
    for name in full:
        print(f"{name}: 512 of 8192 slots cost 1/{full[name] / part[name]:.1f} of a full cache")


if __name__ == "__main__":
    main()
