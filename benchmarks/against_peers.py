"""auto, blockwise and dot_product against torch's scaled_dot_product_attention and jax.nn's attention, on CPU.

Run: make benchmark-peers; PEERS_ARGS="--lengths 4096 --only forward --cases causal" is a part of it. B1 N8 H64 float32.
The programs of a table take turns within one run, and a ratio is one of times of the same turn: peer's time over ours.
So is the floor: the time of the call's matrix products at the rate of a 2048³ product, and of its exponentials at the
rate in cache, both of which take turns too. Forward is a prefill call; forward+backward is `jax.value_and_grad` of
Σ out · weights with respect to query, key and value, in train mode.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from turns import facts, ratios, rounded

import kernelry
from kernelry import masks
from kernelry.bench.turns import REPEATS, Program, quartiles, take_turns

HEADS, HEAD_DIM = 8, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LONG = 8192
OURS = ("auto", "blockwise", "dot_product")
PRODUCTS = {"forward": 2, "forward+backward": 7}
EXPONENTIALS = {"forward": 1, "forward+backward": 2}
FLOOR = "the floor"


@dataclasses.dataclass(frozen=True)
class Target:
    """What `auto` is meant to reach on causal shapes: at least this ratio to a peer, or this share of the floor."""

    peer: str
    which: str
    least: float
    lengths: tuple[int, ...] = LENGTHS


TARGETS = (
    Target("torch", "forward", 0.9, (256, 512)),
    Target("torch", "forward", 1.0, (1024,)),
    Target("torch", "forward", 1.15, (2048, 4096)),
    Target("torch", "forward+backward", 1.0, (256, 512)),
    Target("torch", "forward+backward", 1.25, (1024, 2048, 4096)),
    Target("jax.nn", "forward", 1.1),
    Target("jax.nn", "forward+backward", 1.1),
    Target(FLOOR, "forward", 0.85, (4096,)),
    Target(FLOOR, "forward+backward", 0.8, (4096,)),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, its mask, and how many of the T × S logits anyone sees."""

    name: str
    length: int
    mask: masks.Mask
    visible: int
    window: int | None = None
    segments: jax.Array | None = None

    def target(self, peer: str, which: str) -> float | None:
        found = (t for t in TARGETS if (t.peer, t.which) == (peer, which) and self.length in t.lengths)
        return next((target.least for target in found), None) if self.name == "causal" else None


