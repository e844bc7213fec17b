"""Times of GPU kernels that tokamax publishes in its wheel, kept as benchmarks/results/published-gpu.json.

Run: python benchmarks/published.py with tokamax 0.0.17 installed (Python 3.12); the file is then written again.
tokamax ships, for each call of its tuning, the tilings it tried with the milliseconds of each. Kept is the median of
the fastest tiling, of the calls without a bias. They are forward passes; some kernels have no time of some calls.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fitting import Order, mean, ranking

RELEASE = "0.0.17"
PATH = Path(__file__).parent / "results" / "published-gpu.json"
DEVICES = {"h100": "nvidia_h100_80gb_hbm3", "a100": "nvidia_a100-sxm4-40gb"}
OPERATIONS = {
    "cudnn": "jax_nn_dot_product_attention",
    "mosaic": "pallas_mosaic_gpu_flash_attention",
    "triton": "pallas_triton_flash_attention",
    "xla": "dot_product_attention",
}
KERNELS = {"cudnn_jax": "cudnn", "tokamax_mosaic": "mosaic", "pallas_flash": "triton"}
"""Ours, and the published one that each is compared by. tokamax's Triton kernel is not pallas_flash, but its kind."""

Published = dict[str, list[dict[str, Any]]]


def tables() -> Path | None:
    """The folder of the tables; None where this release of tokamax is not installed."""
    found = importlib.util.find_spec("tokamax")
    if found is None or metadata.version("tokamax") != RELEASE or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "data" / "autotuning"


def extracted(folder: Path) -> Published:
    """By device each call that two of the kernels or more have a time of."""
    return {device: list(_rows(folder / name)) for device, name in DEVICES.items()}


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    times: dict[str, dict[str, float]] = {}
    for kernel, operation in OPERATIONS.items():
        path = folder / f"{operation}.json"
        for call, tilings in json.loads(path.read_text(encoding="utf-8")).items() if path.exists() else ():
            medians = [
                statistics.median(each["evaluation_times_ms"])
                for each in tilings.values()
                if each["evaluation_times_ms"]
            ]
            if medians and not json.loads(call)["bias"]:
                times.setdefault(call, {})[kernel] = float(f"{min(medians):.4g}")
    for call in sorted(times):
        if len(times[call]) > 1:
            yield {"call": _short(json.loads(call)), "ms": times[call]}


def _short(call: dict[str, Any]) -> str:
    """Shapes, and what differs from the usual call."""
    usual = {"precision", "logits_dtype", "logits_scale", "bias", "dropout_mask", "dropout_rate", "paging_info"}
    left = {name: value for name, value in call.items() if name not in usual | {"mask", "q", "k", "v"}}
    left |= call["mask"]
    more = (f"{name}={json.dumps(value)}" for name, value in left.items() if value is not None)
    return " ".join((f"q={call['q']} k={call['k']} v={call['v']}", *more))


def read() -> Published:
    held: Published = json.loads(PATH.read_text(encoding="utf-8"))["devices"]
    return held


def ratio(rows: list[dict[str, Any]], kernel: str, other: str) -> float:
    """A published kernel's time over another's: the geometric mean over the calls that both have."""
    both = [row["ms"] for row in rows if {kernel, other} <= row["ms"].keys()]
    return mean(ms[kernel] / ms[other] for ms in both)


def dense_over_triton(length: int, dim: int) -> float:
    """On an H100, in the bfloat16 call of one sequence without a mask: XLA's dense attention over the Triton kernel."""
    size = f"bf16[1,{length},{2048 // dim},{dim}]"
    call = f"q={size} k={size} v={size} normalize_output=true return_residuals=false"
    times = next(row["ms"] for row in read()["h100"] if row["call"] == call)
    return float(times["xla"] / times["triton"])


def order(rows: list[dict[str, Any]], preferred: Order) -> Order:
    """Our kernels by the published times of what they are compared by, in the calls that all have; then the others."""
    names = {name: other for name, other in KERNELS.items() if any(other in row["ms"] for row in rows)}
    common = [row["ms"] for row in rows if set(names.values()) <= row["ms"].keys()]
    found = ranking([(0, {name: ms[other] for name, other in names.items()}) for ms in common], preferred)
    return (*found, *(name for name in preferred if name not in found))


def write(held: Published) -> None:
    rows = {
        device: "[\n   " + ",\n   ".join(json.dumps(row, sort_keys=True) for row in of_device) + "\n  ]"
        for device, of_device in held.items()
    }
    devices = ",\n  ".join(f"{json.dumps(device)}: {text}" for device, text in rows.items())
    source = json.dumps({"package": "tokamax", "version": RELEASE, "folder": "tokamax/data/autotuning"})
    text = f'{{\n "source": {source},\n "operations": {json.dumps(OPERATIONS)},\n "devices": {{\n  {devices}\n }}\n}}\n'
    PATH.write_text(text, encoding="utf-8")


def main() -> None:
    folder = tables()
    if folder is None:
        raise SystemExit(f"tokamax {RELEASE} is not installed here: pip install tokamax=={RELEASE} on Python 3.12.")
    write(extracted(folder))
    for device, rows in read().items():
        print(f"{device}: {len(rows)} calls; cudnn/triton {ratio(rows, 'cudnn', 'triton'):.3f}")


if __name__ == "__main__":
    main()
