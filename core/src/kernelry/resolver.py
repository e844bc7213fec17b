"""Picks a kernel for a request: pure, from kernels, policy, measurements and environment; cached."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import final

from kernelry import registry
from kernelry.adapters import ADAPTERS
from kernelry.environment import Environment, Knowledge
from kernelry.errors import ConfigError, KernelRefusedError, NoKernelError, nearest
from kernelry.kernel import KernelSpec, Tiling, no_refusals
from kernelry.measurements import Measurements
from kernelry.policy import AUTO, Policy, Rule
from kernelry.refusal import Refusal, RefusalCode
from kernelry.registry import InstalledKernel
from kernelry.request import Request
from kernelry.resolution import Candidate, Plan, Resolution, Step
from kernelry.scope import Scope, current_recorders, current_scope
from kernelry.target import home_target

_logger = logging.getLogger("kernelry")


def resolve(
    request: Request,
    *,
    kernel: str = AUTO,
    kernels: tuple[KernelSpec, ...] | None = None,
    policy: Policy | None = None,
    measurements: Measurements | None = None,
    environment: Environment | None = None,
) -> Resolution:
    """Picks a kernel for a request.

    Args:
      request: the static facts of the call.
      kernel: a name, absolutely, or `auto`.
      kernels: the kernels to choose among; None is the installed ones and those of `use`.
      policy: None is that of `use`, else the shipped one.
      measurements: None is none.
      environment: vendor facts; None looks at home and assumes elsewhere.

    Returns:
      The Resolution; the same object for an equal question.

    Raises:
      NoKernelError: no kernel serves the request.
      KernelRefusedError: the kernel named refuses it.
      PluginError: the kernel named is claimed by two plugins.
    """
    resolution = _resolution(request, kernel, current_scope(), kernels, policy, measurements, environment)
    if resolution.plan is None:
        raise _refusal_error(resolution, kernel, current_scope(), policy)
    for recorder in current_recorders():
        recorder.resolutions.append(resolution)
    return resolution


def explain(
    request: Request,
    *,
    kernel: str = AUTO,
    kernels: tuple[KernelSpec, ...] | None = None,
    policy: Policy | None = None,
    measurements: Measurements | None = None,
    environment: Environment | None = None,
) -> Resolution:
    """Answers like `resolve`, but returns a Resolution without a plan where no kernel serves.

    `str(explain(request))` is the explanation as text.
    """
    return _resolution(request, kernel, current_scope(), kernels, policy, measurements, environment)


def clear_cache() -> None:
    """Forgets every resolution."""
    _resolution.cache_clear()


@functools.lru_cache(maxsize=8192)
def _resolution(
    request: Request,
    kernel: str,
    scope: Scope,
    kernels: tuple[KernelSpec, ...] | None,
    policy: Policy | None,
    measurements: Measurements | None,
    environment: Environment | None,
) -> Resolution:
    pool = _pool(scope, kernels)
    policy = policy or scope.policy or Policy.shipped()
    preference = _preference(request, kernel, scope, policy, pool, measurements or Measurements())
    environment = environment or _environment_for(request)
    resolution = _choose(request, preference, pool, policy, environment)
    _logger.info("%s", resolution.headline)
    _observe(resolution)
    return resolution


def _environment_for(request: Request) -> Environment:
    at_home = request.target.platform == home_target().platform
    return Environment(Knowledge.PROBED if at_home else Knowledge.ASSUMED)


def _pool(scope: Scope, kernels: tuple[KernelSpec, ...] | None) -> dict[str, InstalledKernel]:
    if kernels is None:
        installed = registry.installed()
        installed.check_usable()
        pool = dict(installed.kernels)
    else:
        pool = {spec.name: InstalledKernel(spec, "given", "given to resolve") for spec in kernels}
    given = {spec.name: InstalledKernel(spec, "use", "given to use") for spec in scope.kernels}
    return {**pool, **given}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Preference:
    """The names to try in order, what decided that, and the tunables it sets."""

    names: tuple[str, ...]
    rule: str
    excluded: tuple[str, ...] = ()
    tiling: tuple[tuple[str, int], ...] = ()


def _preference(
    request: Request,
    kernel: str,
    scope: Scope,
    policy: Policy,
    pool: Mapping[str, InstalledKernel],
    measurements: Measurements,
) -> _Preference:
    forced = _forced(kernel, scope, policy)
    if forced is not None:
        name, why = forced
        _check_contested(name, pool)
        others = tuple(other for other in sorted(pool) if other != name)
        return _Preference((name,), why, others, scope.tiling)
    for rule in policy.rules:
        if rule.when.matches(request):
            return _by_rule(rule, request, scope, policy, pool, measurements)
    names, why = _automatic(request, policy, pool, measurements)
    return _Preference(names, why, (), scope.tiling)


def _check_contested(name: str, pool: Mapping[str, InstalledKernel]) -> None:
    if name not in pool:
        registry.installed().check_name(name)


def _forced(kernel: str, scope: Scope, policy: Policy) -> tuple[str, str] | None:
    if kernel != AUTO:
        return kernel, f"kernel={kernel!r} was asked for"
    if scope.kernel is not None:
        return scope.kernel, f"use({scope.kernel!r}) is in force"
    if policy.kernel is not None:
        return policy.kernel, f"KERNELRY_KERNEL={policy.kernel}"
    return None


def _by_rule(
    rule: Rule,
    request: Request,
    scope: Scope,
    policy: Policy,
    pool: Mapping[str, InstalledKernel],
    measurements: Measurements,
) -> _Preference:
    for name in rule.names:
        _check_contested(name, pool)
    rest = tuple(name for name in _automatic(request, policy, pool, measurements)[0] if name not in rule.names)
    tiling = tuple(sorted({**dict(rule.tiling), **dict(scope.tiling)}.items()))
    if rule.is_exhaustive:
        return _Preference(rule.names, str(rule), rest, tiling)
    return _Preference((*rule.names, *rest), str(rule), (), tiling)


def _automatic(
    request: Request, policy: Policy, pool: Mapping[str, InstalledKernel], measurements: Measurements
) -> tuple[tuple[str, ...], str]:
    """Orders all kernels: by measured time, then by votes, then by the shipped policy, then by name."""
    measured = [name for name in measurements.fastest(request) if name in pool]
    votes = _votes(request, tuple(sorted(pool)))
    default = next((rule for rule in policy.defaults if rule.when.matches(request)), None)
    preferred = default.names if default else ()

    def rank(name: str) -> tuple[int, int, int, str]:
        return _place(name, measured), -votes.get(name, 0), _place(name, preferred), name

    why = "measurements of this device" if measured else "votes of plugins" if votes else str(default or "by name")
    return tuple(sorted(pool, key=rank)), why


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _votes(request: Request, candidates: tuple[str, ...]) -> dict[str, int]:
    points: dict[str, int] = {}
    for plugin, ask in sorted(registry.installed().rankers.items()):
        try:
            vote = ask(request=request, candidates=candidates)
        except Exception as error:
            warnings.warn(f"kernelry plugin {plugin}: kernelry_rank raised {error!r}; its vote is lost", stacklevel=2)
            continue
        for place, name in enumerate(vote or ()):
            points[name] = points.get(name, 0) + len(candidates) - place
    return points


def _choose(
    request: Request,
    preference: _Preference,
    pool: Mapping[str, InstalledKernel],
    policy: Policy,
    environment: Environment,
) -> Resolution:
    plan: Plan | None = None
    candidates: list[Candidate] = []
    for name in preference.names:
        if name not in pool:
            candidates.append(_absent(name, pool))
            continue
        looking = environment if plan is None else environment.without_probing()
        candidate, tiling = _consider(pool[name], request, policy, looking, preference.tiling)
        candidates.append(candidate)
        if plan is None and not candidate.refusals:
            plan = Plan(pool[name].spec, candidate.steps, request, tiling)
    return Resolution(request, plan, tuple(candidates), preference.rule, preference.excluded)


def _absent(name: str, pool: Mapping[str, InstalledKernel]) -> Candidate:
    detail = f"no installed plugin brings a kernel of that name{nearest(name, pool)}"
    return Candidate(name, "not installed", (Refusal(RefusalCode.NOT_INSTALLED, detail),))


def _consider(
    installed: InstalledKernel,
    request: Request,
    policy: Policy,
    environment: Environment,
    overrides: tuple[tuple[str, int], ...],
) -> tuple[Candidate, Tiling]:
    spec = installed.spec
    steps, refusals = _adapt(spec, request, policy, environment)
    tiling = Tiling()
    if not refusals:
        tiling, refusals = _tile(spec, steps[-1].after if steps else request, overrides)
    unsure = spec.refusals is not no_refusals and environment.knowledge is not Knowledge.PROBED and not refusals
    notes = (f"vendor: {environment.knowledge.value}",) if unsure else ()
    return Candidate(spec.name, installed.distribution, refusals, steps, notes), tiling


def _tile(
    spec: KernelSpec, request: Request, overrides: tuple[tuple[str, int], ...]
) -> tuple[Tiling, tuple[Refusal, ...]]:
    try:
        tilings = spec.tilings(request)
        return tilings[0].replace(dict(overrides), spec.name), ()
    except ConfigError as error:
        return Tiling(), (Refusal(RefusalCode.TILING, str(error)),)
    except Exception as error:
        return Tiling(), (Refusal(RefusalCode.FAULT, f"its tilings raised {error!r}"),)


def _adapt(
    spec: KernelSpec, request: Request, policy: Policy, environment: Environment
) -> tuple[tuple[Step, ...], tuple[Refusal, ...]]:
    """Applies adapters while they cure refusals; each at most once, in their fixed order."""
    steps: list[Step] = []
    current = request
    refusals = _refusals(spec, current, environment)
    while refusals:
        step = next(_cures(spec, current, refusals, steps, policy), None)
        if step is None:
            return tuple(steps), refusals
        steps.append(step)
        current = step.after
        refusals = _refusals(spec, current, environment)
    return tuple(steps), ()


def _cures(
    spec: KernelSpec, request: Request, refusals: tuple[Refusal, ...], steps: list[Step], policy: Policy
) -> Iterator[Step]:
    codes = {refusal.code for refusal in refusals}
    used = {step.adapter.name for step in steps}
    for adapter in ADAPTERS:
        if adapter.name in used or adapter.name in policy.forbidden_adapters or not adapter.cures & codes:
            continue
        after = adapter.rewrite(request, spec.capabilities)
        if after is not None:
            yield Step(adapter, request, after)


def _refusals(spec: KernelSpec, request: Request, environment: Environment) -> tuple[Refusal, ...]:
    """The capabilities' refusals; where there are none, the kernel's own."""
    declared = spec.capabilities.refusals(request)
    if declared:
        return declared
    try:
        return tuple(spec.refusals(request, environment))
    except Exception as error:
        return (Refusal(RefusalCode.FAULT, f"its refusals raised {error!r}", "report it to the kernel's authors"),)


def _refusal_error(resolution: Resolution, kernel: str, scope: Scope, policy: Policy | None) -> NoKernelError:
    forced = _forced(kernel, scope, policy or scope.policy or Policy.shipped())
    if forced is not None:
        name = forced[0]
        reasons = "\n".join(f"  {refusal}" for candidate in resolution.candidates for refusal in candidate.refusals)
        message = f"kernel {name!r} ({resolution.rule}) refuses {resolution.request}.\n{reasons}"
        others = ", ".join(resolution.excluded)
        hint = f'\nOther kernels here: {others}. kernel="auto" chooses among them.' if others else ""
        return KernelRefusedError(message + hint, resolution)
    lines = [f"No kernel for {resolution.request}."]
    for candidate in resolution.candidates:
        lines.extend(f"  {candidate.name}: {refusal}" for refusal in candidate.refusals)
    excluded = f" (excluded by {resolution.rule}: {', '.join(resolution.excluded)})" if resolution.excluded else ""
    installed = ", ".join(candidate.name for candidate in resolution.candidates) or "no kernels"
    advice = "" if resolution.candidates else " pip install kernelry-dot-product serves every platform."
    lines.append(f"Considered: {installed}{excluded}.{advice}")
    return NoKernelError("\n".join(lines), resolution)


def _observe(resolution: Resolution) -> None:
    for plugin, observer in sorted(registry.installed().observers.items()):
        try:
            observer(resolution=resolution)
        except Exception as error:
            warnings.warn(f"kernelry plugin {plugin}: kernelry_resolved raised {error!r}", stacklevel=2)
