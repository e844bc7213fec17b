"""Writes `predictions.json` of kernelry-tpu-flywheel: microseconds of a head that libtpu schedules, next to splash's.

    .venv-aot-312/bin/python tests/aot/flywheel_schedules.py flywheel-schedules.jsonl

Causal attention over 8,192 tokens in bfloat16, each kernel with its default blocks for the chip, all by one compiler.
Rows of windows are kept as they are: which of flywheel's bodies their blocks run is not written down, and was read from
the same compiler's bundles by hand. What has been compiled is kept in the file that is named, a line each, so that the
command goes on where it was stopped; it prints a table and takes half an hour.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import jax

import kernelry_tpu_flywheel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import flywheel_passes
import splash_passes

TABLE = Path(kernelry_tpu_flywheel.__file__).with_name("predictions.json")
KINDS = ("v5e", "v6e", "tpu7x")
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
KERNELS = ("flywheel", "splash", "tokamax_splash")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="where microseconds are kept, JSON lines")
    kept = parser.parse_args().kept
    known = dict(_read(kept))
    asked = list(itertools.product(KINDS, ("forward", "backward"), DIMS))
    for row, kernel in itertools.product(asked, KERNELS):
        name = json.dumps([splash_passes.compiler(), kernel, *row])
        if name not in known:
            known[name] = _microseconds(kernel, *row)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, known[name]]) + "\n")
    rows = []
    for row in asked:
        kind, part, (head_dim, value_dim) = row
        times = {kernel: known[json.dumps([splash_passes.compiler(), kernel, *row])] for kernel in KERNELS}
        times = {kernel: round(time, 1) for kernel, time in times.items() if time is not None}
        facts = {"target": kind, "pass": part, "mask": "causal", "window": None, "length": flywheel_passes.LENGTH}
        dims = {"head_dim": head_dim, "value_dim": value_dim, "dtype": "bfloat16"}
        rows.append(json.dumps({**facts, **dims, "kernels": times}))
        sys.stdout.write(f"{kind:5} {part:8} {head_dim:3}/{value_dim:<3} {times}\n")
    rows += [json.dumps(row) for row in json.loads(TABLE.read_text())["rows"] if row["mask"] == "window"]
    facts = {
        "compiler": splash_passes.compiler(),
        "jax": jax.__version__,
        "unit": "microseconds of one head, on one core",
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in facts.items()]
    TABLE.write_text("\n".join(["{", *lines, ' "rows": [', ",\n".join(f"  {row}" for row in rows), " ]", "}", ""]))


def _read(kept):
    return [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []


def _microseconds(kernel, kind, part, dims):
    """None where a pass does not compile."""
    if kernel == "flywheel":
        [(one, bundles, _)] = flywheel_passes.compiled([flywheel_passes.Pass(part, kind, dims)])
        return None if bundles is None else one.microseconds(bundles)
    times = []
    for one, found in splash_passes.schedules(splash_passes.default_passes(kernel, part, kind, dims)):
        if isinstance(found, str):
            return None
        times.append(one.seconds(found))
    return sum(times) / splash_passes.HEADS * 1e6


if __name__ == "__main__":
    main()
