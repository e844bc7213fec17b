"""Makes the list of cases of a kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NoReturn

from kernelry.kernel.spec import KernelSpec
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.compare import SANE, oracle, tolerance_for, verify
from kernelry.testing.conformance.dropout import dropout_cases
from kernelry.testing.conformance.longer import longer_calls
from kernelry.testing.conformance.negative import negative_cases, undeclared_calls
from kernelry.testing.conformance.partials import partial_cases, statistics_calls
from kernelry.testing.conformance.positive import Named, masked, named_calls, why_not_float64
from kernelry.testing.conformance.report import DECLARATIONS, Case, Outcome, Skip, Verdict
from kernelry.testing.conformance.stored_calls import stored_calls
from kernelry.testing.conformance.subject import Subject
from kernelry.testing.conformance.transforms import transform_cases

_MOST_WHEN_SLOW = 12
"""Calls of an interpreted kernel in a quick run; the first call of every claim is always among them."""

_DIFFERENTIATED = 3
"""One of so many masks of an interpreted kernel has gradients in a quick run; interpreting a backward takes longest."""

_MOST_ADAPTED = 2


def cases_of(spec: KernelSpec, quick: bool = False) -> tuple[Case, ...]:
    """Returns the cases of a kernel, from its capabilities alone; the same list each time.

    Args:
      spec: the kernel.
      quick: a thinned subset that still has every claim.
    """
    subject = Subject.of(spec, quick)
    base = subject.base
    cases = [*_declaration_cases(subject)]
    if base is None:
        base = subject.plainest
        cases.append(Case("serves a plain call", "output", functools.partial(_serves_nothing, subject, base)))
        return (*cases, *negative_cases(subject, base))
    cases += _call_cases(subject, base)
    cases += partial_cases(subject, base)
    cases += dropout_cases(subject, base)
    cases += transform_cases(subject, masked(subject, base))
    cases += _adapted_cases(subject, base)
    return (*cases, *negative_cases(subject, base))


def _declaration_cases(subject: Subject) -> Iterator[Case]:
    for dtype in sorted(subject.can.dtypes & SANE.keys()):
        yield Case(f"a sane tolerance for {dtype}", DECLARATIONS, functools.partial(_sane, subject, dtype))
    yield Case("a signature", DECLARATIONS, functools.partial(_signed, subject))


def _sane(subject: Subject, dtype: str) -> None:
    sane, mine = SANE[dtype], [t for t in subject.can.tolerances if t.dtype == dtype]
    if not mine and dtype == "float64":
        raise Skip("no tolerance is declared for float64; that of float32 statistics applies")
    assert mine, f"it takes {dtype} and declares no tolerance for it"
    for tolerance in mine:
        found = f"forward={tolerance.forward}, gradient={tolerance.gradient}"
        small = 0 < tolerance.forward <= sane.forward and 0 < tolerance.gradient <= sane.gradient
        assert small, f"{found} for {dtype} would hide errors; the most is {sane.forward} and {sane.gradient}"


def _signed(subject: Subject) -> Verdict:
    texts = subject.spec.signature((subject.base or subject.plainest).request(subject.host))
    assert texts, "its signature is empty, so that its programs do not show whether it ran"
    return Outcome.PASSED, ", ".join(texts)


def _serves_nothing(subject: Subject, base: AttentionCall) -> NoReturn:
    reasons = "; ".join(map(str, subject.refusals(base)))
    raise AssertionError(f"it serves no plain call at any of the lengths, dtypes and modes tried: {reasons}")


def _call_cases(subject: Subject, base: AttentionCall) -> list[Case]:
    named = [*named_calls(subject, base), *statistics_calls(subject, base), *stored_calls(subject, base)]
    if not subject.quick:
        named += longer_calls(subject, base)
    if subject.quick:
        named = _at_most(named, 3)
    if subject.quick and subject.is_slow and len(named) > _MOST_WHEN_SLOW:
        firsts = {claim: index for index, (claim, _, _) in reversed([*enumerate(named)])}
        others = [index for index in range(len(named)) if index not in firsts.values()]
        masks = {index for index, (claim, _, _) in enumerate(named) if claim == "masks"}
        kept = {*firsts.values(), *masks, *others[: max(0, _MOST_WHEN_SLOW - len(firsts))]}
        forward = masks - set(sorted(masks)[::_DIFFERENTIATED])
        named = [_forward(entry) if index in forward else entry for index, entry in enumerate(named) if index in kept]
    return [Case(name, claim, functools.partial(_right, subject, claim, calls)) for claim, name, calls in named]


def _forward(entry: Named) -> Named:
    """The same calls without gradients, as far as the kernel serves them so."""
    claim, name, calls = entry
    return claim, name, (*_without_gradients(calls), *calls)


def _without_gradients(calls: tuple[AttentionCall, ...]) -> tuple[AttentionCall, ...]:
    return tuple(dataclasses.replace(call, gradients=frozenset()) for call in calls)


def _at_most(named: list[Named], most: int) -> list[Named]:
    """The first few cases of each claim, and all masks and positions, as each of those shows something else."""
    kept: list[Named] = []
    for entry in named:
        claim = entry[0]
        if claim in ("masks", "positions") or sum(other[0] == claim for other in kept) < most:
            kept.append(entry)
    return kept


def _right(subject: Subject, claim: str, calls: tuple[AttentionCall, ...]) -> Verdict:
    """Compares the first call that is served with the oracle; through adapters where the kernel alone serves none.

    Where none is served with its gradients, and they are not what is claimed, the forward pass is compared.
    """
    forms = (calls,) if claim == "gradients" else (calls, _without_gradients(calls))
    call, adapters = next((found for form in forms if (found := _served(subject, form))), (None, False))
    if call is None:
        reasons = "; ".join(map(str, subject.refusals(calls[0])))
        raise Skip(f"declared, but every call that would show it is refused: {reasons}")
    for why_not in (why_not_float64(call), subject.host.why_not):
        if why_not is not None:
            raise Skip(why_not)
    answer = subject.bench.answer(call, adapters=adapters)
    verify(answer, oracle(call), call, tolerance_for(subject.can, call))
    return Outcome.PASSED, "through adapters" if adapters else ""


def _served(subject: Subject, calls: tuple[AttentionCall, ...]) -> tuple[AttentionCall, bool] | None:
    """The first call that is served, and whether only through adapters."""
    call = subject.first(calls)
    if call is not None:
        return call, False
    call = next((call for call in calls if subject.serves_adapted(call)), None)
    return None if call is None else (call, True)


def _adapted_cases(subject: Subject, base: AttentionCall) -> Iterator[Case]:
    """What the kernel does not declare and adapters supply, which must be right as well."""
    if subject.host.why_not is not None:
        return
    most, found = (1 if subject.is_slow else _MOST_ADAPTED) if subject.quick else None, 0
    for name, call, _ in undeclared_calls(subject, base):
        if call.dropout_rate or why_not_float64(call) or found == most:
            continue
        if not subject.serves_adapted(call):
            continue
        found += 1
        yield Case(f"through adapters: {name}", "adapters", functools.partial(_right, subject, "adapters", (call,)))
