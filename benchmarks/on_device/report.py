"""The report of a run: what it holds, and how it reaches the disk at every step."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import re
import threading
from pathlib import Path
from typing import Any

import jax

from on_device.clock import elapsed
from on_device.shapes import SHAPES
from on_device.targets import targets

_PACKAGES = (
    "jax", "jaxlib", "numpy", "kernelry", "tokamax", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "transformer_engine", "transformer_engine_jax", "libtpu",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Device and versions."""
    here = jax.devices()[0]
    return {
        "device_kind": here.device_kind,
        "platform": here.platform,
        "platform_version": " ".join(here.client.platform_version.split()),
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Report:
    """What was found so far, and what was planned. Two threads write it: the run, and the clock that ends it."""

    def __init__(self, folder: Path, about: dict[str, Any], plan: list[str]) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", about["device_kind"].lower()).strip("-")
        self.path = folder / f"{slug}-{about['date'][:10]}.json"
        self.data: dict[str, Any] = about | {"conformance": {}, "shapes": {}, "targets": [], "not_reached": []}
        self.lock = threading.RLock()
        self._plan = dict.fromkeys(plan)
        folder.mkdir(parents=True, exist_ok=True)

    def tick(self, step: str) -> None:
        """A step of the plan is done."""
        self._plan.pop(step)

    def add_conformance(self, kernel: str, found: dict[str, Any]) -> None:
        with self.lock:
            self.data["conformance"][kernel] = found
            self._write()

    def add_cell(self, shape: str, which: str, cell: dict[str, Any]) -> None:
        with self.lock:
            about = self.data["shapes"].setdefault(shape, SHAPES[shape].to_json() | {"passes": {}})
            about["passes"][which] = cell
            self._write()

    def add_failure(self, step: str, reason: str) -> None:
        with self.lock:
            self.data.setdefault("failures", {})[step] = reason
            self._write()

    def close(self) -> None:
        """Adds the targets, what was not reached, and how long it took."""
        with self.lock:
            self.data |= {"targets": targets(self.data), "not_reached": [*self._plan, *_cut_short(self.data)]}
            self.data["seconds"] = round(elapsed(), 1)
            self._write()

    @property
    def wrong(self) -> list[str]:
        """What fails the run: the kit's findings, and kernels that computed something else."""
        failed = [f"conformance of {name}" for name, found in self.data["conformance"].items() if not found["ok"]]
        timed = [
            f"{shape} {which}: {name}"
            for shape, about in self.data["shapes"].items()
            for which, cell in about["passes"].items()
            for name, found in cell["programs"].items()
            if found["kind"] == "kernel" and found.get("wrong")
        ]
        return [*failed, *timed, *self.data.get("failures", {})]

    def _write(self) -> None:
        part = self.path.with_suffix(".part")  # a run that is stopped leaves the last whole report
        part.write_text(json.dumps(self.data, indent=2) + "\n", encoding="utf-8")
        part.replace(self.path)


def _cut_short(data: dict[str, Any]) -> list[str]:
    kit = [
        f"conformance {name}: {len(found['not_reached'])} of {found['cases']} cases"
        for name, found in data["conformance"].items()
        if found["not_reached"]
    ]
    late = [
        f"{shape} {which}: {name}"
        for shape, about in data["shapes"].items()
        for which, cell in about["passes"].items()
        for name, found in cell["programs"].items()
        if found.get("absent") == "not reached"
    ]
    return [*kit, *late]


def cell_lines(shape: str, which: str, cell: dict[str, Any]) -> list[str]:
    """For a terminal: a line for each kernel and peer, the fastest first."""
    order = sorted(cell["programs"].items(), key=lambda item: item[1].get("median_ms", math.inf))
    return [f"{shape:<20} {which:<17} {name:<16} {_said(found)}" for name, found in order]


def _said(found: dict[str, Any]) -> str:
    if "absent" in found:
        return f"{found['absent']}: {found['reason']}"[:150]
    speed = f"{found['median_ms']:9.3f} ms {found['tflop_per_s']:8.3f} TFLOP/s"
    rate = f"{speed} {found['of_matrix_product']:6.1%} of a product"
    copy = f" {found['of_copy']:6.1%} of a copy" if "of_copy" in found else ""
    error = f", error {max(found['relative_error'].values()):.1e}{' WRONG' if found['wrong'] else ''}"
    kernel = f", {' + '.join([*found['adapters'], found['kernel']])}" if "adapters" in found else ""
    return rate + copy + error + kernel
