"""Devices that are described, not present."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

from kernelry.aot.devices import FIGURES
from kernelry.errors import ConfigError, nearest
from kernelry.target import Target

_TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""libtpu looks for a machine's metadata and locks its TPUs; where there are none, it need not say so."""


def topology_of(target: Target | str) -> tuple[Any, ...]:
    """Returns the devices of a target, as the vendor's compiler describes them.

    Args:
      target: `tpu:kind` or `tpu:kind:topology`, e.g. `tpu:v5e:2x2`; without a topology the smallest one.

    Raises:
      ConfigError: the target names no device to compile for, or the vendor's compiler is not installed.
    """
    where = Target.parse(target) if isinstance(target, str) else target
    if where.platform != "tpu":
        raise ConfigError(f"target {str(where)!r}: programs are compiled ahead of time for tpu:kind, e.g. tpu:v5e:2x2.")
    if where.kind not in FIGURES:
        known = ", ".join(f"tpu:{kind}" for kind in FIGURES)
        raise ConfigError(
            f"target {str(where)!r} names no kind of TPU to compile for{nearest(str(where.kind), FIGURES)} ({known})."
        )
    name = f"{where.kind}:{where.topology}" if where.topology else FIGURES[where.kind].topology
    return _tpu_devices(name)


@functools.lru_cache(maxsize=16)
def _tpu_devices(name: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs needs libtpu, their compiler; pip install 'kernelry[aot-tpu]'.")
    if not _has_tpus():
        for variable, value in _TPU_SETTINGS.items():
            os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise ConfigError(f"target 'tpu:{name}': libtpu knows no such topology ({_first_line(error)}).") from error
    return tuple(described.devices)


def _has_tpus() -> bool:
    """Whether Linux shows accelerators of the kind: their files are /dev/accel0 or /dev/vfio/0, and so on."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
