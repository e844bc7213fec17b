"""Picks a kernel for a request: pure, from kernels, policy, measurements and environment; cached."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernelry.errors import ArgumentError, KernelRefusedError, NoKernelError, nearest
from kernelry.execution.plan import Plan
from kernelry.kernel.environment import Environment, Knowledge
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import AUTO, KernelSpec, check_kernel_name
from kernelry.policy.lock import lock_in_force
from kernelry.policy.rules import Policy, check_policy
from kernelry.policy.scope import Scope, current_recorders, current_scope
from kernelry.registry import installed
from kernelry.request.request import Request
from kernelry.request.target import home_target
from kernelry.resolution.adapting import consider
from kernelry.resolution.explanation import Candidate, Resolution
from kernelry.resolution.nearest_change import nearest_changes
from kernelry.resolution.notices import log_resolution
from kernelry.resolution.question import Question

if TYPE_CHECKING:
    from kernelry.policy.measurements import Measurements
    from kernelry.registry.contents import InstalledKernel

_logger = logging.getLogger("kernelry")

_MOST_ELSEWHERE = 2
"""Kernels of other platforms that an error describes one by one."""


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
      ConfigError: strict mode is on, and this is not what the lock file says.
    """
    _check(request, kernel, policy)
    resolution = _announced(request, kernel, current_scope(), kernels, policy, measurements, environment)
    if resolution.plan is None:
        raise _refusal_error(resolution)
    lock = lock_in_force(current_scope().strict)
    if lock is not None:
        lock.check(resolution)
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
    changes: bool = True,
) -> Resolution:
    """Answers like `resolve`, but returns a Resolution without a plan where no kernel serves.

    `str(explain(request))` is the explanation as text. Its `changes` say what would have to be
    different for another kernel to be chosen; `resolve` leaves them out.

    Args:
      request, kernel, kernels, policy, measurements, environment: as for `resolve`.
      changes: whether to look for them, which takes most of the time.
    """
    _check(request, kernel, policy)
    answer = _explained if changes else _resolution
    return answer(request, kernel, current_scope(), kernels, policy, measurements, environment)


def _check(request: Any, kernel: Any, policy: Any) -> None:
    if not isinstance(request, Request):
        raise ArgumentError(
            f"request must be a kernelry.Request, e.g. Request(q_len=1024, target='gpu:h100'), got "
            f"{type(request).__name__}."
        )
    check_kernel_name(kernel)
    check_policy(policy)


def clear_cache() -> None:
    """Forgets every resolution."""
    for cached in (_announced, _resolution, _explained):
        cached.cache_clear()


@functools.lru_cache(maxsize=8192)
def _announced(
    request: Request,
    kernel: str,
    scope: Scope,
    kernels: tuple[KernelSpec, ...] | None,
    policy: Policy | None,
    measurements: Measurements | None,
    environment: Environment | None,
) -> Resolution:
    """Logs a new resolution and shows it to the observers, once."""
    resolution = _resolution(request, kernel, scope, kernels, policy, measurements, environment)
    policy = policy or scope.policy or Policy.shipped()
    log_resolution(resolution, Question(request, kernel, scope, policy, _pool(scope, kernels), measurements))
    _observe(resolution)
    return resolution


@functools.lru_cache(maxsize=512)
def _explained(
    request: Request,
    kernel: str,
    scope: Scope,
    kernels: tuple[KernelSpec, ...] | None,
    policy: Policy | None,
    measurements: Measurements | None,
    environment: Environment | None,
) -> Resolution:
    resolution = _resolution(request, kernel, scope, kernels, policy, measurements, environment)
    pool = _pool(scope, kernels)
    # Neighbours are not logged, not observed, and import no vendor.
    unprobed = (environment or _environment_for(request)).without_probing()

    in_force = policy or scope.policy or Policy.shipped()

    @functools.cache
    def ask(neighbour: Request) -> str | None:
        return _choose(Question(neighbour, kernel, scope, in_force, pool, measurements), unprobed).kernel

    changes = nearest_changes(request, resolution.kernel, ask, in_force.length_bounds)
    return dataclasses.replace(resolution, changes=changes)


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
    policy = policy or scope.policy or Policy.shipped()
    question = Question(request, kernel, scope, policy, _pool(scope, kernels), measurements)
    return _choose(question, environment or _environment_for(request))


