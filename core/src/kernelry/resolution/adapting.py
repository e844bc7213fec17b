"""Asks one kernel whether it can serve a request, through the cheapest adapters where it cannot serve it directly.

A best-first search over chains of adapters: fewest extra bytes, then fewest extra FLOPs, then the fewest adapters, then
their names. A chain may use an adapter twice, because a kernel shows its own refusals only when core has none: equal
lengths first, then lengths in multiples. The search is bounded and depends on nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, final

from kernelry.errors import ConfigError
from kernelry.execution.adapters.base import CURED_ON_KEYS, Adapter, Cost
from kernelry.execution.plan import Step
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Environment, KernelSpec, Tiling
from kernelry.policy.policy import Policy
from kernelry.request.request import Request
from kernelry.resolution.explanation import Candidate

if TYPE_CHECKING:
    from kernelry.policy.measurements import Evidence
    from kernelry.registry.contents import InstalledKernel

_MOST_CHAINS = 128
"""Chains of adapters looked at for one kernel; five adapters that all apply have 2⁵ = 32 sets."""

_MOST_USES = 2
"""Times that one chain may use an adapter."""

_NO_COST = Cost()

Refuse = Callable[[Request, frozenset[RefusalCode]], tuple[Refusal, ...]]
"""Asks a kernel about a request; refusals with settled codes do not count."""


def consider(
    installed: InstalledKernel,
    request: Request,
    policy: Policy,
    environment: Environment,
    overrides: tuple[tuple[str, int], ...],
    timed: Evidence | None = None,
) -> tuple[Candidate, Tiling]:
    """Returns a kernel's answer, and the tiling it would run with.

    Args:
      installed: the kernel.
      request: what is asked.
      policy: may forbid adapters.
      environment: vendor facts, probed or assumed.
      overrides: tunables set by a rule or a scope.
      timed: times of kernels, whose tilings take precedence over the kernel's default.
    """
    spec = installed.spec
    environment = environment.fresh()
    refuse = functools.partial(_refusals, spec, environment)
    steps, refusals = compose(request, spec.capabilities, refuse, policy.forbidden_adapters)
    tiling = Tiling()
    if not refusals:
        took = timed.tilings.get(spec.name, {}) if timed else {}
        tiling, refusals = _tile(spec, steps[-1].after if steps else request, overrides, took)
    notes = (f"vendor: {environment.knowledge.value}",) if environment.left_open and not refusals else ()
    notes = (*notes, *timed.notes(spec.name)) if timed else notes
    return Candidate(spec.name, installed.distribution, refusals, () if refusals else steps, notes), tiling


def _tile(
    spec: KernelSpec, request: Request, overrides: tuple[tuple[str, int], ...], took: Mapping[Tiling, tuple[float, ...]]
) -> tuple[Tiling, tuple[Refusal, ...]]:
    try:
        tilings = spec.tilings(request)
        chosen = min((tiling for tiling in tilings if tiling in took), key=took.__getitem__, default=tilings[0])
        return chosen.replace(dict(overrides), spec.name), ()
    except ConfigError as error:
        return Tiling(), (Refusal(RefusalCode.TILING, str(error)),)
    except Exception as error:
        return Tiling(), (Refusal(RefusalCode.FAULT, f"its tilings raised {error!r}"),)


def _refusals(
    spec: KernelSpec, environment: Environment, request: Request, settled: frozenset[RefusalCode]
) -> tuple[Refusal, ...]:
    """The capabilities' refusals; where there are none, the kernel's own. Settled codes do not count."""
    try:
        declared = tuple(r for r in spec.capabilities.refusals(request) if r.code not in settled)
        if declared:
            return declared
        own = tuple(spec.refusals(request, environment))
        if not all(isinstance(refusal, Refusal) for refusal in own):
            raise TypeError(f"expected Refusals, got {own!r}")
        return tuple(refusal for refusal in own if refusal.code not in settled)
    except Exception as error:
        return (Refusal(RefusalCode.FAULT, f"its refusals raised {error!r}", "report it to the kernel's authors"),)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """Adapters applied so far, outermost first, and what the kernel inside is asked."""

    request: Request
    steps: tuple[Step, ...] = ()
    settled: frozenset[RefusalCode] = frozenset()
    cost: Cost = _NO_COST

    @property
    def order(self) -> tuple[Cost, int, tuple[str, ...]]:
        return self.cost, len(self.steps), tuple(step.adapter.name for step in self.steps)

    def through(self, adapter: Adapter, after: Request) -> _Chain:
        step = Step(adapter, self.request, after)
        return _Chain(after, (*self.steps, step), self.settled | adapter.settles, self.cost + step.cost)

    def used_up(self, adapter: Adapter) -> bool:
        return sum(step.adapter is adapter for step in self.steps) >= _MOST_USES


def compose(
    request: Request, capabilities: Capabilities, refuse: Refuse, forbidden: frozenset[str]
) -> tuple[tuple[Step, ...], tuple[Refusal, ...]]:
    """Returns the adapters, outermost first, or the refusals that none can cure.

    Args:
      request: what is asked.
      capabilities: the kernel's.
      refuse: asks the kernel.
      forbidden: names of adapters that must not be used.
    """
    waiting = [(_Chain(request).order, _Chain(request))]
    seen: set[tuple[Request, frozenset[RefusalCode]]] = set()
    stuck: tuple[Refusal, ...] | None = None
    original: tuple[Refusal, ...] = ()
    for _ in range(_MOST_CHAINS):
        if not waiting:
            break
        _, chain = heapq.heappop(waiting)
        if (chain.request, chain.settled) in seen:
            continue
        seen.add((chain.request, chain.settled))
        refusals = refuse(chain.request, chain.settled)
        if not refusals:
            return chain.steps, ()
        original = original if chain.steps else refusals
        helpful = _helpful(chain, refusals, capabilities)
        incurable = _incurable(refusals, helpful, forbidden)
        if incurable:
            stuck = incurable if stuck is None or len(incurable) < len(stuck) else stuck
            continue
        allowed = tuple((adapter, after) for adapter, after in helpful if adapter.name not in forbidden)
        for adapter, after in _certain(allowed, refusals) or allowed:
            longer = chain.through(adapter, after)
            heapq.heappush(waiting, (longer.order, longer))
    asked = {(refusal.code, refusal.detail) for refusal in original}
    if stuck is None or not any((refusal.code, refusal.detail) in asked for refusal in stuck):
        return (), (*original, *(stuck or ()))  # what adapters led to explains nothing without what they were for
    return (), stuck


_Helpful = tuple[tuple[Adapter, Request], ...]


def _helpful(chain: _Chain, refusals: tuple[Refusal, ...], capabilities: Capabilities) -> _Helpful:
    """The adapters that may be used and cure some refusal, forbidden ones included, and what they would ask."""
    from kernelry.execution.adapters.order import ADAPTERS  # not needed where the kernel asked for refuses nothing

    codes = {refusal.code for refusal in refusals}
    plain = chain.request.has_plain_kv
    fitting = (adapter for adapter in ADAPTERS if not adapter.cures.isdisjoint(codes))
    tried = (adapter for adapter in fitting if (plain or not adapter.on_keys) and not chain.used_up(adapter))
    asked = ((adapter, adapter.rewrite(chain.request, capabilities, refusals)) for adapter in tried)
    return tuple((adapter, after) for adapter, after in asked if after is not None and _changes(chain, adapter, after))


def _certain(helpful: _Helpful, refusals: tuple[Refusal, ...]) -> _Helpful:
    """The first adapter that settles a refusal, or has a duty, and that no other could replace; else none.

    It is in every chain from here on, and changes nothing for the adapters of arrays, so its position does not matter
    either: without this, each such adapter would double the chains looked at.
    """
    for refusal in refusals:
        curing = tuple(found for found in helpful if refusal.code in found[0].cures)
        if len(curing) == 1 and (curing[0][0].settles or curing[0][0].duty):
            return curing
    return ()


def _changes(chain: _Chain, adapter: Adapter, after: Request) -> bool:
    return after != chain.request or not adapter.settles <= chain.settled


def _incurable(refusals: tuple[Refusal, ...], helpful: _Helpful, forbidden: frozenset[str]) -> tuple[Refusal, ...]:
    """The refusals for which no adapter is left; where a forbidden one would help, they say so."""
    cured = {code for adapter, _ in helpful if adapter.name not in forbidden for code in adapter.cures}
    return tuple(_with_hint(refusal, helpful, forbidden) for refusal in refusals if refusal.code not in cured)


def _with_hint(refusal: Refusal, helpful: _Helpful, forbidden: frozenset[str]) -> Refusal:
    forbidden_ones = (adapter for adapter, _ in helpful if adapter.name in forbidden)
    names = [adapter.name for adapter in forbidden_ones if refusal.code in _cured_alone(adapter)]
    if not names:
        return refusal
    hint = f"{' or '.join(names)} would help, which the policy forbids"
    return dataclasses.replace(refusal, remedy=f"{refusal.remedy}; {hint}" if refusal.remedy else hint)


def _cured_alone(adapter: Adapter) -> frozenset[RefusalCode]:
    """What it cures by itself: the adapters that make keys plain only let others cure the rest."""
    return adapter.cures - CURED_ON_KEYS if adapter.cures > CURED_ON_KEYS else adapter.cures
