"""NVIDIA GPUs that are described, not present, to the compilers of XLA and Triton."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any, final

from kernelry.aot.devices import FIGURES
from kernelry.aot.outcome import NoCompilerError
from kernelry.errors import ConfigError
from kernelry.request.target import Target


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """What the compilers need to know about a GPU.

    Args:
      name: JAX's `device_kind`.
      capability: CUDA compute capability, major and minor.
      accelerated: whether its compute capability has a variant with instructions of its own, e.g. 9.0a.
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      shared_memory: bytes of each.
      block_memory: bytes of it that one block of threads may ask for.
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
"""The version of cuDNN that programs are compiled for; nothing of it is loaded."""

_COMPILERS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_ASSEMBLER_MISSING = "No PTX compilation provider is available"


def gpus_of(target: Target) -> tuple[Any, ...]:
    """Returns GPUs of a host, without a number one.

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
    return _described(str(target.kind), int(number))


def check_assembler(error: Exception) -> None:
    """Raises NoCompilerError where a compiler's error is that CUDA's assembler is missing, which no program causes."""
    if _ASSEMBLER_MISSING in str(error):
        raise NoCompilerError(
            "compiling for NVIDIA GPUs needs ptxas, CUDA's assembler, and none was found; "
            "pip install 'kernelry[aot-gpu]', or put a CUDA toolkit's into PATH."
        ) from error


@functools.lru_cache(maxsize=16)
def _described(kind: str, number: int) -> tuple[Any, ...]:
    if not any(_is_installed(module) for module in _COMPILERS):
        raise NoCompilerError(
            "compiling for NVIDIA GPUs needs JAX's CUDA plugin, which holds XLA's and Triton's compilers; "
            "pip install 'kernelry[aot-gpu]'."
        )
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"{kind}:{number}",
            target_config=GPUS[kind].description(FIGURES[kind].bandwidth),
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
