"""Does `auto` choose the fastest of our kernels on CPU? Where the thresholds of the shipped policy for CPUs come from.

Run: make benchmark-choosing; it goes on where the last run ended. Every kernel that serves a shape takes turns with the
others within one run, so that only times of one run are compared. Regret is the median time of the kernel that `auto`
chooses, over the least median of all. Forward is a prefill call; forward+backward is `jax.value_and_grad` of
Σ out · weights with respect to query, key and value, in train mode. What is compared is the shipped policy: neither
variables nor measurements of the user's count.

A kernel that takes more than twice the time of another in the first turns is not timed further. The recording is
benchmarks/results/choosing-cpu.json; a test chooses for its shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from turns import REPEATS, Program, facts, quartiles, rounded, take_turns

import kernelry
from kernelry import Request, masks
from kernelry.policy.measurements import Measurements
from kernelry.policy.policy import Policy, Switches

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
BETWEEN = (192, 384, 768)
PASSES = ("forward", "forward+backward")
HOPELESS = 2.0
GOAL = 1.05
"""The largest regret that counts as none."""
_RECORDED = ("date", "cpu", "cores", "versions")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and pass.

    `span` is the window's length in keys, or a segment's in tokens; 0 under other masks. `keys` is S of a chunk of a
    prompt, whose queries are the last ones; 0 where it is T.
    """

    length: int
    mask: str
    which: str
    span: int = 0
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    keys: int = 0

    def mask_itself(self) -> masks.Mask:
        if self.mask == "window":
            return masks.SlidingWindow(self.span - 1)
        if self.mask == "full":
            return masks.Full()
        if self.mask == "causal":
            return masks.Causal().at(query_offset=jnp.int32(self.keys - self.length)) if self.keys else masks.Causal()
        ids = jnp.arange(self.length, dtype=jnp.int32) // self.span
        return masks.Causal() & masks.Segments(jnp.broadcast_to(ids, (self.batch, self.length)))

    @property
    def mode(self) -> str:
        return "prefill" if self.which == "forward" else "train"

    @property
    def request(self) -> Request:
        return Request(
            target="cpu", mode=self.mode, batch=self.batch, q_len=self.length, kv_len=self.keys or self.length,
            q_heads=self.heads, head_dim=self.head_dim, dtype=self.dtype, mask=self.mask_itself(),
        )  # fmt: skip

    def __str__(self) -> str:
        span = f" {self.span}" if self.span else ""
        shape = f"B{self.batch} N{self.heads} H{self.head_dim} {self.dtype}"
        length = f"{self.length} S={self.keys}" if self.keys else f"{self.length:<5}"
        return f"{shape} T={length} {self.mask + span:<12} {self.which}"


