"""Devices that are described to the vendors' compilers and need not be present."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, final

from kernelry.errors import ConfigError, nearest
from kernelry.request.target import Target
from kernelry.resolution.published import DEVICE_RATES


@final
class NoCompilerError(ConfigError):
    """The compiler of a target is not installed, or cannot be loaded; the message says what to do."""


SLICES: dict[str, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""The smallest slice of each kind that libtpu describes, by libtpu's name for it."""

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Keep libtpu from looking for a machine's metadata, and from locking and reporting on TPUs where there are none."""


def tpus_of(target: Target) -> tuple[Any, ...]:
    """Returns the chips of a slice; of the smallest one where the target has no topology.

    Args:
      target: `tpu:kind` or `tpu:kind:topology`, of a kind in `SLICES`.

    Raises:
      NoCompilerError: libtpu is not installed.
      ConfigError: libtpu has no such slice.
    """
    return _described_tpus(f"{target.kind}:{target.topology}" if target.topology else SLICES[str(target.kind)])


@functools.lru_cache(maxsize=16)
def _described_tpus(name: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompilerError("compiling for TPUs needs libtpu, their compiler; pip install 'kernelry[aot-tpu]'.")
    if not has_tpus():
        for variable, value in _SETTINGS.items():
            os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise ConfigError(f"target 'tpu:{name}': libtpu has no such topology ({_first_line(error)}).") from error
    return tuple(described.devices)


def has_tpus() -> bool:
    """Whether Linux lists TPUs, whose files are /dev/accel0 or /dev/vfio/0, and so on."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """What the compilers need to know about a GPU.

    Args:
      name: JAX's `device_kind`.
      capability: CUDA compute capability, major and minor.
      accelerated: whether its compute capability has a variant with additional instructions, e.g. 9.0a.
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      shared_memory: bytes of each.
      block_memory: the bytes of it that one block of threads may request.
      cache: bytes of the L2 cache.
      clock: GHz.
      memory: bytes of main memory.
    """

    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    lanes: int
    shared_memory: int
    block_memory: int
    cache: int
    clock: float
    memory: int

    def description(self, bandwidth: float) -> str:
        """Returns XLA's GpuTargetConfigProto as text.

        Args:
          bandwidth: of main memory, bytes/s.
        """
        major, minor = self.capability
        extension = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
        facts = {
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "shared_memory_per_core": self.shared_memory,
            "shared_memory_per_block_optin": self.block_memory,
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "memory_bandwidth": round(bandwidth),
            **_LIMITS,
        }
        return "\n".join(
            (
                "gpu_device_info {",
                *(f"  {field}: {value}" for field, value in facts.items()),
                f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}",
                "}",
                'platform_name: "CUDA"',
                f"dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}",
                f'device_description_str: "{self.name}"',
            )
        )


GPUS: dict[str, Gpu] = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 167936, 166912, 41943040, 1.41, 85100068864),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 233472, 232448, 52428800, 1.98, 84942979072),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", (9, 0), True, 132, 128, 233472, 232448, 52428800, 1.98, 151397597184),
    "b200": Gpu("NVIDIA B200", (10, 0), True, 148, 128, 233472, 232448, 132644864, 1.965, 191514411008),
}
"""Source: the device descriptions in XLA's repository, xla/backends/gpu/target_config/specs, of the SXM modules."""

_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 49152,
}
"""The same for compute capabilities 8.0 to 10.0; CUDA's programming guide, table of technical specifications."""

_CUDNN = (9, 10)
"""The version of cuDNN that programs are compiled for; cuDNN itself is not loaded."""

_COMPILERS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_ASSEMBLER_MISSING = "No PTX compilation provider is available"


def gpus_of(target: Target) -> tuple[Any, ...]:
    """Returns the GPUs of a host; one where the target gives no number.

    Args:
      target: `gpu:kind` or `gpu:kind:number`, of a kind in `GPUS`.

    Raises:
      NoCompilerError: the compilers are not installed or did not load.
      ConfigError: the topology is not a number.
    """
    number = target.topology or "1"
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            f"target {str(target)!r}: the topology of GPUs is how many there are, got {number!r}; "
            f"e.g. gpu:{target.kind}:4."
        )
    return _described_gpus(str(target.kind), int(number))


def check_assembler(error: Exception) -> None:
    """Raises NoCompilerError where the error is that CUDA's assembler is missing, which is not the program's fault."""
    if _ASSEMBLER_MISSING in str(error):
        raise NoCompilerError(
            "compiling for NVIDIA GPUs needs ptxas, CUDA's assembler, and none was found; "
            "pip install 'kernelry[aot-gpu]', or put a CUDA toolkit's into PATH."
        ) from error


@functools.lru_cache(maxsize=16)
def _described_gpus(kind: str, number: int) -> tuple[Any, ...]:
    if not any(_is_installed(module) for module in _COMPILERS):
        raise NoCompilerError(
            "compiling for NVIDIA GPUs needs JAX's CUDA plugin, which has XLA's and Triton's compilers; "
            "pip install 'kernelry[aot-gpu]'."
        )
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"{kind}:{number}",
            target_config=GPUS[kind].description(DEVICE_RATES[kind].bandwidth),
            topology=f"1x1x{number}",
        )
    except NotImplementedError as error:  # JAX logged why its plugin did not load
        raise NoCompilerError(
            "compiling for NVIDIA GPUs needs JAX's CUDA plugin, which is installed but did not load: unless "
            "JAX_PLATFORMS names other platforms, it needs all of CUDA's libraries; set JAX_PLATFORMS=cpu."
        ) from error
    return tuple(described.devices)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # no plugin of JAX is installed at all
        return False


_DESCRIBED: dict[str, tuple[Collection[str], Callable[[Target], tuple[Any, ...]]]] = {
    "tpu": (SLICES, tpus_of),
    "gpu": (GPUS, gpus_of),
}


def topology_of(target: Target | str) -> tuple[Any, ...]:
    """Returns the devices of a target, as the vendor's compiler describes them.

    Args:
      target: `tpu:kind[:slice]`, e.g. `tpu:v5e:2x2`, the smallest slice by default; or `gpu:kind[:number]`, e.g.
        `gpu:h100:4`, one GPU by default.

    Raises:
      NoCompilerError: the vendor's compiler is not installed.
      ConfigError: the target does not name a device to compile for.
    """
    where = Target.parse(target)
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
