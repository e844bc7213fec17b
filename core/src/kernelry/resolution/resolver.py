"""Picks a kernel for a request: pure, from kernels, policy, measurements and environment; cached."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from typing import TYPE_CHECKING

from kernelry.errors import nearest
from kernelry.execution.adapters.base import itemsize
from kernelry.execution.plan import Plan
from kernelry.kernel.refusal import RefusalCode
from kernelry.kernel.spec import AUTO, Environment, KernelSpec
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import Rule
from kernelry.policy.scope import current_recorders
from kernelry.registry import installed
from kernelry.request.request import Request
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.question import Question, choose

if TYPE_CHECKING:
    from kernelry.policy.lock import Lock
    from kernelry.policy.measurements import Measurements

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
      measurements: times of kernels; None is those of KERNELRY_MEASUREMENTS, or of the user's cache directory.
      environment: vendor facts; None looks on this machine and assumes elsewhere.

    Returns:
      The Resolution; the same object for an equal question.

    Raises:
      NoKernelError: no kernel serves the request.
      KernelRefusedError: the kernel named refuses it.
      PluginError: the kernel named is claimed by two plugins.
      ConfigError: strict mode is on, and this is not what the lock file says.
    """
    return _decided(Question.of(request, kernel, kernels, policy, measurements, environment))


def resolve_call(request: Request, kernel: str) -> Resolution:
    """Resolves a call. Its program is made on this machine, also for another platform.

    Unless a kernel is named, none is chosen whose library is not installed here, though it may be there.

    Args:
      request, kernel: as for `resolve`.

    Raises:
      NoKernelError, KernelRefusedError, PluginError, ConfigError: as `resolve`.
    """
    return _decided(Question.of(request, kernel, None, None, None, None).of_call)


def _decided(question: Question) -> Resolution:
    resolution = _announced(question)
    if resolution.plan is None:
        from kernelry.resolution.telling import refusal_error  # an error alone needs text

        raise refusal_error(resolution)
    lock = question.scope.strict or _lock_of_process()
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
    question = Question.of(request, kernel, kernels, policy, measurements, environment)
    return _explained(question) if changes else _resolved(question)


def explain_call(request: Request, policy: Policy) -> Resolution:
    """Answers as `explain` what `resolve_call` decides under a policy."""
    return _explained(Question.of(request, AUTO, None, policy, None, None).of_call)


def _lock_of_process() -> Lock | None:
    """The lock file of KERNELRY_STRICT and KERNELRY_LOCK."""
    switches = Switches.of_process()
    if not switches.strict:
        return None
    from kernelry.policy.lock import read_once  # strict mode alone needs it

    return read_once(switches.lock)


def clear_cache() -> None:
    """Forgets every resolution."""
    for cached in (_announced, _resolved, _explained):
        cached.cache_clear()


@functools.lru_cache(maxsize=8192)
def _announced(question: Question) -> Resolution:
    """Logs a new resolution and shows it to the observers, once."""
    resolution = _resolved(question)
    _log(resolution, question.policy)
    if question.policy.tilings:
        _warn_of_tilings(tuple(name for name, _ in question.policy.tilings), tuple(sorted(question.pool)))
    for plugin, observer in sorted(installed.registry().observers.items()):
        try:
            observer(resolution=resolution)
        except Exception as error:
            warnings.warn(f"kernelry plugin {plugin}: kernelry_resolved raised {error!r}", stacklevel=2)
    return resolution


@functools.lru_cache(maxsize=512)
def _explained(question: Question) -> Resolution:
    from kernelry.resolution.nearest_change import nearest_changes  # calls look for no changes

    resolution = _resolved(question)
    # Neighbours are not logged, not observed, and import no vendor.
    unprobed = dataclasses.replace(question, environment=question.known_environment.without_probing())

    @functools.cache
    def ask(neighbour: Request) -> str | None:
        return _answer(dataclasses.replace(unprobed, request=neighbour)).kernel

    changes = nearest_changes(question.request, resolution.kernel, ask, question.policy.length_bounds)
    return dataclasses.replace(resolution, changes=changes)


@functools.lru_cache(maxsize=8192)
def _resolved(question: Question) -> Resolution:
    return _answer(question)


def _answer(question: Question) -> Resolution:
    if question.request.sharding is None:
        return choose(question)
    from kernelry.resolution.shards import choose_sharded  # imported where a call is sharded

    return choose_sharded(question)


_ELSEWHERE = frozenset({RefusalCode.PLATFORM, RefusalCode.NOT_INSTALLED, RefusalCode.VENDOR_MISSING})


def _log(resolution: Resolution, policy: Policy) -> None:
    """Logs the decision, adapters that more than double memory, and preferred kernels that were refused.

    Of the shipped preferences only kernels for this platform whose vendor is installed count: a CPU has no use for a
    line about each GPU kernel. A user's rule means what it says.
    """
    if _logger.isEnabledFor(logging.INFO):
        _logger.info("%s", resolution.headline)
    if resolution.plan is None:
        return  # the error tells every reason
    _warn_of_memory(resolution, resolution.plan)
    rule = resolution.decided_by
    if not isinstance(rule, Rule):
        return
    of_user = rule in policy.rules
    for candidate in resolution.candidates:
        if candidate.name == resolution.kernel:
            break
        codes = {refusal.code for refusal in candidate.refusals}
        if candidate.name in rule.names and codes and (of_user or not codes & _ELSEWHERE):
            _logger.warning(
                "preferred kernel %s was refused for %s: %s; %s runs instead",
                candidate.name,
                resolution.request,
                candidate.refusals[0],
                resolution.kernel,
            )


def _warn_of_memory(resolution: Resolution, plan: Plan) -> None:
    if not plan.steps:
        return
    own, extra = array_bytes(plan.request), plan.cost.extra_bytes
    if extra > own:
        _logger.warning(
            "adapters of %s more than double the memory of %s: %s, %.1f MiB on top of the %.1f MiB of its arrays",
            resolution.kernel,
            plan.request,
            ", ".join(step.adapter.name for step in plan.steps),
            extra / 2**20,
            own / 2**20,
        )


def array_bytes(request: Request) -> int:
    """Returns the bytes of query, key, value and output together."""
    rows = request.q_len * request.q_heads + request.kv_len * request.kv_heads
    return int(request.batch * rows * (request.head_dim + request.value_dim) * itemsize(request.dtype))


@functools.lru_cache(maxsize=256)
def _warn_of_tilings(names: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Notices misspelt kernels in `tilings`, once; a plugin may rightly be absent, so this is not an error."""
    for name in names:
        if name not in known:
            _logger.warning("tilings: no installed kernel is called %r%s", name, nearest(name, known))
