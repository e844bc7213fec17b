"""Writes `predictions.json` of kernelry-tpu-splash: what libtpu schedules for each chip, dtype, head dim and blocks.

    .venv-aot/bin/python tests/aot/splash_tilings.py splash-schedules.jsonl

The table holds bfloat16 for both kernels at head dims of 64, 128 and 256, and float32 for `splash` at 128; other head
dims count as the next larger ones there, and blocks of what is left are of 512. Takes two to ten seconds for each pass.
What has been compiled is kept in the file that is named, a line each, so that the command goes on where it was stopped;
a line of another compiler is not used. Passes that do not fit the vector memory are left out of the table.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax

import kernelry_tpu_splash

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from splash_passes import LENGTH, Pass, block_bytes, compiler, schedules

from kernelry.aot.speed import CLOCKS, CORES, STEP_CYCLES
from kernelry.aot.tpu_schedule import Region, Schedule
from kernelry.resolution.published import DEVICE_RATES

TABLE = Path(kernelry_tpu_splash.__file__).with_name("predictions.json")

KINDS = tuple(CLOCKS)
ASKED = (
    ("bfloat16", 128, ("splash", "tokamax_splash")),
    ("bfloat16", 64, ("splash", "tokamax_splash")),
    ("bfloat16", 256, ("splash", "tokamax_splash")),
    ("float32", 128, ("splash",)),
)
"""Dtype, head dim of queries and of values, and kernels."""

SMALL, LARGE, FINE = (512, 512, 512), (1024, 1024, 512), (1024, 1024, 256)
BLOCKS = {
    "splash": {
        "forward": (SMALL, LARGE, FINE),
        "dkv": (SMALL, LARGE),
        "dq": ((512, 512), (1024, 1024)),
        "fused": (SMALL, LARGE),
    },
    "tokamax_splash": {"forward": (SMALL, LARGE, FINE), "fused": (SMALL, LARGE)},
}
"""Queries, keys and keys multiplied at once. Blocks of 2048 are 2 % faster on v5e and v5p and take libtpu 40 seconds to
compile, and 2048/2048/512 does not fit their vector memory."""

_TOGETHER = 12
"""Passes that one process compiles."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="where schedules are kept, JSON lines")
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="compile for these TPUs alone; no table is written")
    arguments = parser.parse_args()
    passes = [
        Pass(kernel, part, kind, dtype, (dim, dim), blocks)
        for (dtype, dim, kernels), kind in itertools.product(ASKED, arguments.kinds)
        for kernel in kernels
        for part, several in BLOCKS[kernel].items()
        for blocks in several
    ]
    known = _read(arguments.kept)
    missing = [one for one in passes if one not in known]
    for start in range(0, len(missing), _TOGETHER):
        _compile(missing[start : start + _TOGETHER], arguments.kept)
    if tuple(arguments.kinds) == KINDS:
        _write(passes, _read(arguments.kept))


def _compile(batch, kept):
    while batch:
        done = []
        for one, schedule in schedules(batch):
            _keep(kept, one, schedule)
            done.append(one)
        if len(done) < len(batch):
            ended = batch[len(done)]
            _keep(kept, ended, "the compiler ended its process")
            done.append(ended)
        batch = batch[len(done) :]


def _keep(kept, one, schedule):
    found = schedule if isinstance(schedule, str) else dataclasses.asdict(schedule)
    with kept.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"compiler": compiler(), "pass": dataclasses.asdict(one), "schedule": found}) + "\n")
    sys.stdout.write(f"{one}: {found if isinstance(found, str) else schedule.body}\n")
    sys.stdout.flush()


def _read(kept):
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    entries = [entry for entry in map(json.loads, lines) if entry["compiler"] == compiler()]
    return {_pass(entry["pass"]): _schedule(entry["schedule"]) for entry in entries}


def _pass(facts):
    return Pass(**{**facts, "dims": tuple(facts["dims"]), "blocks": tuple(facts["blocks"])})


def _schedule(facts):
    if isinstance(facts, str):
        return facts
    bodies = [Region(**{**body, "busiest": tuple(body["busiest"])}) for body in facts["bodies"]]
    return Schedule(tuple(bodies), facts["overhead"], facts["row"], tuple(facts["bounds"]))


def _write(passes, known):
    table = {}
    for one in passes:
        schedule = known[one]
        if isinstance(schedule, str):
            continue
        kind = f"{one.kind} {one.dtype} {one.dims[0]}/{one.dims[1]}"
        rows = table.setdefault(one.kernel, {}).setdefault(one.part, {}).setdefault(kind, [])
        blocks = one.blocks if len(one.blocks) == 3 else (*one.blocks, one.blocks[1])
        step = schedule.overhead + STEP_CYCLES
        taken = max(max(body.cycles, body.mxu) for body in schedule.bodies)
        taken = max(taken, round(block_bytes(one) / _rate(one.kind)) - step)
        rows.append([*blocks, taken, step, schedule.row, round(one.seconds(schedule) * 1e6)])
    said = {
        "kind": "predicted: nothing was measured",
        "compiler": compiler(),
        "jax": jax.__version__,
        "rows": (
            "block_q, block_kv, block_kv_compute; cycles of a visited block, of a step, of a row of blocks; "
            f"microseconds of 64 heads over {LENGTH} tokens, causal"
        ),
        "bytes_per_cycle": {kind: round(_rate(kind), 1) for kind in KINDS},
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in said.items()]
    TABLE.write_text("\n".join(["{", *lines, ' "kernels": {', *_lines(table), " }", "}", ""]), encoding="utf-8")


def _lines(table):
    """A line for each kernel, pass, chip, dtype and dims."""
    kernels = []
    for kernel, parts in table.items():
        inside = []
        for part, kinds in parts.items():
            rows = ",\n".join(f"    {json.dumps(kind)}: {json.dumps(found)}" for kind, found in kinds.items())
            inside.append(f"   {json.dumps(part)}: {{\n{rows}\n   }}")
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(inside) + "\n  }")
    return [",\n".join(kernels)]


def _rate(kind):
    """Bytes that memory delivers to a core in one of its cycles."""
    return DEVICE_RATES[kind].bandwidth / CORES.get(kind, 1) / CLOCKS[kind]


if __name__ == "__main__":
    main()
