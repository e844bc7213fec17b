"""What a mesh costs on simulated CPU devices: bytes sent, from program text and by formula, and the wrap at P = 1.

Run: make benchmark. Times are of a CPU; bytes and counts are those of any device.
"""

import functools
import re
import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kernelry
from kernelry import masks
from kernelry.parallel import Sharding

B, T, N, K, H = 1, 8192, 8, 2, 64
WIDTH = {"f32": 4, "s32": 4}
REPEATS = 15

_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(.*"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def arrays(sharding=None):
    make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=sharding)
    return make((B, T, N, H)), make((B, T, K, H)), make((B, T, K, H))


def forward(query, key, value):
    return kernelry.attention(query, key, value, mask=masks.Causal(), kernel="blockwise")


def gradients(query, key, value):
    out, pull = jax.vjp(forward, query, key, value)
    return out, pull(jnp.cos(out))


@functools.cache
def mesh_of(devices):
    return jax.make_mesh((devices,), ("c",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def sent(compiled, devices):
    """Bytes that a device sends in one call, from the program's text; loops count as often as they run."""
    text = re.sub(r"/\*.*?\*/", "", compiled.as_text())
    bodies, name = {}, ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        name = head[1] if head else name
        bodies.setdefault(name, []).append(line)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]
    return _sent_in(bodies, entry, devices)


def _sent_in(bodies, name, devices):
    total = 0
    for line in bodies[name]:
        total += _bytes(line, devices)
        called = re.search(r" while\(.*body=%?([\w.\-]+)", line)
        if called:
            inside = _sent_in(bodies, called[1], devices)
            total += inside and int(_TRIPS.search(line)[1]) * inside
        for branch in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line) if " call(" in line else ():
            total += _sent_in(bodies, branch, devices)
    return total


def _bytes(line, devices):
    found = _COLLECTIVE.search(line)
    if not found:
        return 0
    sizes = []
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
        count = 1
        for size in shape.split(","):
            count *= int(size)
        sizes.append(count * WIDTH[kind])
    whole = sum(sizes)
    return {
        "collective-permute": whole,
        "all-gather": whole * (devices - 1) // devices,
        "all-to-all": whole * (devices - 1) // devices,
        "reduce-scatter": whole * (devices - 1),
        "all-reduce": 2 * whole * (devices - 1) // devices,
    }[found[2]]


def formula(strategy, devices):
    """Bytes that a device has to send, forward and backward together; a ring also sends keys again, as under remat."""
    tokens = T // devices
    keys, query = 2 * B * tokens * K * H * 4, B * tokens * N * H * 4
    repeats = next(r for r in range(1, N // K + 1) if K * r % devices == 0)
    if strategy == "all_gather":
        return (devices - 1) * (keys + keys)  # gradients are float32, as the keys are here
    if strategy == "ring":
        return (devices - 1) * keys + (devices - 1) * keys + devices * keys
    exchanged = 2 * query + repeats * keys  # query and output, or their gradients
    return 2 * exchanged * (devices - 1) // devices


def report_bytes():
    print(f"bytes a device sends, forward and backward, B{B} T{T} N{N} K{K} H{H} float32, causal")
    print(f"{'':<24}{'program':>12}{'formula':>12}{'ratio':>8}")
    for strategy in ("ring", "all_gather", "ulysses"):
        for devices in (2, 4, 8):
            mesh = mesh_of(devices)
            sharded = arrays(NamedSharding(mesh, P(None, "c")))
            with jax.set_mesh(mesh), kernelry.use(sharding=Sharding(sequence="c", strategy=strategy)):
                compiled = jax.jit(gradients).lower(*sharded).compile()
            own, expected = sent(compiled, devices), formula(strategy, devices)
            print(f"{f'{strategy}, {devices} devices':<24}{own:>12,}{expected:>12,}{own / expected:>8.2f}")


def milliseconds(functions):
    """Median and spread of each, run in turns."""
    times = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(found), min(found), max(found)) for name, found in times.items()}


def report_wrap():
    """The same call: plain, with a mesh of one device and a sharding, and inside a shard_map over one device."""
    shapes = [(1, 1024, *array.shape[2:]) for array in arrays()]
    given = [jax.random.normal(jax.random.key(place), shape) for place, shape in enumerate(shapes)]
    sharding = Sharding(batch="c", strategy="ring")

    def on_a_mesh(function):
        def run(*arguments):
            with jax.set_mesh(mesh_of(1)), kernelry.use(sharding=sharding):
                return function(*arguments)

        return run

    mapped = functools.partial(jax.shard_map, in_specs=P("c"), out_specs=P("c"), mesh=mesh_of(1), check_vma=False)

    def traced(function):
        return jax.jit(functools.partial(function)).trace(*given)  # new each time, so that no cache answers

    def inside(*arguments):
        return mapped(gradients)(*arguments)

    traces = {
        "plain": lambda: traced(gradients),
        "mesh of one device": on_a_mesh(lambda: traced(gradients)),
        "shard_map of one device": lambda: traced(inside),
    }
    plain, wrapped, of_one = jax.jit(gradients), jax.jit(gradients), jax.jit(inside)
    on_a_mesh(wrapped)(*given)
    runs = {
        "plain": lambda: jax.block_until_ready(plain(*given)),
        "mesh of one device": on_a_mesh(lambda: jax.block_until_ready(wrapped(*given))),
        "shard_map of one device": lambda: jax.block_until_ready(of_one(*given)),
    }
    for what, functions in (("trace", traces), ("run", runs)):
        for function in functions.values():
            function()
        found = milliseconds(functions)
        for name, (median, low, high) in found.items():
            more = f"{100 * (median / found['plain'][0] - 1):+.1f} %"
            print(f"{f'{what}, {name}':<40}{median:9.2f} ms  ({low:.2f} - {high:.2f})  {more}")


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    report_bytes()
    report_wrap()


if __name__ == "__main__":
    main()
