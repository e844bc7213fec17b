"""What the kernels do on the machine at hand: right or not, and how fast. Run: python benchmarks/device.py.

Holds every kernel that runs here to what it declares, then times each eligible one and `auto` on named shapes,
next to a matrix product and a copy that take turns with them, and writes one JSON.
Forward+backward is `jax.value_and_grad` of Σ out · weights with respect to query, key and value.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kernelry
from kernelry import masks
from kernelry.errors import KernelryError

WARM_UP = 2
RESULTS = Path(__file__).parent / "results"
ENOUGH_MS = 10.0
"""Accelerator calls are queued until a sample takes about this long, so that launching them hides behind the work."""
BACKWARD_FACTOR = 3.5
"""Products of forward+backward (2 + 5) over those of forward (2)."""
PACKAGES = ("jax", "jaxlib", "numpy", "kernelry", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A call: sizes are counts of tokens, heads and channels; `window` is how many keys a query sees."""

    batch: int = 1
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mode: str = "train"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    dtype: str = "bfloat16"

    @property
    def mask(self):
        if self.window is not None:
            return masks.Causal() & masks.SlidingWindow(self.window - 1, 0)
        return masks.Causal() if self.causal else masks.Full()

    @property
    def flops(self):
        """Operations of the two forward products over the visible logits alone."""
        seen = np.full(self.q_len, self.kv_len)
        if self.causal:
            seen = np.minimum(np.arange(1, self.q_len + 1), self.window or self.q_len)
        return 4 * self.batch * self.q_heads * self.head_dim * int(seen.sum())

    @property
    def bytes(self):
        """Least traffic of a forward call: query and output, key and value, once each."""
        width = jnp.dtype(self.dtype).itemsize
        heads = 2 * self.q_len * self.q_heads + 2 * self.kv_len * self.kv_heads
        return width * self.batch * self.head_dim * heads

    def arrays(self):
        """query, key, value and the weights of the loss."""
        query = (self.batch, self.q_len, self.q_heads, self.head_dim)
        key = (self.batch, self.kv_len, self.kv_heads, self.head_dim)
        draws = zip(jax.random.split(jax.random.key(0), 4), (query, key, key, query), strict=True)
        return tuple(jax.random.normal(seed, size, jnp.dtype(self.dtype)) for seed, size in draws)


ACCELERATOR = {
    "llama3_8b_train_4k": Shape(q_len=4096, kv_len=4096, q_heads=32, kv_heads=8, head_dim=128),
    "gemma2_local_8k_window": Shape(
        q_len=8192, kv_len=8192, q_heads=16, kv_heads=8, head_dim=256, window=4096, soft_cap=50.0
    ),
    "mixtral_prefill_8k": Shape(q_len=8192, kv_len=8192, q_heads=32, kv_heads=8, head_dim=128, mode="prefill"),
    "vit_256_full": Shape(batch=64, q_len=256, kv_len=256, q_heads=16, kv_heads=16, head_dim=64, causal=False),
    "decode_32k": Shape(
        batch=8, q_len=1, kv_len=32768, q_heads=32, kv_heads=8, head_dim=128, mode="decode", causal=False
    ),
}
CPU = {
    "small_train_1k": Shape(q_len=1024, kv_len=1024, q_heads=8, kv_heads=8, head_dim=64, dtype="float32"),
    "small_window_1k": Shape(q_len=1024, kv_len=1024, q_heads=8, kv_heads=2, head_dim=64, window=256, dtype="float32"),
    "small_prefill_2k": Shape(
        q_len=2048, kv_len=2048, q_heads=4, kv_heads=1, head_dim=64, mode="prefill", dtype="float32"
    ),
    "small_decode_4k": Shape(
        q_len=1, kv_len=4096, q_heads=8, kv_heads=2, head_dim=64, mode="decode", causal=False, dtype="float32"
    ),
}
HERE = jax.devices()[0]
ON_CPU = HERE.platform == "cpu"


@dataclasses.dataclass
class Program:
    """A compiled program, its work per call, and the milliseconds per call measured so far."""

    name: str
    run: object
    arguments: tuple
    flops: float = 0.0
    bytes: float = 0.0
    facts: dict = dataclasses.field(default_factory=dict)
    calls: int = 1
    times: list = dataclasses.field(default_factory=list)

    def sample(self):
        """Milliseconds per call. CPU calls wait for one another; an accelerator runs its queue in order."""
        start = time.perf_counter()
        for _ in range(self.calls):
            result = self.run(*self.arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) * 1e3 / self.calls

    def warm_up(self):
        for _ in range(WARM_UP):
            once = self.sample()
        self.calls = 1 if ON_CPU else min(100, math.ceil(ENOUGH_MS / max(once, 1e-3)))

    def to_json(self):
        low, median, high = statistics.quantiles(self.times, n=4)
        found = {"median_ms": median, "lower_quartile_ms": low, "upper_quartile_ms": high, "samples": len(self.times)}
        if self.flops:
            found["tflop_per_s"] = self.flops / median / 1e9
        if self.bytes:
            found["gb_per_s"] = self.bytes / median / 1e6
        return self.facts | {name: round(value, 4) for name, value in found.items()} | {"calls_per_sample": self.calls}


