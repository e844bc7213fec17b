"""Finds plugins, isolates broken ones, and lists what the others provide."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import importlib_metadata
import jax
import pluggy

from kernelry.errors import PluginError, nearest
from kernelry.execution.normalization import LogSumExp, MaxSum, Normalization
from kernelry.kernel.mistakes import mistakes, short
from kernelry.kernel.spec import KernelSpec
from kernelry.masks.base import Mask
from kernelry.policy.policy import Switches
from kernelry.registry import hooks
from kernelry.registry.contents import Fault, FaultKind, InstalledKernel, Plugin, Registry, claim_of
from kernelry.registry.entry_points import GROUP, UNKNOWN, distribution_of, is_ours
from kernelry.registry.hooks import CONTRACT, PROJECT, Ranking

_logger = logging.getLogger("kernelry")


_CORE_NORMALIZATIONS: Mapping[str, Normalization] = MappingProxyType(
    {"softmax": LogSumExp(), "softmax_max_sum": MaxSum()}
)


def find() -> Registry:
    """Scans the entry points of this process and loads what the switches allow."""
    points = [point for point in importlib_metadata.entry_points() if is_ours(point.group)]
    # The first call may be made while JAX traces, which would leak tracers into constants of plugin modules.
    with jax.ensure_compile_time_eval():
        registry = build(points, Switches.unchecked().plugins)
    for fault in registry.faults:
        warnings.warn(f"kernelry plugin {fault}", stacklevel=3)
    return registry


def build(entry_points: Iterable[importlib_metadata.EntryPoint], allowed: tuple[str, ...] | None = None) -> Registry:
    """Loads plugins one by one; whatever goes wrong with one leaves the others alone.

    Args:
      entry_points: of the group `kernelry.plugins`, in any order; of any other group each is a fault.
      allowed: the entry-point names to load; None loads all.
    """
    ordered = sorted(entry_points, key=lambda point: (point.name, distribution_of(point), point.value))
    return _Builder(allowed).build(ordered)


class _Builder:
    """Collects plugins and faults."""

    def __init__(self, allowed: tuple[str, ...] | None) -> None:
        self.allowed = allowed
        self.faults: list[Fault] = []
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hooks)
        self.distributions: dict[str, str] = {}
        self.unusable: dict[str, str] = {}

    def build(self, points: Sequence[importlib_metadata.EntryPoint]) -> Registry:
        by_name: dict[str, list[importlib_metadata.EntryPoint]] = {}
        self._check_groups([point for point in points if point.group != GROUP])
        points = [point for point in points if point.group == GROUP]
        for point in points:
            by_name.setdefault(point.name, []).append(point)
        self._check_allow_list(by_name)
        enabled = [name for name in by_name if self.allowed is None or name in self.allowed]
        for name in enabled:
            self._load(name, by_name[name])
        specs = self._kernels()
        kernels, contested = self._uncontested(specs)
        plugins = tuple(
            Plugin(point.name, distribution_of(point), point.value, point.name in enabled, _names(specs, point.name))
            for point in points
        )
        masks = self._mapping("kernelry_masks", "a mapping of names to Mask classes", _is_mask_class)
        normalizations = self._mapping(
            "kernelry_normalizations", "a mapping of names to Normalizations", _is_normalization
        )
        return Registry(
            kernels=MappingProxyType(kernels),
            contested=MappingProxyType(contested),
            unusable=MappingProxyType(self.unusable),
            plugins=plugins,
            masks=MappingProxyType(masks),
            normalizations=MappingProxyType({**normalizations, **_CORE_NORMALIZATIONS}),
            rankers=MappingProxyType(
                {plugin: functools.partial(_vote, ask) for plugin, ask in self._callables("kernelry_rank")}
            ),
            observers=MappingProxyType(dict(self._callables("kernelry_resolved"))),
            faults=tuple(self.faults),  # last: all of the above adds to it
        )

    def _fault(self, kind: FaultKind, plugin: str, detail: str, fix: str) -> None:
        fault = Fault(kind, plugin, self.distributions.get(plugin, UNKNOWN), detail, fix)
        _logger.debug("plugin fault: %s", fault)
        self.faults.append(fault)

    def _check_allow_list(self, by_name: Mapping[str, Any]) -> None:
        for name in self.allowed or ():
            if name not in by_name:
                detail = f"KERNELRY_PLUGINS names {name!r}, which is not installed{nearest(name, by_name)}"
                self._fault(FaultKind.UNKNOWN_IN_ALLOW_LIST, name, detail, "correct or unset KERNELRY_PLUGINS")

    def _check_groups(self, points: Sequence[importlib_metadata.EntryPoint]) -> None:
        for point in points:
            if self.allowed is None or point.name in self.allowed:
                self.distributions.setdefault(point.name, distribution_of(point))
                detail = f"the entry point {point.name} = {point.value!r} is in the group {point.group!r}"
                fix = f"write [project.entry-points.{GROUP!r}] in pyproject.toml, and install it again"
                self._fault(FaultKind.ENTRY_POINT, point.name, f"{detail}, which kernelry does not read", fix)

    def _load(self, name: str, points: list[importlib_metadata.EntryPoint]) -> None:
        self.distributions[name] = " and ".join(distribution_of(point) for point in points)
        if len(points) > 1:
            detail = f"{self.distributions[name]} both register the plugin {name!r}; none of them is used"
            fix = "uninstall one of them, or rename the entry point of yours"
            self._fault(FaultKind.DUPLICATE_PLUGIN, name, detail, fix)
            return
        try:
            plugin = self._loaded(name, points[0])
            if plugin is not None and self._honours_contract(name, plugin):
                self._register(name, plugin)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and test outcomes are no Exceptions
            detail = f"importing {points[0].value} raised {error!r}"
            self._fault(FaultKind.IMPORT_ERROR, name, detail, f"reinstall or upgrade {self.distributions[name]}")

    def _loaded(self, name: str, point: importlib_metadata.EntryPoint) -> Any:
        """Imports what an entry point names; None, with a fault, where it does not exist or is not a plugin."""
        match = point.pattern.match(point.value)
        if match is None:
            self._wrong_entry_point(name, point, "is not of the form package.module or package.module:attribute")
            return None
        try:
            found: Any = importlib.import_module(point.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{point.module}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports another that is not
            self._wrong_entry_point(name, point, f"names a module, and there is no {error.name!r}")
            return None
        for attribute in filter(None, (point.attr or "").split(".")):
            if not hasattr(found, attribute):
                known = [public for public in dir(found) if not public.startswith("_")]
                detail = (
                    f"names {attribute!r}, which {point.module} does not have{nearest(attribute, known, listed=False)}"
                )
                self._wrong_entry_point(name, point, detail)
                return None
            found = getattr(found, attribute)
        if inspect.isroutine(found):  # a hook has the mark of pluggy, which looks like a hook of its own
            self._wrong_entry_point(name, point, f"names a function; name its module, {point.module!r}")
            return None
        if not hasattr(found, "contract") and not any(key.startswith("kernelry_") for key in dir(found)):
            self._wrong_entry_point(name, point, f"names {short(found)}, which has neither a contract nor hooks")
            return None
        return found

    def _wrong_entry_point(self, name: str, point: importlib_metadata.EntryPoint, detail: str) -> None:
        distribution = self.distributions[name].split(" ")[0]
        fix = (
            f"under [project.entry-points.{GROUP!r}] of {distribution}, name the module with the hooks, e.g. "
            f'{name} = "{distribution.replace("-", "_")}.plugin", and install it again'
        )
        self._fault(FaultKind.ENTRY_POINT, name, f"the entry point {name} = {point.value!r} {detail}", fix)

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
            self.manager.set_blocked(name)  # before 1.7, pluggy keeps the hooks it came to first
            fix = "make the hook's parameters those of kernelry.registry.hooks"
            self._fault(FaultKind.HOOK_SIGNATURE, name, " ".join(str(error).split()), fix)
            return
        known = {key for key in vars(hooks) if key.startswith("kernelry_")}
        for attribute in dir(plugin):
            marked = self.manager.parse_hookimpl_opts(plugin, attribute) is not None
            if not marked and not (attribute.startswith("kernelry_") and callable(getattr(plugin, attribute))):
                continue
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

    def _wrong_return(self, plugin: str, hook: str, expected: str, got: Any) -> None:
        detail = f"{hook} must return {expected}, got {short(got)}"
        fix = f"upgrade {self.distributions[plugin]} or report it"
        if isinstance(got, KernelSpec):
            fix = f"write return [spec] with the one spec in a list, or {fix}"
        self._fault(FaultKind.WRONG_RETURN, plugin, detail, fix)

    def _kernels(self) -> list[InstalledKernel]:
        specs: list[InstalledKernel] = []
        for plugin, result in self._results("kernelry_kernels"):
            if not isinstance(result, list | tuple):
                self._wrong_return(plugin, "kernelry_kernels", "a list of KernelSpec", result)
                continue
            wrong = [(index, item) for index, item in enumerate(result) if not isinstance(item, KernelSpec)]
            if wrong:
                expected = f"a list of KernelSpec, and item {wrong[0][0]} is not one"
                self._wrong_return(plugin, "kernelry_kernels", expected, wrong[0][1])
                continue
            usable = [spec for spec in result if self._is_hashable(plugin, spec) and self._is_usable(plugin, spec)]
            specs.extend(InstalledKernel(spec, plugin, self.distributions[plugin]) for spec in usable)
        return specs

    def _is_hashable(self, plugin: str, spec: KernelSpec) -> bool:
        try:
            hash(spec)
        except TypeError as error:
            expected = "KernelSpecs of hashable data (tuples and frozensets, no lists and sets)"
            self._wrong_return(plugin, "kernelry_kernels", expected, f"{spec.name!r}: {error}")
            return False
        return True

    def _is_usable(self, plugin: str, spec: KernelSpec) -> bool:
        found = mistakes(spec)
        for mistake in found:
            kind = FaultKind.DECLARATION if mistake.usable else FaultKind.WRONG_SPEC
            detail = f"kernel {spec.name!r}: {mistake.detail}"
            self._fault(
                kind, plugin, detail, f"{mistake.fix}, or report it to the authors of {self.distributions[plugin]}"
            )
        fatal = [mistake for mistake in found if not mistake.usable]
        if fatal:
            self.unusable[spec.name] = (
                f"kernel {spec.name!r} of {self.distributions[plugin]} was left out: "
                + "; ".join(f"{mistake.detail}; {mistake.fix}" for mistake in fatal)
            )
        return not fatal

    def _uncontested(
        self, specs: list[InstalledKernel]
    ) -> tuple[dict[str, InstalledKernel], dict[str, tuple[str, ...]]]:
        claims: dict[str, list[InstalledKernel]] = {}
        for spec in specs:
            claims.setdefault(spec.name, []).append(spec)
        contested = {name: tuple(k.distribution for k in found) for name, found in claims.items() if len(found) > 1}
        for name, claimants in contested.items():
            for plugin in dict.fromkeys(kernel.plugin for kernel in claims[name]):
                self._fault(FaultKind.DUPLICATE_KERNEL, plugin, *claim_of(name, claimants))
        return {name: found[0] for name, found in sorted(claims.items()) if name not in contested}, contested

    def _mapping(self, hook: str, expected: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
        claims: dict[str, list[tuple[str, Any]]] = {}
        for plugin, result in self._results(hook):
            named = isinstance(result, Mapping) and all(isinstance(name, str) for name in result)
            if not named or not all(fits(value) for value in result.values()):
                self._wrong_return(plugin, hook, expected, result)
                continue
            for name, value in result.items():
                claims.setdefault(name, []).append((plugin, value))
        reserved = _CORE_NORMALIZATIONS if hook == "kernelry_normalizations" else {}
        for name, found in claims.items():
            for plugin, _ in found if len(found) > 1 or name in reserved else ():
                detail = f"{hook}: {name!r} is claimed by core or another plugin too; none of the plugins' is used"
                self._fault(FaultKind.DUPLICATE_NAME, plugin, detail, "rename it or uninstall one of them")
        return {name: found[0][1] for name, found in claims.items() if len(found) == 1 and name not in reserved}


def _call(function: Callable[..., Any], argnames: tuple[str, ...], **arguments: Any) -> Any:
    return function(*(arguments[name] for name in argnames))


def _vote(ask: Callable[..., Any], **arguments: Any) -> Ranking | None:
    """Asks a ranker; raises PluginError where it answers with something else than names, a Ranking or None."""
    vote = ask(**arguments)
    if vote is None:
        return None
    names, source = (vote.kernels, vote.source) if isinstance(vote, Ranking) else (vote, "")
    are_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not are_names or not isinstance(source, str):
        expected = "a list of kernel names, a Ranking of names with its source as text, or None"
        raise PluginError(f"kernelry_rank must return {expected}, got {vote!r}")
    return Ranking(tuple(names), source)


def _is_mask_class(value: Any) -> bool:
    return isinstance(value, type) and Mask in value.__mro__


def _is_normalization(value: Any) -> bool:
    return Normalization in type(value).__mro__


def _names(specs: list[InstalledKernel], plugin: str) -> tuple[str, ...]:
    return tuple(spec.name for spec in specs if spec.plugin == plugin)
