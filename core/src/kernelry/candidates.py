"""Asks one kernel whether it can serve a request, with adapters where they help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelry.adapters import ADAPTERS
from kernelry.environment import Environment
from kernelry.errors import ConfigError
from kernelry.kernel import KernelSpec, Tiling
from kernelry.policy import Policy
from kernelry.refusal import Refusal, RefusalCode
from kernelry.request import Request
from kernelry.resolution import Candidate, Step

if TYPE_CHECKING:
    from kernelry.catalogue import InstalledKernel


def consider(
    installed: InstalledKernel,
    request: Request,
    policy: Policy,
    environment: Environment,
    overrides: tuple[tuple[str, int], ...],
) -> tuple[Candidate, Tiling]:
    """Returns a kernel's answer, and the tiling it would run with.

    Args:
      installed: the kernel.
      request: what is asked.
      policy: may forbid adapters.
      environment: vendor facts, looked at or assumed.
      overrides: tunables set by a rule or a scope.
    """
    spec = installed.spec
    environment = environment.fresh()
    steps, refusals = _adapt(spec, request, policy, environment)
    tiling = Tiling()
    if not refusals:
        tiling, refusals = _tile(spec, steps[-1].after if steps else request, overrides)
    notes = (f"vendor: {environment.knowledge.value}",) if environment.left_open and not refusals else ()
    return Candidate(spec.name, installed.distribution, refusals, () if refusals else steps, notes), tiling


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
        after = adapter.rewrite(request, spec.capabilities, refusals)
        if after is not None:
            yield Step(adapter, request, after)


def _refusals(spec: KernelSpec, request: Request, environment: Environment) -> tuple[Refusal, ...]:
    """The capabilities' refusals; where there are none, the kernel's own."""
    try:
        declared = spec.capabilities.refusals(request)
        if declared:
            return declared
        own = tuple(spec.refusals(request, environment))
        if not all(isinstance(refusal, Refusal) for refusal in own):
            raise TypeError(f"expected Refusals, got {own!r}")
        return own
    except Exception as error:
        return (Refusal(RefusalCode.FAULT, f"its refusals raised {error!r}", "report it to the kernel's authors"),)
