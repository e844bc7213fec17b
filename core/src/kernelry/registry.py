"""Finds plugins, isolates broken ones, and lists what the others bring."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import importlib_metadata
import jax
import pluggy

from kernelry import hookspecs
from kernelry.errors import PluginError, nearest
from kernelry.hookspecs import CONTRACT, PROJECT
from kernelry.kernel import KernelSpec
from kernelry.masks.base import Mask
from kernelry.normalization import LogSumExp, MaxSum, Normalization
from kernelry.switches import Switches

GROUP = "kernelry.plugins"
_UNKNOWN = "unknown distribution"
_logger = logging.getLogger("kernelry")


@final
class FaultKind(enum.Enum):
    """What is wrong with a plugin."""

    METADATA = "unreadable metadata"
    IMPORT_ERROR = "import error"
    CONTRACT = "unsupported contract"
    UNKNOWN_HOOK = "unknown hook"
    UNMARKED_HOOK = "unmarked hook"
    HOOK_SIGNATURE = "wrong hook signature"
    HOOK_RAISED = "exception in a hook"
    WRONG_RETURN = "wrong return type"
    DUPLICATE_PLUGIN = "two plugins with one name"
    DUPLICATE_KERNEL = "kernel name claimed twice"
    DUPLICATE_NAME = "mask or normalization name claimed twice"
    UNKNOWN_IN_ALLOW_LIST = "unknown name in KERNELRY_PLUGINS"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with a plugin, and what to do about it."""

    kind: FaultKind
    plugin: str
    distribution: str
    detail: str
    fix: str

    def __str__(self) -> str:
        return f"{self.plugin} [{self.distribution}]: {self.kind.value}: {self.detail}; {self.fix}"

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
    """Everything that the installed plugins bring.

    Args:
      kernels: by name; names claimed twice are left out.
      contested: names claimed twice, with the distributions that claim them.
      plugins: every plugin found, enabled or not.
      faults: what is wrong.
      masks: mask classes of plugins, by name.
      normalizations: by name, core's included.
      rankers: the votes of plugins, by plugin name.
      observers: the observers of plugins, by plugin name.
    """

    kernels: Mapping[str, InstalledKernel]
    contested: Mapping[str, tuple[str, ...]]
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
            raise PluginError("; ".join(f"{fault.detail}; {fault.fix}" for fault in unknown))

    def check_name(self, name: str) -> None:
        """Raises PluginError for a contested kernel name."""
        if name in self.contested:
            raise PluginError("; ".join(_claim(name, self.contested[name])) + ".")


_CORE_NORMALIZATIONS: Mapping[str, Normalization] = MappingProxyType(
    {"softmax": LogSumExp(), "softmax_max_sum": MaxSum()}
)


@functools.lru_cache(maxsize=1)
def installed() -> Registry:
    """Returns the plugins of this process; the entry points are scanned once."""
    points, unreadable = _scan()
    # The first call may stand under a trace, which would leak tracers into constants of plugin modules.
    with jax.ensure_compile_time_eval():
        registry = build(points, Switches.of_process().plugins)
    registry = dataclasses.replace(registry, faults=(*unreadable, *registry.faults))
    for fault in registry.faults:
        warnings.warn(f"kernelry plugin {fault}", stacklevel=2)
    return registry


def _scan() -> tuple[Iterable[importlib_metadata.EntryPoint], tuple[Fault, ...]]:
    """Finds the entry points; where one distribution's cannot be parsed, finds those of the others."""
    try:
        return importlib_metadata.entry_points(group=GROUP), ()
    except Exception:
        return _scan_one_by_one()


