"""What this machine has: accelerators as JAX sees them, their drivers, and the compilers that `kernelry check` uses.

Versions are read from files and from the metadata of what is installed; no vendor's library is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import importlib_metadata
import jax

from kernelry.aot.devices import NoCompilerError, has_tpus
from kernelry.aot.gpu_code import tool, tool_version
from kernelry.request.target import Target

_GIB = 2**30
_NVIDIA = Path("/proc/driver/nvidia/version")
"""Where the kernel module of NVIDIA says its version, on Linux."""

_PACKAGES = (
    ("JAX's CUDA plugin", ("jax-cuda13-plugin", "jax-cuda12-plugin")),
    ("CUDA runtime", ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")),
    ("cuDNN", ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")),
    ("libtpu", ("libtpu",)),
)
"""What JAX's backends for accelerators are made of, and the distributions that bring it."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
    """Devices of one kind, as JAX sees them.

    Args:
      target: kernelry's name, e.g. `gpu:h100`.
      kind: JAX's name.
      count: how many there are of this process.
      memory: bytes that JAX may take of each; None where it does not say.
      runtime: what runs them, as JAX says it, e.g. `cuda 13000`.
    """

    target: str
    kind: str
    count: int
    memory: int | None
    runtime: str

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", JAX may take {self.memory / _GIB:.1f} GiB of each"
        return f"{self.count} × {self.kind} ({self.target}){memory}; {self.runtime}"


def accelerators() -> tuple[Accelerator, ...]:
    """Returns the devices of JAX's default backend, unless they are the CPU's; none where JAX can use no device."""
    try:
        devices = jax.local_devices()
    except Exception:  # see backend_fault
        return ()
    by_kind: dict[tuple[str, str], list[Any]] = {}
    for device in devices:
        if device.platform != "cpu":
            by_kind.setdefault((device.platform, device.device_kind), []).append(device)
    return tuple(
        Accelerator(
            str(Target.of_device(platform, kind)),
            kind,
            len(found),
            _memory(found[0]),
            " ".join(found[0].client.platform_version.split()),
        )
        for (platform, kind), found in by_kind.items()
    )


def _memory(device: Any) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a backend that keeps no statistics says so in its own way
        return None


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Driver:
    """A version of a driver or of a library that JAX's backends use, and the file or distribution that says it."""

    name: str
    version: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}, says {self.source}"


def drivers() -> tuple[Driver, ...]:
    """Returns those that are here."""
    return tuple(_drivers())


def _drivers() -> Iterator[Driver]:
    with contextlib.suppress(OSError):
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", _NVIDIA.read_text(encoding="utf-8", errors="replace"))
        yield Driver("NVIDIA driver", found[1] if found else "of unknown version", str(_NVIDIA))
    for name, distributions in _PACKAGES:
        for distribution in distributions:
            if (version := _version(distribution)) is not None:
                yield Driver(name, version, distribution)


def _version(distribution: str) -> str | None:
    try:
        return importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        return None


def unused() -> tuple[str, ...]:
    """Says of accelerators that the system lists and JAX does not use, what to do."""
    platforms = {accelerator.target.partition(":")[0] for accelerator in accelerators()}
    named = jax.config.jax_platforms  # type: ignore[attr-defined]
    otherwise = f", and unset JAX_PLATFORMS={named}" if named else ""
    found = []
    if _NVIDIA.exists() and "gpu" not in platforms:
        found.append(f"there is an NVIDIA driver, and JAX uses no GPU: pip install 'jax[cuda13]'{otherwise}")
    if has_tpus() and "tpu" not in platforms:
        found.append(f"there are TPUs, and JAX uses none: pip install 'jax[tpu]'{otherwise}")
    return tuple(found)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Compiler:
    """A compiler that `kernelry check` uses.

    Args:
      name: e.g. `ptxas`.
      serves: what it is for.
      version: None where it is missing, or does not say.
      path: where it was found; None where it is a Python package, or missing.
      fix: what to do where it is missing; None where it is here.
    """

    name: str
    serves: str
    version: str | None
    path: str | None
    fix: str | None

    def __str__(self) -> str:
        if self.fix is not None:
            return f"{self.name}, {self.serves}: missing; {self.fix}"
        return f"{self.name} {self.version or ''}".rstrip() + f", {self.serves}" + (f": {self.path}" * bool(self.path))


def compilers() -> tuple[Compiler, ...]:
    """Returns each, whether it is here or missing."""
    gpu = "pip install 'kernelry[aot-gpu]'"
    return (
        _package("libtpu", "for TPUs", ("libtpu",), "pip install 'kernelry[aot-tpu]'"),
        _package(
            "JAX's CUDA plugin", "for GPUs: XLA's and Triton's compilers", dict(_PACKAGES)["JAX's CUDA plugin"], gpu
        ),
        _program("ptxas", "for GPUs: CUDA's assembler", gpu),
        _program("nvdisasm", "for GPUs: reads machine code, for static speeds", "pip install nvidia-cuda-nvdisasm"),
    )


def _package(name: str, serves: str, distributions: tuple[str, ...], fix: str) -> Compiler:
    version = next((found for each in distributions if (found := _version(each)) is not None), None)
    return Compiler(name, serves, version, None, None if version else fix)


def _program(name: str, serves: str, fix: str) -> Compiler:
    try:
        path = tool(name, "")
    except NoCompilerError:
        return Compiler(name, serves, None, None, fix)
    return Compiler(name, serves, tool_version(path), str(path), None)
