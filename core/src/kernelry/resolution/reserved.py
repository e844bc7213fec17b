"""Kernels with reservations: passed over by `auto` although they could serve, and told of where they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Environment, KernelSpec, Tiling
from kernelry.request.request import Request
from kernelry.resolution.explanation import Candidate

_Answer = tuple[Candidate, Tiling]


def with_reservations(
    spec: KernelSpec,
    request: Request,
    environment: Environment,
    ask: Callable[[Environment], _Answer],
    *,
    lifted: bool,
) -> _Answer:
    """Returns a kernel's answer in view of its reservations. No vendor of a kernel that is passed over is probed.

    Args:
      spec: the kernel's.
      request: what is asked; the reservations are about the request inside the adapters.
      environment: vendor facts.
      ask: returns the answer of the kernel apart from its reservations.
      lifted: whether it serves in spite of them.
    """
    answer = ask(environment if lifted else environment.without_probing())
    found = _about(spec, request, answer)
    if not (lifted or found):
        answer = ask(environment)  # it may be chosen, and its vendor may want other adapters
        found = _about(spec, request, answer)
    if not found:
        return answer
    candidate, tiling = answer
    if lifted:
        return dataclasses.replace(candidate, reservations=found), tiling
    refusals = tuple(_with_remedy(reservation, spec.name) for reservation in found)
    return dataclasses.replace(candidate, refusals=refusals, steps=(), reservations=found), Tiling()


def _about(spec: KernelSpec, request: Request, answer: _Answer) -> tuple[Refusal, ...]:
    """The reservations about the request inside the adapters; none where the kernel cannot serve."""
    candidate, _ = answer
    if candidate.refusals:
        return ()
    return reservations_of(spec, candidate.steps[-1].after if candidate.steps else request)


def reservations_of(spec: KernelSpec, request: Request) -> tuple[Refusal, ...]:
    """Returns why a kernel is not chosen for a request unless it is named; that it cannot say is a reason too."""
    try:
        found = tuple(spec.reservations(request))
        if all(isinstance(reservation, Refusal) for reservation in found):
            return found
        raise TypeError(f"expected Refusals, got {found!r}")
    except Exception as error:
        detail = f"its reservations raised {error!r}"
        return (Refusal(RefusalCode.FAULT, detail, "report it to the kernel's authors"),)


def _with_remedy(reservation: Refusal, kernel: str) -> Refusal:
    lifting = f'it serves with kernel="{kernel}", a rule that lists it, or KERNELRY_EXPERIMENTAL=1'
    remedy = f"{reservation.remedy}; {lifting}" if reservation.remedy else lifting
    return dataclasses.replace(reservation, remedy=remedy)
