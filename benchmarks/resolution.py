"""What choosing a kernel costs: imports, cached and uncached resolution, tracing. Run: make benchmark.

With `--against PATH` another source tree, e.g. a worktree of the last release, is measured in the same run: processes
of the two take turns, and each row ends in the ratio of the two, the median and spread over the pairs of processes.
"""

import argparse
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
REPEATS = 9
CALLS = 30
"""Of what takes a millisecond, in one process; the median counts."""
CACHED_CALLS = 5_000


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def typical(function, calls=CALLS):
    """Seconds of a call: the median."""
    function()
    return statistics.median(timed(function)[1] for _ in range(calls))


def mean(function, calls=CACHED_CALLS):
    """Seconds of a call that is too short to be timed alone."""
    return timed(lambda: [function() for _ in range(calls)])[1] / calls


def measure_once():
    """Measures everything in this process; returns seconds by name."""
    import jax
    import jax.numpy as jnp

    query = jax.ShapeDtypeStruct((1, 128, 8, 64), jnp.float32)
    jax.make_jaxpr(lambda q: jnp.einsum("bthd,bshd->bhts", q, q))(query)  # JAX's own first trace
    kernelry, found = timed(lambda: __import__("kernelry"))
    seconds = {"import kernelry, after import jax": found}
    (attention, masks), more = timed(lambda: (kernelry.attention, kernelry.masks))
    seconds["import kernelry, attention and masks"] = found + more
    mask = masks.Causal()
    first, traced = timed(lambda: jax.make_jaxpr(lambda q: attention(q, q, q, mask=mask))(query))
    assert first.out_avals
    seconds["import kernelry, and trace the first call"] = found + more + traced
    logging.getLogger("kernelry").setLevel(logging.ERROR)  # else each uncached resolution warns of its adapters
    return seconds | measure_resolution(kernelry) | measure_tracing(jax, kernelry, query)


def measure_resolution(kernelry):
    from kernelry.resolution import resolver

    masks, request_of = kernelry.masks, kernelry.Request
    packed = masks.Causal() & masks.Segments([0] * 200) & masks.Lengths([180])
    hard = {"q_len": 200, "q_heads": 8, "kv_heads": 2, "head_dim": 80, "mask": packed, "sinks": True}
    plain = request_of(q_len=1024, q_heads=8, mask=masks.Causal())
    asked = {"plain": plain} | {
        f"many adapters, {target}": request_of(target=target, dtype="float16", **hard)
        for target in ("cpu", "gpu:h100", "tpu:v5e")
    }

    def uncached(request):
        resolver.clear_cache()
        return kernelry.resolve(request)

    seconds = {f"resolve, uncached, {name}": typical(lambda r=r: uncached(r)) for name, r in asked.items()}
    explained = lambda r: kernelry.explain(r, changes=False).explain()  # noqa: E731
    seconds["explain, uncached, many adapters, tpu:v5e"] = typical(
        lambda: (resolver.clear_cache(), explained(asked["many adapters, tpu:v5e"]))
    )
    fresh = iter([request_of(q_len=1024, q_heads=8, mask=plain.mask) for _ in range(CACHED_CALLS)])
    seconds["resolve, a request seen before"] = mean(lambda: kernelry.resolve(plain))
    seconds["resolve, a fresh equal request"] = mean(lambda: kernelry.resolve(next(fresh)))
    seconds["build a request"] = mean(lambda: request_of(q_len=1024, q_heads=8, mask=plain.mask))
    return seconds


def measure_tracing(jax, kernelry, query):
    from kernelry.plugin import Inputs

    mask = kernelry.masks.Causal()
    request = kernelry.Request(q_len=128, q_heads=8, mask=mask)
    plan = kernelry.resolve(request, kernel="dot_product").plan
    body = plan.kernel.body()

    lengths = itertools.count(129)

    def first_of_its_length():
        longer = jax.ShapeDtypeStruct((1, next(lengths), 8, 64), query.dtype)
        return jax.make_jaxpr(attention())(longer)

    # New functions each time, so that JAX's own cache does not answer.
    def attention():
        return lambda q: kernelry.attention(q, q, q, mask=mask)

    def bare():
        inputs = lambda q: Inputs(q, q, q, mask.canonical())  # noqa: E731
        return lambda q: body.forward(inputs(q), request, plan.tiling, statistics=False).out

    def gradient():
        return jax.grad(lambda q: kernelry.attention(q, q, q, mask=mask).sum())

    return {
        "trace attention, a new length each time": typical(first_of_its_length),
        "trace attention": typical(lambda: jax.make_jaxpr(attention())(query)),
        "trace attention, jitted": typical(lambda: jax.jit(attention()).trace(query)),
        "trace the gradient of attention": typical(lambda: jax.make_jaxpr(gradient())(query)),
        "trace the same kernel alone": typical(lambda: jax.make_jaxpr(bare())(query)),
        "trace the identity, jitted": typical(lambda: jax.jit(lambda q: q).trace(query)),
    }


def measure_tree(tree, bytecode):
    """Measures a source tree in a process of its own; returns seconds by name."""
    sources = (str(folder) for folder in (tree / "core" / "src", *sorted(tree.glob("plugins/*/src"))))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("KERNELRY_", "PYTHON"))}
    environ |= {"PYTHONPATH": os.pathsep.join(sources), "PYTHONPYCACHEPREFIX": bytecode, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).resolve()), "--once"]
    return json.loads(subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True).stdout)


def shown(seconds):
    unit, factor = ("ms", 1e3) if statistics.median(seconds) >= 2e-3 else ("µs", 1e6)
    low, middle, high = (factor * number for number in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:8.2f} {unit}  ({low:.2f} – {high:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="PATH", help="another source tree, measured in turns")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="processes of each tree")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure_once()))
        return
    trees = [HERE] + ([] if options.against is None else [options.against.resolve()])
    with tempfile.TemporaryDirectory() as bytecode:
        for tree in trees:
            measure_tree(tree, bytecode)  # compiles the modules
        rounds = [[measure_tree(tree, bytecode) for tree in trees] for _ in range(options.repeats)]
    for name in rounds[0][0]:
        columns = [[found[i][name] for found in rounds] for i in range(len(trees))]
        line = f"{name:<42} " + "  ".join(f"{shown(column):<34}" for column in columns)
        if len(columns) > 1:
            ratios = list(itertools.starmap(lambda own, other: own / other, zip(*columns, strict=True)))
            line += f"  {statistics.median(ratios):.2f}  ({min(ratios):.2f} – {max(ratios):.2f})"
        print(line)


if __name__ == "__main__":
    main()