def main_grid(lengths: Iterable[int] = LENGTHS, **shape: Any) -> Iterator[Case]:
    """Lengths × causal, a window of T/8 keys, four segments × forward, forward+backward."""
    for length, which in itertools.product(lengths, PASSES):
        yield Case(length, "causal", which, **shape)
        yield Case(length, "window", which, max(32, length // 8), **shape)
        yield Case(length, "packed", which, length // 4, **shape)


def other_shapes() -> Iterator[Case]:
    """Whether the thresholds depend on more than the length."""
    lengths = (256, 512)
    for shape in ({"heads": 1}, {"batch": 4}, {"head_dim": 128}, {"dtype": "bfloat16"}):
        yield from main_grid(lengths, **shape)


def spans() -> Iterator[Case]:
    """Whether they depend on the window's length, or on how many segments there are."""
    for length, which in itertools.product((256, 512, 1024, 2048), PASSES):
        yield Case(length, "window", which, length // 2)
        yield Case(length, "packed", which, length // 16)


def full() -> Iterator[Case]:
    """Without a mask, as in encoders."""
    for length, which in itertools.product((64, 128, 256, 512, 1024, 2048), PASSES):
        yield Case(length, "full", which)


def chunks() -> Iterator[Case]:
    """Few queries over many keys."""
    for length, keys in itertools.product((16, 64), (256, 512, 1024, 2048, 4096)):
        yield Case(length, "causal", "forward", keys=keys)


GRIDS = {
    "main": main_grid,
    "between": lambda: main_grid(BETWEEN),
    "others": other_shapes,
    "spans": spans,
    "full": full,
    "chunks": chunks,
}


def eligible(request: Request) -> list[str]:
    """The kernels that serve a request without adapters."""
    found = kernelry.explain(request, policy=Policy.shipped(switches=Switches())).candidates
    return sorted(candidate.name for candidate in found if not candidate.refusals and not candidate.steps)


def chosen(request: Request) -> str:
    """What the shipped policy chooses on this machine."""
    policy = Policy.shipped(switches=Switches())
    kernel = kernelry.resolve(request, policy=policy, measurements=Measurements()).kernel
    assert kernel is not None  # dot_product serves everything
    return kernel


def jitted(case: Case, kernel: str) -> tuple[Any, tuple[jax.Array, ...]]:
    """A pass, not compiled yet, and its arguments."""
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (case.length, case.keys or case.length, case.keys or case.length, case.length)
    shapes = [(case.batch, length, case.heads, case.head_dim) for length in lengths]
    arrays = tuple(jax.random.normal(key, shape).astype(case.dtype) for key, shape in zip(keys, shapes, strict=True))
    attend = functools.partial(kernelry.attention, mask=case.mask_itself(), mode=case.mode, kernel=kernel)

    def weighted(q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return (attend(q, k, v) * w).astype(jnp.float32).sum()

    both = jax.value_and_grad(weighted, argnums=(0, 1, 2))
    return jax.jit((lambda q, k, v, _: attend(q, k, v)) if case.which == "forward" else both), arrays


def blocked(run: Any, arrays: tuple[jax.Array, ...]) -> None:
    jax.block_until_ready(run(*arrays))


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Milliseconds of every kernel, quartiles; without repeats they are compiled only."""
    passes = {kernel: jitted(case, kernel) for kernel in eligible(case.request)}
    if not repeats:
        for run, arrays in passes.values():
            run.lower(*arrays).compile()
        return {}
    programs = [Program(kernel, functools.partial(blocked, *each)) for kernel, each in passes.items()]
    for program in programs:
        program.warm_up()
    take_turns(programs, 1)
    quickest = min(each.median for each in programs)
    take_turns([each for each in programs if each.median <= HOPELESS * quickest], repeats - 1)
    return {each.name: {"ms": rounded(quartiles(each.times)), "turns": len(each.times)} for each in programs}


def regret(recorded: dict[str, Any], kernel: str) -> float:
    """A kernel's time over the quickest one's, from what `measure` returned."""
    return recorded[kernel]["ms"][1] / min(times["ms"][1] for times in recorded.values())


class Recording:
    """A JSON file with what was timed so far, of one machine and its versions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = facts("jax", "jaxlib", "kernelry", "kernelry-dot-product")
        self.times: dict[Case, dict[str, Any]] = {}
        if path.exists():
            self._read(json.loads(path.read_text(encoding="utf-8")))

    def _read(self, data: dict[str, Any]) -> None:
        self.recorded = {name: data[name] for name in _RECORDED}
        for row in data["cases"]:
            self.times[Case(**{k: v for k, v in row.items() if k != "kernels"})] = row["kernels"]

    def check(self) -> None:
        """Ends the run where the file is of another machine or other versions."""
        for name in ("cpu", "cores", "versions"):
            if self.times and self.recorded[name] != self.facts[name]:
                raise SystemExit(
                    f"{self.path} was recorded with {name} {self.recorded[name]}, here it is {self.facts[name]}: "
                    "name another file with --json."
                )

    def write(self) -> None:
        rows = (dataclasses.asdict(case) | {"kernels": times} for case, times in self.times.items())
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = json.dumps(self.facts, indent=1).removesuffix("\n}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(f'{head},\n "cases": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
        part.replace(self.path)


def show(case: Case, times: dict[str, Any]) -> float:
    """Prints one line; returns the regret of `auto`."""
    kernel = chosen(case.request)
    lost = regret(times, kernel)
    cells = "  ".join(
        f"{name} {told['ms'][1]:9.3f} ({told['ms'][0]:.3f} – {told['ms'][2]:.3f})" for name, told in times.items()
    )
    print(f"{case!s:<62} {cells} ms  auto: {kernel} ×{lost:.2f}{'' if lost <= GOAL else '  BEHIND'}", flush=True)
    return lost


def crossings(times: dict[Case, dict[str, Any]]) -> None:
    """For each mask and pass the least length from which blockwise should serve, by these recordings."""
    print("blockwise from the length on that leaves the least regret at worst (then in the mean), by mask and pass:")
    for mask, which in itertools.product(("full", "causal", "window", "packed"), PASSES):
        rows = [(c, told) for c, told in times.items() if (c.mask, c.which, c.keys) == (mask, which, 0)]
        if not rows:
            continue
        ends = sorted({case.length for case, _ in rows})
        of_end = {}
        for end in (*ends, ends[-1] + 1):
            lost = [regret(told, "blockwise" if case.length >= end else "dot_product") for case, told in rows]
            of_end[end] = max(lost), statistics.geometric_mean(lost)
        best = min(of_end, key=lambda end: of_end[end])
        print(f"  {mask:<8}{which:<18}{best:>6}: ×{of_end[best][0]:.2f} at worst, ×{of_end[best][1]:.3f} in the mean")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the recording: what it has is not timed again")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=["main"])
    parser.add_argument("--lengths", type=int, nargs="+", help="only these of the grids")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape after so long; 0: only tell")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns of each kernel; 0: compile only")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    began, recording = time.monotonic(), Recording(asked.json)
    if asked.seconds:
        recording.check()
    wanted = [case for grid in asked.grids for case in GRIDS[grid]()]
    wanted = [case for case in wanted if asked.lengths is None or case.length in asked.lengths]
    for case in wanted:
        if case in recording.times or time.monotonic() - began > asked.seconds:
            continue
        times = measure(case, asked.repeats)
        if times:
            recording.times[case] = times
            recording.write()
        jax.clear_caches()
    done = {case: recording.times[case] for case in wanted if case in recording.times}
    lost = [show(case, times) for case, times in done.items()]
    if lost:
        behind = sum(each > GOAL for each in lost)
        print(f"auto is more than 5 % behind on {behind} of {len(lost)} shapes, ×{max(lost):.2f} at worst")
        print(
            f"and ×{statistics.geometric_mean(lost):.3f} in the geometric mean; {len(wanted) - len(done)} to be timed"
        )
        crossings(done)


if __name__ == "__main__":
    main()
