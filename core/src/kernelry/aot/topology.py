"""Devices that are described, not present."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from kernelry.aot.gpus import GPUS, gpus_of
from kernelry.aot.tpus import SLICES, tpus_of
from kernelry.errors import ConfigError, nearest
from kernelry.request.target import Target

_DESCRIBED: dict[str, tuple[Collection[str], Callable[[Target], tuple[Any, ...]]]] = {
    "tpu": (SLICES, tpus_of),
    "gpu": (GPUS, gpus_of),
}


def topology_of(target: Target | str) -> tuple[Any, ...]:
    """Returns the devices of a target, as the vendor's compiler describes them.

    Args:
      target: `tpu:kind[:slice]`, e.g. `tpu:v5e:2x2`, without a slice the smallest one; or `gpu:kind[:number]`, e.g.
        `gpu:h100:4`, without a number one GPU.

    Raises:
      NoCompilerError: the vendor's compiler is not installed.
      ConfigError: the target names no device to compile for.
    """
    where = Target.parse(target) if isinstance(target, str) else target
    if where.platform not in _DESCRIBED:
        raise ConfigError(
            f"target {str(where)!r}: programs are compiled ahead of time for tpu:kind and gpu:kind, "
            "e.g. tpu:v5e:2x2 or gpu:h100."
        )
    kinds, devices_of = _DESCRIBED[where.platform]
    if where.kind not in kinds:
        known = ", ".join(f"{where.platform}:{kind}" for kind in kinds)
        raise ConfigError(
            f"target {str(where)!r} names no kind of {where.platform.upper()} to compile for"
            f"{nearest(str(where.kind), kinds)} ({known})."
        )
    return devices_of(where)