def _environment_for(request: Request) -> Environment:
    return Environment(Knowledge.PROBED if request.target.platform == _home_platform() else Knowledge.ASSUMED)


def _home_platform() -> str | None:
    try:
        return home_target().platform
    except Exception as error:  # JAX_PLATFORMS names a backend that is not here; JAX raises various types
        _logger.warning("JAX has no usable backend: %s", error)
        return None


def _pool(scope: Scope, kernels: tuple[KernelSpec, ...] | None) -> dict[str, InstalledKernel]:
    if kernels is None:
        found = installed.registry()
        found.check_usable()
        pool = dict(found.kernels)
    else:
        pool = {spec.name: installed.not_installed(spec, "resolve") for spec in kernels}
    given = {spec.name: installed.not_installed(spec, "use") for spec in scope.kernels}
    return {**pool, **given}


def _choose(question: Question, environment: Environment) -> Resolution:
    plan: Plan | None = None
    laborious: Plan | None = None  # served, but through so much work that any other kernel goes before
    candidates: list[Candidate] = []
    preference = question.preference
    for name in preference.names:
        if name not in question.pool:
            candidates.append(_absent(name, question.pool))
            continue
        looking = environment if plan is None else environment.without_probing()
        chosen = question.pool[name]
        candidate, tiling = consider(chosen, question.request, question.policy, looking, preference.tiling_for(name))
        if plan is None and not candidate.refusals:
            found = Plan(chosen.spec, candidate.steps, question.request, tiling)
            if not question.policy.overworks(found.extra_work) or question.insists_on(name):
                plan = found
            else:
                note = f"its adapters add {found.extra_work:.1f} times the work, so others go before it"
                candidate = dataclasses.replace(candidate, notes=(*candidate.notes, note))
                laborious = laborious or found
        candidates.append(candidate)
    forced = question.forced is not None
    plan = plan or laborious
    return Resolution(question.request, plan, tuple(candidates), preference.rule, preference.excluded, forced)


def _absent(name: str, pool: Mapping[str, InstalledKernel]) -> Candidate:
    remedy = installed.how_to_get(name)
    hint = nearest(name, pool) if remedy is None else ""
    detail = f"no installed plugin brings a kernel of that name{hint}"
    return Candidate(name, "not installed", (Refusal(RefusalCode.NOT_INSTALLED, detail, remedy),))


def _refusal_error(resolution: Resolution) -> NoKernelError:
    others = ", ".join(resolution.excluded)
    advice = [] if resolution.advice is None else [resolution.advice]
    if resolution.forced:
        [asked] = resolution.candidates
        lines = [f"Kernel {asked.name!r} ({resolution.rule}) refuses {resolution.request}.", *_reasons(asked)]
        if others:
            lines.append(f'Other kernels here: {others}; kernel="auto" chooses among them.')
        return KernelRefusedError("\n".join([*lines, *advice]), resolution)
    elsewhere = _of_other_platforms(resolution)
    here = [candidate for candidate in resolution.candidates if candidate.name not in elsewhere]
    lines = [f"No kernel for {resolution.request}.", *(line for candidate in here for line in _reasons(candidate))]
    if elsewhere:
        lines.append(f"  not for {resolution.request.target.platform}: {', '.join(elsewhere)}")
    considered = ", ".join(candidate.name for candidate in here) or "no kernels"
    if not resolution.candidates:
        considered += f" ({installed.why_none()})"
    lines.append(f"Considered: {considered}, by {resolution.rule}.")
    if others:
        lines.append(f"Not considered under this rule: {others}. Force one with kernel=…, or end the rule in 'auto'.")
    return NoKernelError("\n".join([*lines, *advice]), resolution)


def _reasons(candidate: Candidate) -> list[str]:
    return [f"  {candidate.name}: {refusal}" for refusal in candidate.refusals]


def _of_other_platforms(resolution: Resolution) -> tuple[str, ...]:
    """The kernels whose platform is another, where they are so many that one line for all is better."""
    names = tuple(c.name for c in resolution.refused if any(r.code is RefusalCode.PLATFORM for r in c.refusals))
    return names if len(names) > _MOST_ELSEWHERE else ()


def _observe(resolution: Resolution) -> None:
    for plugin, observer in sorted(installed.registry().observers.items()):
        try:
            observer(resolution=resolution)
        except Exception as error:
            warnings.warn(f"kernelry plugin {plugin}: kernelry_resolved raised {error!r}", stacklevel=2)
