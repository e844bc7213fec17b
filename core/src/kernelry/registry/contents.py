"""What the installed plugins provide, and what is wrong with them, as data."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import jax

from kernelry.errors import ConfigError, PluginError, followed, nearest, sentence
from kernelry.execution.normalization import Normalization
from kernelry.kernel.spec import KernelSpec
from kernelry.masks.base import Mask
from kernelry.policy.lock import Lock
from kernelry.policy.policy import KNOWN_SWITCHES, Switches
from kernelry.request.target import home_target


@final
class FaultKind(enum.Enum):
    """What is wrong with a plugin or an environment variable."""

    IMPORT_ERROR = "import error"
    ENTRY_POINT = "wrong entry point"
    CONTRACT = "unsupported contract"
    UNKNOWN_HOOK = "unknown hook"
    UNMARKED_HOOK = "unmarked hook"
    HOOK_SIGNATURE = "wrong hook signature"
    HOOK_RAISED = "exception in a hook"
    WRONG_RETURN = "wrong return type"
    WRONG_SPEC = "kernel that cannot be used"
    DECLARATION = "declaration that no request meets"
    DUPLICATE_PLUGIN = "two plugins with one name"
    DUPLICATE_KERNEL = "kernel name claimed twice"
    DUPLICATE_NAME = "mask or normalization name claimed twice"
    UNKNOWN_IN_ALLOW_LIST = "unknown name in KERNELRY_PLUGINS"
    SWITCH = "wrong environment variable"


_ENVIRONMENT = "the environment"
"""Given as the distribution in faults of environment variables."""

_NVIDIA = "an NVIDIA GPU and pip install 'jax[cuda12]' or 'jax[cuda13]'"
_NEEDED_BY = {
    "cpu": "",
    "tpu": "a TPU and pip install 'jax[tpu]'",
    "cuda": _NVIDIA,
    "gpu": f"an AMD GPU with JAX's plugin for ROCm, or {_NVIDIA}",
    "rocm": "an AMD GPU and JAX's plugin for ROCm",
}
"""What each name that JAX_PLATFORMS may hold needs."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with a plugin, or with the environment variable `plugin`, and what to do about it."""

    kind: FaultKind
    plugin: str
    distribution: str
    detail: str
    fix: str

    def __str__(self) -> str:
        return followed(f"{self.plugin} [{self.distribution}]: {self.kind.value}: {self.detail}", self.fix)

    def to_json(self) -> dict[str, str]:
        """Returns plain data."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was found."""

    name: str
    distribution: str
    module: str
    enabled: bool
    kernels: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return dataclasses.asdict(self)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class InstalledKernel:
    """A kernel and the distribution it came from."""

    spec: KernelSpec
    plugin: str
    distribution: str

    @property
    def name(self) -> str:
        """How users ask for it."""
        return self.spec.name


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Registry:
    """Everything that the installed plugins provide.

    Args:
      kernels: by name; names claimed twice are left out.
      contested: names claimed twice, with the distributions that claim them.
      unusable: names of kernels that were left out, with the reason and the fix.
      plugins: every plugin found, enabled or not.
      faults: what is wrong.
      masks: mask classes of plugins, by name.
      normalizations: by name, core's included.
      rankers: the votes of plugins, by plugin name.
      observers: the observers of plugins, by plugin name.
    """

    kernels: Mapping[str, InstalledKernel]
    contested: Mapping[str, tuple[str, ...]]
    unusable: Mapping[str, str]
    plugins: tuple[Plugin, ...]
    faults: tuple[Fault, ...]
    masks: Mapping[str, type[Mask]]
    normalizations: Mapping[str, Normalization]
    rankers: Mapping[str, Callable[..., Any]]
    observers: Mapping[str, Callable[..., Any]]

    def check_usable(self) -> None:
        """Raises PluginError where the allow-list names an unknown plugin."""
        unknown = [fault for fault in self.faults if fault.kind is FaultKind.UNKNOWN_IN_ALLOW_LIST]
        if unknown:
            raise PluginError(" ".join(sentence(followed(fault.detail, fault.fix)) for fault in unknown))

    def check_name(self, name: str) -> None:
        """Raises PluginError for the name of a kernel that is contested or was left out."""
        if name in self.contested:
            raise PluginError("; ".join(claim_of(name, self.contested[name])) + ".")
        if name in self.unusable:
            raise PluginError(f"{self.unusable[name]}.")


