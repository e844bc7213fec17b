"""What the benchmarks share: ratios of times that were taken in turns, rounding, and the facts about this machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernelry.bench.turns import quartiles


def ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of times that were taken in the same turns."""
    return quartiles([one / other for one, other in zip(over, under, strict=False)])


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    """As many significant digits, for JSON."""
    return [float(f"{value:.{digits}g}") for value in values]


def facts(*distributions: str) -> dict[str, Any]:
    """The day, the CPU with what it can do, and the versions of these distributions."""
    versions = {"python": platform.python_version()}
    for name in distributions:
        versions[name] = importlib.metadata.version(name)
    return {"date": datetime.date.today().isoformat(), "cpu": _cpu(), "cores": os.cpu_count(), "versions": versions}


def _cpu() -> dict[str, Any]:
    """Its model and the vector extensions that matter here, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"model": platform.processor() or platform.machine(), "features": []}
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", told.get("Features", "")).split()
    wanted = ("avx", "fma", "amx", "asimd", "sve", "bf16")
    return {
        "model": told.get("model name", platform.machine()),
        "features": sorted(flag for flag in flags if flag.startswith(wanted)),
    }