def _scan_one_by_one() -> tuple[list[importlib_metadata.EntryPoint], tuple[Fault, ...]]:
    points: list[importlib_metadata.EntryPoint] = []
    faults: list[Fault] = []
    seen: set[str] = set()
    for distribution in importlib_metadata.distributions():
        description = _described(distribution)
        name = description.split(" ")[0]
        if name in seen and description != _UNKNOWN:  # the first on sys.path is the one that is imported
            continue
        seen.add(name)
        try:
            points.extend(distribution.entry_points.select(group=GROUP))
        except Exception as error:
            detail = f"reading its entry points raised {error!r}"
            faults.append(Fault(FaultKind.METADATA, name, description, detail, "reinstall or uninstall it"))
    return points, tuple(faults)


def build(entry_points: Iterable[importlib_metadata.EntryPoint], allowed: tuple[str, ...] | None = None) -> Registry:
    """Loads plugins one by one; whatever goes wrong with one leaves the others alone.

    Args:
      entry_points: of the group `kernelry.plugins`, in any order.
      allowed: the entry-point names to load; None loads all.
    """
    ordered = sorted(entry_points, key=lambda point: (point.name, _distribution(point), point.value))
    return _Builder(allowed).build(ordered)


def _distribution(point: importlib_metadata.EntryPoint) -> str:
    return _described(point.dist) if point.dist else _UNKNOWN


def _described(distribution: importlib_metadata.Distribution) -> str:
    try:
        return f"{distribution.name} {distribution.version}"
    except Exception:  # half uninstalled: the folder is there, the metadata is not
        return _UNKNOWN