def cases(names: list[str], lengths: list[int] | None) -> Iterator[Case]:
    """The shapes of the table."""
    if "causal" in names:
        for n in lengths or LENGTHS:
            yield Case("causal", n, masks.Causal(), n * (n + 1) // 2)
    for n in lengths or (LONG,):
        seen = n // 16
        if "window" in names:
            visible = seen * n - seen * (seen - 1) // 2
            yield Case(f"window {seen}", n, masks.SlidingWindow(seen - 1), visible, window=seen)
        if "packed" in names:
            ids = jnp.repeat(jnp.arange(16, dtype=jnp.int32), seen)[None]
            mask = masks.Causal() & masks.Segments(ids)
            yield Case("16 segments, causal", n, mask, 16 * (seen * (seen + 1) // 2), segments=ids)


def ours(case: Case, kernel: str, which: str) -> Callable[..., jax.Array]:
    mode = "prefill" if which == "forward" else "train"
    return functools.partial(kernelry.attention, mask=case.mask, kernel=kernel, mode=mode)


def jax_nn(case: Case) -> Callable[..., jax.Array]:
    ids = case.segments
    return functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=None if case.window is None else (case.window - 1, 0),
        mask=None if ids is None else ids[:, None, :, None] == ids[:, None, None, :],
        implementation="xla",
    )


def jitted(attend: Callable[..., jax.Array], which: str) -> Any:
    if which == "forward":
        return jax.jit(lambda q, k, v, _: attend(q, k, v))
    return jax.jit(jax.value_and_grad(lambda q, k, v, w: (attend(q, k, v) * w).sum(), argnums=(0, 1, 2)))


def of_torch(case: Case, which: str, arrays: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """The same in torch, which knows windows and segments only as a dense mask."""
    import torch

    torch.set_num_threads(2)
    q, k, v, w = (torch.from_numpy(np.array(array.swapaxes(1, 2))) for array in arrays)
    plain = case.window is None and case.segments is None
    dense = None if plain else torch.from_numpy(np.array(case.mask.materialize(case.length, case.length)))
    attend = torch.nn.functional.scaled_dot_product_attention

    def alone() -> Any:
        with torch.no_grad():
            return attend(q, k, v, attn_mask=dense, is_causal=plain)

    def both() -> Any:
        return torch.autograd.grad((attend(q, k, v, attn_mask=dense, is_causal=plain) * w).sum(), (q, k, v))

    if which == "forward":
        return alone
    for array in (q, k, v):
        array.requires_grad_()
    return both


def rulers() -> tuple[Program, Program]:
    """A float32 product of 2 · 2048³ operations, and 200 times 131072 exponentials in cache."""
    square = jax.random.normal(jax.random.key(0), (2048, 2048))
    small = jax.random.normal(jax.random.key(0), (256, 512))
    product = jax.jit(lambda a: a @ a)
    exponentials = jax.jit(lambda a: jax.lax.fori_loop(0, 200, lambda _, b: jnp.exp(-b), a))
    return (
        Program("2048³ product", lambda: product(square).block_until_ready()),
        Program("exponentials", lambda: exponentials(small).block_until_ready()),
    )


def floors(case: Case, which: str, product: Program, exponentials: Program) -> list[float]:
    """Milliseconds, by turn, that the products and exponentials of the visible logits take by themselves."""
    logits = case.visible * HEADS
    products = PRODUCTS[which] * 2 * logits * HEAD_DIM / (2 * 2048**3)
    exponential = EXPONENTIALS[which] * logits / (200 * 256 * 512)
    turns = zip(product.times, exponentials.times, strict=True)
    return [products * one + exponential * other for one, other in turns]


def programs(case: Case, which: str) -> Iterator[Program]:
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = tuple(jax.random.normal(key, (1, case.length, HEADS, HEAD_DIM)) for key in keys)
    attends = {kernel: ours(case, kernel, which) for kernel in OURS} | {"jax.nn": jax_nn(case)}
    for name, attend in attends.items():
        run = jitted(attend, which)
        temporary = run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
        yield Program(name, functools.partial(lambda run: jax.block_until_ready(run(*arrays)), run), temporary)
    if importlib.util.find_spec("torch"):
        yield Program("torch", of_torch(case, which, arrays))


def measure(case: Case, which: str, repeats: int) -> dict[str, Any]:
    """Prints one table and returns it as plain data."""
    timed, (product, exponentials) = list(programs(case, which)), rulers()
    turns = (product, exponentials, *timed)
    for program in turns:
        program.warm_up()
    take_turns(turns, repeats)
    floor, auto = floors(case, which, product, exponentials), timed[0]
    print(f"T={case.length} {case.name}, {which}: products at {2 * 2048**3 / product.median / 1e6:.0f} GFLOP/s")
    found: dict[str, Any] = {"length": case.length, "case": case.name, "pass": which, "programs": {}, "targets": []}
    for program in timed:
        low, median, high = quartiles(program.times)
        told: dict[str, Any] = {"ms": rounded((low, median, high)), "turns": len(program.times)}
        line = f"  {program.name:<12}{median:9.3f} ms ({low:.3f} – {high:.3f})"
        if program.temporary is not None:
            told["temporary_bytes"] = program.temporary
            line += f", temporary {program.temporary / 2**20:.0f} MiB"
        if program.name in OURS:
            peer, ratio = FLOOR, ratios(floor, program.times)
            line += f", {ratio[1]:.0%} of the floor's rate ({ratio[0]:.0%} – {ratio[2]:.0%})"
        else:
            peer, ratio = program.name, ratios(program.times, auto.times)
            line += f", auto is {ratio[1]:.2f}× ({ratio[0]:.2f} – {ratio[2]:.2f})"
        told["share_of_floor" if peer == FLOOR else "over_auto"] = rounded(ratio)
        least = case.target(peer, which) if peer != FLOOR or program is auto else None
        if least is not None:
            found["targets"].append({"peer": peer, "least": least, "ratio": ratio[1], "reached": ratio[1] >= least})
            line += f", {'reaches' if ratio[1] >= least else 'MISSES'} {least:g}"
        found["programs"][program.name] = told
        print(line, flush=True)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("causal", "window", "packed")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"of causal shapes {LENGTHS}, of others {LONG}")
    parser.add_argument("--only", choices=PRODUCTS, help="one pass")
    parser.add_argument("--cases", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns of each program")
    parser.add_argument("--json", type=Path, help="where to write everything; tables that it has of other runs stay")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    about = facts("jax", "jaxlib", "kernelry", *(["torch"] if importlib.util.find_spec("torch") else []))
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()), about["cpu"]["model"])
    tables = []
    for case in cases(asked.cases, asked.lengths):
        for which in [asked.only] if asked.only else PRODUCTS:
            tables.append(measure(case, which, asked.repeats) | about)
            jax.clear_caches()
    targets = [target for table in tables for target in table["targets"]]
    print(f"{sum(target['reached'] for target in targets)} of {len(targets)} targets are reached")
    if asked.json:
        same = ("length", "case", "pass")
        new = {tuple(table[name] for name in same) for table in tables}
        kept = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.exists() else []
        kept = [table for table in kept if tuple(table[name] for name in same) not in new]
        asked.json.write_text(json.dumps(kept + tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
