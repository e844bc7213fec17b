"""Asks one kernel whether it can serve a request, with adapters where they help."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kernelry.composition import compose
from kernelry.environment import Environment
from kernelry.errors import ConfigError
from kernelry.kernel import KernelSpec, Tiling
from kernelry.policy import Policy
from kernelry.refusal import Refusal, RefusalCode
from kernelry.request import Request
from kernelry.resolution import Candidate

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
    refuse = functools.partial(_refusals, spec, environment)
    steps, refusals = compose(request, spec.capabilities, refuse, policy.forbidden_adapters)
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