def baselines(dtype):
    """A square matrix product and a device copy (read and written bytes both count)."""
    side, length = (1024, 2**24) if ON_CPU else (8192, 2**29)
    square = jax.random.normal(jax.random.key(1), (side, side), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    yield Program("matrix_product", product, (square, square), flops=2 * side**3, facts={"side": side, "dtype": dtype})
    source = jnp.ones(length, jnp.uint8)
    copied = jax.jit(jnp.copy).lower(source).compile()
    yield Program("copy", copied, (source,), bytes=2 * length, facts={"array_bytes": length})


def attend(shape, kernel, wanted):
    """A function of query, key, value and weights."""

    def forward(query, key, value, _):
        return kernelry.attention(
            query, key, value, mask=shape.mask, soft_cap=shape.soft_cap, mode=shape.mode, kernel=kernel,
            gradients=("query", "key", "value") if wanted else (),
        )  # fmt: skip

    if not wanted:
        return forward

    def loss(query, key, value, weights):
        out = forward(query, key, value, weights)
        return (out.astype(jnp.float32) * weights).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def compiled(shape, kernel, wanted, arguments):
    """The program of a kernel, after proving that it is in there."""
    with kernelry.record() as resolutions:
        lowered = jax.jit(attend(shape, kernel, wanted)).lower(*arguments)
    resolution = resolutions[-1]
    resolution.verify(lowered)
    steps = [step.adapter.name for step in resolution.plan.steps]
    start = time.perf_counter()
    program = lowered.compile()
    facts = {"kernel": resolution.kernel, "adapters": steps, "compile_s": round(time.perf_counter() - start, 2)}
    flops = shape.flops * (BACKWARD_FACTOR if wanted else 1)
    return Program(kernel, program, arguments, flops=flops, bytes=0 if wanted else shape.bytes, facts=facts)


def prepared(shape, kernels, wanted, arguments):
    """Programs that compile and run, and why the others do not."""
    programs, refused = [], {}
    for kernel in (*kernels, "auto"):
        try:
            program = compiled(shape, kernel, wanted, arguments)
            program.warm_up()
        except KernelryError as error:
            refused[kernel] = {"refused": str(error)}
        except Exception as error:  # a vendor's compiler, or the memory: the others still count
            refused[kernel] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        else:
            programs.append(program)
    return programs, refused


def timed(shape, kernels, wanted, repeats):
    arguments = shape.arrays()
    programs, found = prepared(shape, kernels, wanted, arguments)
    rulers = list(baselines(shape.dtype))
    for ruler in rulers:
        ruler.warm_up()
    turns = [*programs, *rulers]
    for repeat in range(repeats):
        for program in turns[:: 1 if repeat % 2 else -1]:
            program.times.append(program.sample())
    found |= {program.name: program.to_json() for program in programs}
    return {"kernels": found} | {ruler.name: ruler.to_json() for ruler in rulers}


def conformance(kernels, quick):
    """Counts per kernel, and the cases that failed or were skipped."""
    from kernelry.testing.conformance import installed_spec, run
    from kernelry.testing.conformance.place import Place

    found = {}
    for name in kernels:
        spec = installed_spec(name)
        report = run(spec, quick=quick).to_json()
        odd = [case for case in report.pop("cases") if case["outcome"] not in ("passed", "refused", "skipped")]
        found[name] = report | {"interpreted": Place.of(spec).interpreted, "failures": odd}
        print(f"conformance {name}: {'ok' if report['ok'] else 'FAILED'} {report['counts']}", flush=True)
    return found


def machine():
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device_kind": HERE.device_kind,
        "platform": HERE.platform,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def show(name, what, found):
    for kernel, cell in found["kernels"].items():
        if "median_ms" in cell:
            said = (
                f"{cell['median_ms']:9.3f} ms {cell['tflop_per_s']:9.3f} TFLOP/s  {cell['kernel']} {cell['adapters']}"
            )
        else:
            said = next(iter(cell.items()))[0]
        print(f"{name:<24} {what:<17} {kernel:<22} {said}", flush=True)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = CPU if ON_CPU else ACCELERATOR
    parser.add_argument("--shapes", nargs="+", choices=sorted(CPU | ACCELERATOR), default=list(shapes), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="the quick conformance cases, and 7 samples, not 25")
    parser.add_argument("--no-conformance", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    return parser.parse_args()


def main():
    asked, about, kernels = parsed(), machine(), sorted(each.spec.name for each in kernelry.kernels())
    slug = re.sub(r"[^a-z0-9]+", "-", about["device_kind"].lower()).strip("-")
    path = asked.out / f"{slug}-{about['date'][:10]}.json"
    asked.out.mkdir(parents=True, exist_ok=True)
    report = about | {"conformance": None, "shapes": {}}

    def save():
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    for name in asked.shapes:
        shape = (CPU | ACCELERATOR)[name]
        report["shapes"][name] = dataclasses.asdict(shape) | {"forward_flops": shape.flops}
        for what in ("forward", "forward+backward") if shape.mode == "train" else ("forward",):
            found = timed(shape, kernels, what != "forward", 7 if asked.quick else 25)
            report["shapes"][name][what] = found
            show(name, what, found)
            save()  # a run that is stopped keeps what it measured
    if not asked.no_conformance:
        report["conformance"] = conformance(kernels, asked.quick)
    save()
    print(path)
    if any(not found["ok"] for found in (report["conformance"] or {}).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
