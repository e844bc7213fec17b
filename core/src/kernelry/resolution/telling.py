"""A resolution as text: what explanations, the command and errors say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kernelry.errors import KernelRefusedError, NoKernelError
from kernelry.execution.adapters.base import Cost
from kernelry.kernel.refusal import RefusalCode
from kernelry.registry import installed
from kernelry.resolution.explanation import Candidate, Resolution

_MOST_ELSEWHERE = 2
"""Kernels of other platforms that an error describes one by one."""


def told_of_shards(resolution: Resolution) -> tuple[str, ...]:
    """What the devices of a call on a mesh do, line by line; nothing on one device."""
    if resolution.shards is None:
        return ()
    from kernelry.resolution.account import told_shards  # a call on one device needs no account of several

    return tuple(told_shards(resolution))


def shards_json(resolution: Resolution) -> dict[str, Any] | None:
    """The same as plain data; None on one device."""
    if resolution.shards is None:
        return None
    from kernelry.resolution.account import data_of_shards

    return data_of_shards(resolution)


def answer_of(resolution: Resolution, candidate: Candidate) -> tuple[str, ...]:
    """What a candidate answers, line by line: its refusals, or how it serves the request."""
    if candidate.refusals:
        passed_over = "passed over: " if candidate.reservations else ""
        return (*(f"{passed_over}{refusal}" for refusal in candidate.refusals), *candidate.notes)
    answer = "could serve, ranked lower"
    if resolution.plan is not None and candidate.name == resolution.kernel:
        tiling = resolution.plan.tiling
        said = f" ({tiling.source})" if tiling.source else ""
        answer = f"chosen with {tiling}{said}" if tiling.values else "chosen"
    through = [f"through {step.adapter.name} ({step.cost})" for step in candidate.steps]
    if len(through) > 1:
        through.append(f"adapters together: {sum((step.cost for step in candidate.steps), Cost())}")
    reservations = (f"reservation: {reservation}" for reservation in candidate.reservations)
    return (answer, *through, *reservations, *candidate.notes)


def left_out_of(resolution: Resolution) -> str | None:
    """The kernels that were not considered, and why; None where all were."""
    if not resolution.excluded:
        return None
    why = "another was asked for" if resolution.forced else "by this rule"
    hint = 'kernel="auto" chooses among them' if resolution.forced else "name one, or end the rule in 'auto'"
    names = ", ".join(resolution.excluded)
    return f"not considered, {why}: {names}{'' if resolution.plan else f'; {hint}'}"


def remarks_on(resolution: Resolution) -> tuple[str, ...]:
    """What follows the candidates: kernels that were not considered, changes, and advice."""
    remarks = (left_out_of(resolution), *(f"would be {change}" for change in resolution.changes), resolution.advice)
    return tuple(remark for remark in remarks if remark is not None)


def refusal_error(resolution: Resolution) -> NoKernelError:
    """The error where no kernel serves the request: the explanation, without the reasons of kernels made for others.

    Those kernels share one line where they are more than two.
    """
    elsewhere = [c for c in resolution.refused if any(r.code is RefusalCode.PLATFORM for r in c.refusals)]
    elsewhere = elsewhere if len(elsewhere) > _MOST_ELSEWHERE else []
    answers = told(resolution, [c for c in resolution.candidates if c not in elsewhere], elsewhere)
    if resolution.forced:
        named = resolution.candidates[0].name
        return KernelRefusedError("\n".join([f"Kernel {named!r} refuses {resolution.request}.", *answers]), resolution)
    return NoKernelError("\n".join([f"No kernel for {resolution.request}.", *answers]), resolution)


def told(resolution: Resolution, candidates: Sequence[Candidate], elsewhere: Sequence[Candidate] = ()) -> Iterator[str]:
    """A resolution line by line: the devices of a mesh, the rule, the candidates' answers, and what follows them.

    Args:
      resolution: the resolution.
      candidates: those whose answers are told.
      elsewhere: those that share one line.
    """
    yield from (f"  {line}" for line in told_of_shards(resolution))
    yield f"  decided by: {resolution.rule}"
    for candidate in candidates:
        mark, source = ("→", f" [{candidate.distribution}]") if candidate.name == resolution.kernel else (" ", "")
        first, *more = answer_of(resolution, candidate)
        yield f"  {mark} {candidate.name}{source}: {first}"
        yield from (f"      {line}" for line in more)
    if elsewhere:
        yield f"    not for {resolution.request.target.platform}: {', '.join(c.name for c in elsewhere)}"
    if not candidates and not elsewhere:
        yield f"    no kernels: {installed.why_none()}"
    yield from (f"  {remark}" for remark in remarks_on(resolution))