def claim_of(kernel: str, claimants: tuple[str, ...]) -> tuple[str, str]:
    """Says who claims a kernel's name, and what to do."""
    who = tuple(dict.fromkeys(claimants))
    if len(who) == 1:
        return f"kernel {kernel!r} is claimed twice by {who[0]} and not used", f"upgrade {who[0]} or report it"
    fix = "uninstall one of them, or rename the kernel of yours"
    return f"kernel {kernel!r} is claimed by {' and '.join(who)}; none of them is used", fix


def backend_fault() -> Fault | None:
    """Returns why JAX can use no device here, mostly for what JAX_PLATFORMS says; None where it can."""
    try:
        home_target()
    except Exception as error:  # JAX raises various types, one of them without words
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or type(error).__name__
        named = str(jax.config.jax_platforms or "")  # type: ignore[attr-defined]
        if not named:
            detail = f"JAX can use no device of this machine: {reason}"
            return Fault(FaultKind.SWITCH, "JAX", _ENVIRONMENT, detail, "install jax and jaxlib again, of one version")
        detail = f"JAX_PLATFORMS={named} is not what this machine has, so JAX can do nothing: {reason}"
        return Fault(FaultKind.SWITCH, "JAX_PLATFORMS", _ENVIRONMENT, detail, _other_platforms(named))
    return None


def _other_platforms(named: str) -> str:
    """What to write instead of JAX_PLATFORMS=named, or what to install for it."""
    names = named.split(",")
    unknown = [name for name in names if name not in _NEEDED_BY]
    if unknown:
        hint = f"{unknown[0]!r} is not a platform of JAX itself{nearest(unknown[0], _NEEDED_BY)}"
        return followed(hint, "correct or unset JAX_PLATFORMS")
    needed = [f"{name} needs {_NEEDED_BY[name]}" for name in names if _NEEDED_BY[name]]
    return "; ".join(["unset JAX_PLATFORMS, or set it to cpu", *needed])


def switch_faults(found: Registry, switches: Switches) -> tuple[Fault, ...]:
    """Returns what is wrong with the environment variables that nothing raised or warned of yet; see `doctor`."""
    backend = backend_fault()
    of_jax = () if backend is None else (backend,)
    of_files = *_lock(switches), *_measurements(switches)
    return (*_variables(switches), *_unknown_kernel(found, switches), *of_files, *of_jax)


def _variables(switches: Switches) -> Iterator[Fault]:
    for name, wrong in switches.wrong:
        detail, _, fix = wrong.partition("; ")
        yield Fault(FaultKind.SWITCH, name, _ENVIRONMENT, detail, f"{fix}, or unset {name}")
    for name in switches.unknown:
        detail = f"there is no such variable, so it is ignored{nearest(name, KNOWN_SWITCHES)}"
        yield Fault(FaultKind.SWITCH, name, _ENVIRONMENT, detail, f"rename or unset {name}")


def _unknown_kernel(found: Registry, switches: Switches) -> Iterator[Fault]:
    name = switches.kernel
    if name is None or name in found.kernels:
        return
    detail = f"KERNELRY_KERNEL={name} is not a kernel that an installed plugin provides{nearest(name, found.kernels)}"
    try:
        found.check_name(name)
    except PluginError as error:
        detail = f"KERNELRY_KERNEL={name}: {str(error).removesuffix('.')}"
    fix = "calls that name no kernel are refused: set it to a name of `kernelry list`, or unset it"
    yield Fault(FaultKind.SWITCH, "KERNELRY_KERNEL", _ENVIRONMENT, detail, fix)


def _lock(switches: Switches) -> Iterator[Fault]:
    if not switches.strict:
        return
    try:
        Lock.read(switches.lock)
    except ConfigError as error:
        detail = f"KERNELRY_STRICT is on, and every call is refused: {str(error).removesuffix('.')}"
        fix = "write the file with `kernelry lock CONFIG`, name it in KERNELRY_LOCK, or unset KERNELRY_STRICT"
        yield Fault(FaultKind.SWITCH, "KERNELRY_LOCK", _ENVIRONMENT, detail, fix)


def _measurements(switches: Switches) -> Iterator[Fault]:
    from kernelry.policy.store import Store  # imported for those who list things

    path = switches.measurements_path
    try:
        if path is not None:
            Store(path).read()
    except ConfigError as error:
        detail = f"no measured times are used: {str(error).removesuffix('.')}"
        fix = "run `kernelry tune`, which sets it aside, name another file in KERNELRY_MEASUREMENTS, or delete it"
        yield Fault(FaultKind.SWITCH, "KERNELRY_MEASUREMENTS", _ENVIRONMENT, detail, fix)
