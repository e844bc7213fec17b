"""Does `auto` choose the fastest of our kernels here? Where the measured part of the shipped policy comes from.

Run: make benchmark-choosing; it goes on where the last run ended. Every kernel that serves a shape takes turns with the
others within one run, so that only times of one run are compared. Regret is the median time of the kernel that `auto`
chooses, over the least median of all. Forward is a prefill call; forward+backward is `jax.value_and_grad` of
Σ out · weights with respect to query, key and value, in train mode; decode is a step over a cache. What is compared is
the shipped policy: neither variables nor measurements of the user's count.

A kernel that takes more than twice the time of another in its first two turns is not timed further. There is one file
for each kind of device, `choosing-<kind>.json`; benchmarks/policy.py builds the shipped policy from those in
benchmarks/results, and compares it with `choosing-<kind>-held-out.json`, second recordings that it does not fit.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from turns import facts, rounded

import kernelry
from kernelry import Request, masks
from kernelry.bench.turns import REPEATS, Program, quartiles, take_turns
from kernelry.policy.measurements import Measurements
from kernelry.policy.policy import Policy, Switches
from kernelry.request.target import Target, current_target

PASSES = {"forward": "prefill", "forward+backward": "train", "decode": "decode"}
"""What is timed, and the mode of the call."""

HOPELESS = 2.0
"""How many times as long as another a kernel may take in the better of its first two turns, to be timed further."""
GOAL = 1.05
"""The largest regret that counts as none."""
_RECORDED = ("target", "device", "date", "cpu", "cores", "versions")
SAME = ("target", "device", "cpu", "cores", "versions")
_DISTRIBUTIONS = ("jax", "jaxlib", "kernelry", "kernelry-dot-product")
_OF_ACCELERATORS = (
    "kernelry-gpu-pallas", "kernelry-gpu-flash-attn", "kernelry-cudnn-te", "kernelry-tpu-splash",
    "kernelry-tpu-flywheel",
    "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "tokamax", "transformer-engine",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and pass.

    `span` is the window's length in keys, a segment's in tokens, or how many slots of a cache are filled; 0 under other
    masks. `keys` is S of a cache, or of a chunk of a prompt, whose queries are the last ones; 0 where it is T.
    `kv_heads` is 0 where it is `heads`.
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
    kv_heads: int = 0

    @property
    def mask_itself(self) -> masks.Mask:
        if self.mask == "window":
            return masks.SlidingWindow(self.span - 1)
        if self.mask == "full":
            return masks.Full()
        if self.mask == "causal":
            return masks.Causal().at(query_offset=jnp.int32(self.keys - self.length)) if self.keys else masks.Causal()
        if self.mask == "cache":
            return masks.Lengths(jnp.full(self.batch, self.span, jnp.int32))
        ids = jnp.arange(self.length, dtype=jnp.int32) // self.span
        return masks.Causal() & masks.Segments(jnp.broadcast_to(ids, (self.batch, self.length)))

    @property
    def mode(self) -> str:
        return PASSES[self.which]

    def request(self, target: Target) -> Request:
        return Request(
            target=target, mode=self.mode, batch=self.batch, q_len=self.length, kv_len=self.keys or self.length,
            q_heads=self.heads, kv_heads=self.kv_heads or self.heads, head_dim=self.head_dim, dtype=self.dtype,
            mask=self.mask_itself,
        )  # fmt: skip

    def __str__(self) -> str:
        span = f" {self.span}" if self.span else ""
        heads = f"N{self.heads} K{self.kv_heads}" if self.kv_heads else f"N{self.heads}"
        shape = f"B{self.batch} {heads} H{self.head_dim} {self.dtype}"
        length = f"{self.length} S={self.keys}" if self.keys else f"{self.length:<5}"
        return f"{shape} T={length} {self.mask + span:<12} {self.which}"


def main_grid(lengths: Iterable[int], **shape: Any) -> Iterator[Case]:
    """Lengths × causal, a window of T/8 keys, four segments × forward, forward+backward."""
    for length, which in itertools.product(lengths, ("forward", "forward+backward")):
        yield Case(length, "causal", which, **shape)
        yield Case(length, "window", which, max(32, length // 8), **shape)
        yield Case(length, "packed", which, length // 4, **shape)


def other_shapes(lengths: Iterable[int], shapes: Iterable[dict[str, Any]]) -> Iterator[Case]:
    """Whether the thresholds depend on more than the length."""
    for shape in shapes:
        yield from main_grid(lengths, **shape)


def spans(lengths: Iterable[int], **shape: Any) -> Iterator[Case]:
    """Whether they depend on the window's length, or on how many segments there are."""
    for length, which in itertools.product(lengths, ("forward", "forward+backward")):
        yield Case(length, "window", which, length // 2, **shape)
        yield Case(length, "packed", which, length // 16, **shape)


def full(lengths: Iterable[int], **shape: Any) -> Iterator[Case]:
    """Without a mask, as in encoders."""
    for length, which in itertools.product(lengths, ("forward", "forward+backward")):
        yield Case(length, "full", which, **shape)


def chunks(all_keys: Iterable[int], **shape: Any) -> Iterator[Case]:
    """Few queries over many keys."""
    for length, keys in itertools.product((16, 64), all_keys):
        yield Case(length, "causal", "forward", keys=keys, **shape)


def decode(slots: Iterable[int], **shape: Any) -> Iterator[Case]:
    """A step over a full cache, of as many key heads or a quarter, of one query or four; and over one of few tokens."""
    heads = shape.get("heads", 8)
    for keys in slots:
        for kv_heads, length in ((heads, 1), (heads // 4, 1), (heads, 4)):
            yield Case(length, "cache", "decode", keys, keys=keys, kv_heads=kv_heads, **shape)
        yield Case(1, "cache", "decode", keys // 8, keys=keys, kv_heads=heads, **shape)


def grids(platform: str) -> dict[str, list[Case]]:
    """Every grid by its name: small float32 calls on CPUs, those of larger models in bfloat16 elsewhere."""
    if platform == "cpu":
        others = ({"heads": 1}, {"batch": 4}, {"head_dim": 128}, {"dtype": "bfloat16"})
        found = {
            "main": main_grid((64, 128, 256, 512, 1024, 2048, 4096, 8192)),
            "between": main_grid((192, 384, 768)),
            "others": other_shapes((256, 512), others),
            "wide": main_grid((128, 384, 768, 1024), head_dim=128),
            "spans": spans((256, 512, 1024, 2048)),
            "full": full((64, 128, 256, 512, 1024, 2048)),
            "chunks": chunks((256, 512, 1024, 2048, 4096)),
            "decode": decode((128, 256, 512, 1024, 2048, 4096, 8192)),
        }
    else:
        shape = {"heads": 16, "head_dim": 128, "dtype": "bfloat16"}
        others = tuple(shape | other for other in ({"heads": 4}, {"batch": 4}, {"head_dim": 64}, {"dtype": "float32"}))
        found = {
            "main": main_grid((256, 512, 1024, 2048, 4096, 8192, 16384), **shape),
            "others": other_shapes((1024, 4096), others),
            "spans": spans((2048, 8192), **shape),
            "full": full((256, 1024, 4096, 16384), **shape),
            "chunks": chunks((1024, 4096, 16384), **shape),
            "decode": decode((1024, 4096, 16384, 65536), **shape),
        }
    return {name: list(cases) for name, cases in found.items()}


GRIDS = tuple(grids("cpu"))


def eligible(request: Request) -> list[str]:
    """The kernels that serve a request without adapters."""
    found = kernelry.explain(request, policy=shipped()).candidates
    return sorted(candidate.name for candidate in found if not candidate.refusals and not candidate.steps)


def shipped() -> Policy:
    """The shipped policy under no variable of the user's."""
    return Policy.shipped(switches=Switches())


def chosen(request: Request, policy: Policy) -> str:
    """What a policy chooses, without times of the user's."""
    kernel = kernelry.resolve(request, policy=policy, measurements=Measurements()).kernel
    assert kernel is not None  # dot_product serves everything
    return kernel


def jitted(case: Case, kernel: str) -> tuple[Any, tuple[jax.Array, ...]]:
    """A pass, not compiled yet, and its arguments; a step's last one are the lengths of its cache."""
    keys = jax.random.split(jax.random.key(0), 4)
    slots = case.keys or case.length, case.kv_heads or case.heads
    sizes = ((case.length, case.heads), slots, slots, (case.length, case.heads))
    shapes = [(case.batch, *size, case.head_dim) for size in sizes]
    arrays = tuple(jax.random.normal(key, shape).astype(case.dtype) for key, shape in zip(keys, shapes, strict=True))
    attend = functools.partial(kernelry.attention, mode=case.mode, kernel=kernel)
    mask = case.mask_itself

    def step(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        return attend(q, k, v, mask=masks.Lengths(lengths))

    def weighted(q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return (attend(q, k, v, mask=mask) * w).astype(jnp.float32).sum()

    if case.which == "decode":
        return jax.jit(step), (*arrays[:3], jnp.full(case.batch, case.span, jnp.int32))
    both = jax.value_and_grad(weighted, argnums=(0, 1, 2))
    return jax.jit((lambda q, k, v, _: attend(q, k, v, mask=mask)) if case.which == "forward" else both), arrays


def blocked(run: Any, arrays: tuple[jax.Array, ...]) -> None:
    jax.block_until_ready(run(*arrays))


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Milliseconds of every kernel, quartiles; without repeats they are compiled only."""
    passes = {kernel: jitted(case, kernel) for kernel in eligible(case.request(current_target()))}
    if not repeats:
        for run, arrays in passes.values():
            run.lower(*arrays).compile()
        return {}
    programs = []
    for kernel, each in passes.items():
        program = Program(kernel, functools.partial(blocked, *each))
        try:
            program.warm_up()
        except (RuntimeError, ValueError, NotImplementedError) as error:  # of a compiler, or no memory is left
            print(f"{case!s:<62} {kernel} is left out: {str(error).partition(chr(10))[0]}", flush=True)
            continue
        programs.append(program)
    take_turns(programs, first := min(2, repeats))
    quickest = min(min(each.times) for each in programs)
    take_turns([each for each in programs if min(each.times) <= HOPELESS * quickest], repeats - first)
    return {each.name: {"ms": rounded(quartiles(each.times)), "turns": len(each.times)} for each in programs}


def regret(recorded: dict[str, Any], kernel: str) -> float:
    """A kernel's time over the quickest one's, from what `measure` returned; infinite where it was not timed."""
    if kernel not in recorded:
        return math.inf
    return recorded[kernel]["ms"][1] / min(times["ms"][1] for times in recorded.values())


class Recording:
    """A JSON file with what was timed so far, of one machine and its versions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = facts_here()
        self.recorded = self.facts
        self.times: dict[Case, dict[str, Any]] = {}
        if path.exists():
            self._read(json.loads(path.read_text(encoding="utf-8")))

    @property
    def target(self) -> Target:
        """What it was recorded on."""
        return Target.parse(self.recorded["target"])

    def _read(self, data: dict[str, Any]) -> None:
        self.recorded = {name: data.get(name) for name in _RECORDED}
        for row in data["cases"]:
            self.times[Case(**{k: v for k, v in row.items() if k != "kernels"})] = row["kernels"]

    def check(self) -> None:
        """Ends the run where the file is of another machine or other versions."""
        for name in SAME:
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


def facts_here() -> dict[str, Any]:
    """The device that JAX would use, the day, the CPU and the versions of what may run there."""
    target, device = current_target(), jax.devices()[0]
    if target.platform == "cpu":
        return {"target": "cpu", "device": "cpu", **facts(*_DISTRIBUTIONS)}
    installed = {each.metadata["Name"].lower() for each in metadata.distributions()}
    versions = (*_DISTRIBUTIONS, *(name for name in _OF_ACCELERATORS if name in installed))
    described = f"{device.device_kind}, {device.client.platform_version}"
    return {"target": str(target), "device": described, **facts(*versions)}


def show(case: Case, times: dict[str, Any], kernel: str) -> float:
    """Prints one line of the kernel that `auto` chooses; returns its regret."""
    lost = regret(times, kernel)
    cells = "  ".join(
        f"{name} {told['ms'][1]:9.3f} ({told['ms'][0]:.3f} – {told['ms'][2]:.3f})" for name, told in times.items()
    )
    print(f"{case!s:<62} {cells} ms  auto: {kernel} ×{lost:.2f}{'' if lost <= GOAL else '  BEHIND'}", flush=True)
    return lost


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, help="the recording, runs/choosing-<kind>.json: what it has is not timed again"
    )
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=GRIDS, help="all unless some are named")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these of the grids")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape after so long; 0: only tell")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns of each kernel; 0: compile only")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    target = current_target()
    path = asked.json or Path("runs") / f"choosing-{target.kind or target.platform}.json"
    began, recording = time.monotonic(), Recording(path)
    if asked.seconds:
        recording.check()
    platform = recording.target.platform
    wanted = [case for name, cases in grids(platform).items() if name in asked.grids for case in cases]
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
    policy = shipped()
    lost = [show(case, times, chosen(case.request(recording.target), policy)) for case, times in done.items()]
    if lost:
        behind = sum(each > GOAL for each in lost)
        print(f"auto is more than 5 % behind on {behind} of {len(lost)} shapes, ×{max(lost):.2f} at worst")
        mean = statistics.geometric_mean(lost)
        print(f"and ×{mean:.3f} in the geometric mean; {len(wanted) - len(done)} to be timed")


if __name__ == "__main__":
    main()