class _Builder:
    """Collects plugins and faults."""

    def __init__(self, allowed: tuple[str, ...] | None) -> None:
        self.allowed = allowed
        self.faults: list[Fault] = []
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.distributions: dict[str, str] = {}

    def build(self, points: Sequence[importlib_metadata.EntryPoint]) -> Registry:
        by_name: dict[str, list[importlib_metadata.EntryPoint]] = {}
        for point in points:
            by_name.setdefault(point.name, []).append(point)
        self._check_allow_list(by_name)
        enabled = [name for name in by_name if self.allowed is None or name in self.allowed]
        for name in enabled:
            self._load(name, by_name[name])
        specs = self._kernels()
        kernels, contested = self._uncontested(specs)
        plugins = tuple(
            Plugin(point.name, _distribution(point), point.value, point.name in enabled, _names(specs, point.name))
            for point in points
        )
        return Registry(
            kernels=MappingProxyType(kernels),
            contested=MappingProxyType(contested),
            plugins=plugins,
            faults=tuple(self.faults),
            masks=MappingProxyType(
                self._mapping("kernelry_masks", "a mapping of names to Mask classes", _is_mask_class)
            ),
            normalizations=MappingProxyType({**self._normalizations(), **_CORE_NORMALIZATIONS}),
            rankers=MappingProxyType(dict(self._callables("kernelry_rank"))),
            observers=MappingProxyType(dict(self._callables("kernelry_resolved"))),
        )

    def _fault(self, kind: FaultKind, plugin: str, detail: str, fix: str) -> None:
        fault = Fault(kind, plugin, self.distributions.get(plugin, _UNKNOWN), detail, fix)
        _logger.debug("plugin fault: %s", fault)
        self.faults.append(fault)

    def _check_allow_list(self, by_name: Mapping[str, Any]) -> None:
        for name in self.allowed or ():
            if name not in by_name:
                detail = f"KERNELRY_PLUGINS names {name!r}, which is not installed{nearest(name, by_name)}"
                self._fault(FaultKind.UNKNOWN_IN_ALLOW_LIST, name, detail, "correct or unset KERNELRY_PLUGINS")

    def _load(self, name: str, points: list[importlib_metadata.EntryPoint]) -> None:
        self.distributions[name] = " and ".join(_distribution(point) for point in points)
        if len(points) > 1:
            detail = f"{self.distributions[name]} both register the plugin {name!r}; none of them is used"
            self._fault(FaultKind.DUPLICATE_PLUGIN, name, detail, "uninstall one of them")
            return
        try:
            plugin = points[0].load()
            if self._honours_contract(name, plugin):
                self._register(name, plugin)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and test outcomes are no Exceptions
            detail = f"importing {points[0].value} raised {error!r}"
            self._fault(FaultKind.IMPORT_ERROR, name, detail, f"reinstall or upgrade {self.distributions[name]}")

    def _honours_contract(self, name: str, plugin: Any) -> bool:
        stated = getattr(plugin, "contract", None)
        distribution = self.distributions[name].split(" ")[0]
        if not (isinstance(stated, tuple) and len(stated) == 2 and all(isinstance(v, int) for v in stated)):
            detail = f"contract must be a pair of integers (first, last), got {stated!r}"
            fix = f"add contract = ({CONTRACT}, {CONTRACT}) to the plugin, or upgrade {distribution}"
            self._fault(FaultKind.CONTRACT, name, detail, fix)
            return False
        first, last = stated
        if first <= CONTRACT <= last:
            return True
        upgrade = distribution if last < CONTRACT else "kernelry"
        detail = f"it was written for contract {first} … {last}, this core has {CONTRACT}"
        self._fault(FaultKind.CONTRACT, name, detail, f"pip install --upgrade {upgrade}")
        return False

    def _register(self, name: str, plugin: Any) -> None:
        if self.manager.is_registered(plugin):
            detail = f"it is the plugin {self.manager.get_name(plugin)!r} under a second name, which is not used"
            self._fault(FaultKind.DUPLICATE_PLUGIN, name, detail, "remove one of the two entry points")
            return
        try:
            self.manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            self.manager.set_blocked(name)
            fix = "make the hook's parameters those of kernelry.hookspecs"
            self._fault(FaultKind.HOOK_SIGNATURE, name, " ".join(str(error).split()), fix)
            return
        known = {key for key in vars(hookspecs) if key.startswith("kernelry_")}
        for attribute in dir(plugin):
            if not attribute.startswith("kernelry_") or not callable(getattr(plugin, attribute)):
                continue
            marked = self.manager.parse_hookimpl_opts(plugin, attribute) is not None
            if attribute not in known:
                detail = f"there is no hook {attribute!r}{nearest(attribute, known)}"
                self._fault(FaultKind.UNKNOWN_HOOK, name, detail, "rename the function")
            elif not marked:
                fix = "decorate it with @kernelry.plugin.hookimpl"
                self._fault(FaultKind.UNMARKED_HOOK, name, f"{attribute} is not marked as a hook", fix)

    def _callables(self, hook: str) -> Iterable[tuple[str, Callable[..., Any]]]:
        caller = getattr(self.manager.hook, hook)
        for impl in sorted(caller.get_hookimpls(), key=lambda impl: impl.plugin_name):
            if impl.hookwrapper or impl.wrapper:
                detail = f"{hook} is a hook wrapper, which kernelry does not call"
                self._fault(FaultKind.HOOK_SIGNATURE, impl.plugin_name, detail, "make it a plain hookimpl")
                continue
            yield impl.plugin_name, functools.partial(_call, impl.function, impl.argnames)

    def _results(self, hook: str) -> Iterable[tuple[str, Any]]:
        for plugin, call in self._callables(hook):
            try:
                result = call()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                fix = f"report it to the authors of {self.distributions[plugin]}"
                self._fault(FaultKind.HOOK_RAISED, plugin, f"{hook} raised {error!r}", fix)
                continue
            yield plugin, result

    def _wrong_return(self, plugin: str, hook: str, wanted: str, got: Any) -> None:
        detail = f"{hook} must return {wanted}, got {got!r}"
        self._fault(FaultKind.WRONG_RETURN, plugin, detail, f"upgrade {self.distributions[plugin]} or report it")

    def _kernels(self) -> list[InstalledKernel]:
        specs: list[InstalledKernel] = []
        for plugin, result in self._results("kernelry_kernels"):
            sequence = isinstance(result, list | tuple)
            if not sequence or not all(isinstance(spec, KernelSpec) for spec in result):
                self._wrong_return(plugin, "kernelry_kernels", "a list of KernelSpec", result)
                continue
            usable = [spec for spec in result if self._is_hashable(plugin, spec)]
            specs.extend(InstalledKernel(spec, plugin, self.distributions[plugin]) for spec in usable)
        return specs

    def _is_hashable(self, plugin: str, spec: KernelSpec) -> bool:
        try:
            hash(spec)
        except TypeError as error:
            wanted = "KernelSpecs of hashable data (tuples and frozensets, no lists and sets)"
            self._wrong_return(plugin, "kernelry_kernels", wanted, f"{spec.name!r}: {error}")
            return False
        return True

    def _uncontested(
        self, specs: list[InstalledKernel]
    ) -> tuple[dict[str, InstalledKernel], dict[str, tuple[str, ...]]]:
        claims: dict[str, list[InstalledKernel]] = {}
        for spec in specs:
            claims.setdefault(spec.name, []).append(spec)
        contested = {name: tuple(k.distribution for k in found) for name, found in claims.items() if len(found) > 1}
        for name, claimants in contested.items():
            for plugin in dict.fromkeys(kernel.plugin for kernel in claims[name]):
                self._fault(FaultKind.DUPLICATE_KERNEL, plugin, *_claim(name, claimants))
        return {name: found[0] for name, found in sorted(claims.items()) if name not in contested}, contested

    def _normalizations(self) -> dict[str, Any]:
        return self._mapping("kernelry_normalizations", "a mapping of names to Normalizations", _is_normalization)

    def _mapping(self, hook: str, wanted: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
        claims: dict[str, list[tuple[str, Any]]] = {}
        for plugin, result in self._results(hook):
            named = isinstance(result, Mapping) and all(isinstance(name, str) for name in result)
            if not named or not all(fits(value) for value in result.values()):
                self._wrong_return(plugin, hook, wanted, result)
                continue
            for name, value in result.items():
                claims.setdefault(name, []).append((plugin, value))
        reserved = _CORE_NORMALIZATIONS if hook == "kernelry_normalizations" else {}
        for name, found in claims.items():
            for plugin, _ in found if len(found) > 1 or name in reserved else ():
                detail = f"{hook}: {name!r} is claimed by core or another plugin too; none of the plugins' is used"
                self._fault(FaultKind.DUPLICATE_NAME, plugin, detail, "rename it or uninstall one of them")
        return {name: found[0][1] for name, found in claims.items() if len(found) == 1 and name not in reserved}


def _claim(kernel: str, claimants: tuple[str, ...]) -> tuple[str, str]:
    """Says who claims a kernel's name, and what to do."""
    who = tuple(dict.fromkeys(claimants))
    if len(who) == 1:
        return f"kernel {kernel!r} is claimed twice by {who[0]} and not used", f"upgrade {who[0]} or report it"
    return f"kernel {kernel!r} is claimed by {' and '.join(who)}; none of them is used", "uninstall one of them"


def _call(function: Callable[..., Any], argnames: tuple[str, ...], **arguments: Any) -> Any:
    return function(*(arguments[name] for name in argnames))


def _is_mask_class(value: Any) -> bool:
    return isinstance(value, type) and Mask in value.__mro__


def _is_normalization(value: Any) -> bool:
    return Normalization in type(value).__mro__


def _names(specs: list[InstalledKernel], plugin: str) -> tuple[str, ...]:
    return tuple(spec.name for spec in specs if spec.plugin == plugin)


def kernels() -> tuple[InstalledKernel, ...]:
    """Returns the installed kernels, sorted by name. Imports no vendor library."""
    return tuple(installed().kernels.values())


def plugins() -> tuple[Plugin, ...]:
    """Returns the plugins that were found, sorted by name. Imports no vendor library."""
    return installed().plugins
