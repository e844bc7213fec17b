"""TPUs that are described, not present, by libtpu."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

from kernelry.aot.outcome import NoCompilerError
from kernelry.errors import ConfigError
from kernelry.request.target import Target

SLICES: dict[str, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""The smallest slice of each kind that libtpu describes, in its own words."""

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""libtpu looks for a machine's metadata and locks its TPUs; where there are none, it need not say so."""


def tpus_of(target: Target) -> tuple[Any, ...]:
    """Returns the chips of a slice, without a topology of the smallest.

    Args:
      target: `tpu:kind` or `tpu:kind:topology`, of a kind in `SLICES`.

    Raises:
      NoCompilerError: libtpu is not installed.
      ConfigError: libtpu has no such slice.
    """
    return _described(f"{target.kind}:{target.topology}" if target.topology else SLICES[str(target.kind)])


@functools.lru_cache(maxsize=16)
def _described(name: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompilerError("compiling for TPUs needs libtpu, their compiler; pip install 'kernelry[aot-tpu]'.")
    if not _has_tpus():
        for variable, value in _SETTINGS.items():
            os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise ConfigError(f"target 'tpu:{name}': libtpu has no such topology ({_first_line(error)}).") from error
    return tuple(described.devices)


def _has_tpus() -> bool:
    """Whether Linux shows accelerators of the kind: their files are /dev/accel0 or /dev/vfio/0, and so on."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
