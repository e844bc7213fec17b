"""What was decided: the plan, every candidate's refusals, and the rule that decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

from kernelry.errors import KernelRefusedError, NoKernelError, PluginError
from kernelry.execution.adapters.base import Cost
from kernelry.execution.plan import Plan, Step
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.policy.rules import Rule
from kernelry.registry import installed
from kernelry.request.request import Request

if TYPE_CHECKING:
    from kernelry.resolution.nearest_change import Change
    from kernelry.resolution.shards import ShardedResolution

SCHEMA = 1
"""The version of `Resolution.to_json`."""

_MOST_ELSEWHERE = 2
"""Kernels of other platforms that an error describes one by one."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel that was considered.

    Args:
      name: the kernel's.
      distribution: where it comes from, `name version`.
      refusals: why it cannot serve; empty where it can.
      steps: the adapters it would need.
      notes: what was assumed or not looked at.
    """

    name: str
    distribution: str
    refusals: tuple[Refusal, ...]
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "refusals": [refusal.to_json() for refusal in self.refusals],
            "adapters": [step.adapter.name for step in self.steps],
            "notes": list(self.notes),
        }


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Resolution:
    """The answer to a request.

    Args:
      request: what was asked.
      plan: what will run; None where no kernel serves the request.
      candidates: every kernel considered, in order of preference.
      decided_by: the rule that decided the order; where none did, what decided it.
      excluded: installed kernels that were not considered.
      forced: whether a name was asked for, so that no other kernel may take its place.
      changes: for each other kernel that one changed fact would choose, the nearest such change; filled by `explain`.
      shards: of a call on a mesh, what its devices are asked and the answers. Then `plan` is the one of the most pairs
        of shards, and `candidates` are those asked about these pairs.
    """

    request: Request
    plan: Plan | None
    candidates: tuple[Candidate, ...]
    decided_by: Rule | str
    excluded: tuple[str, ...] = ()
    forced: bool = False
    changes: tuple[Change, ...] = ()
    shards: ShardedResolution | None = None

    @property
    def rule(self) -> str:
        """What decided the order, with its source, as text."""
        return str(self.decided_by)

    @property
    def kernel(self) -> str | None:
        """The winner's name."""
        return None if self.plan is None else self.plan.kernel.name

    @property
    def winner(self) -> Candidate | None:
        """The winner."""
        return next((c for c in self.candidates if c.name == self.kernel), None)

    @property
    def refused(self) -> tuple[Candidate, ...]:
        """The candidates that cannot serve the request."""
        return tuple(candidate for candidate in self.candidates if candidate.refusals)

    @property
    def advice(self) -> str | None:
        """What to install or allow where no kernel serves and a missing one would; None elsewhere."""
        there = [c.name for c in self.candidates if all(r.code is not RefusalCode.NOT_INSTALLED for r in c.refusals)]
        if self.plan is not None or (self.forced and not there):
            return None
        return installed.advice_on(self.request, (*there, *self.excluded))

    @property
    def unserved(self) -> str:
        """`no kernel serves it`, with the first reason of each kernel, on one line."""
        reasons = "; ".join(f"{c.name}: {c.refusals[0]}" for c in self.refused)
        return f"no kernel serves it ({reasons or installed.why_none()})"

    @property
    def headline(self) -> str:
        """The decision in one line, as logged."""
        through = "".join(f" through {step.adapter.name}" for step in self.plan.steps) if self.plan else ""
        refused = ", ".join(candidate.name for candidate in self.refused)
        return f"{self.request} → {self.kernel or 'no kernel'}{through} ({self.rule}; refused: {refused or 'none'})"

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """Returns the decision as text: rule, winner, adapters, and every other candidate's reasons."""
        return "\n".join([str(self.request), *_told(self, self.candidates)])

    def verify(self, program: Any) -> None:
        """Checks that a lowered or compiled program contains the chosen kernel's work; see `kernelry.kernel.proof`.

        Args:
          program: what `jax.jit(f).lower(...)` or `.compile()` returned.

        Raises:
          NoKernelError: nothing was resolved.
          PluginError: the signature is missing: something else ran.
        """
        if self.plan is None:
            raise NoKernelError(f"nothing was resolved for {self.request}", self)
        wanted = self.plan.kernel.signature(self.plan.inner_request)
        if isinstance(wanted, str):  # each of its letters is in every program
            raise PluginError(f"kernel {self.kernel!r}: signature must return a tuple of texts, got {wanted!r}.")
        if not wanted:
            raise PluginError(f"kernel {self.kernel!r} has an empty signature: nothing could prove that it ran.")
        from kernelry.kernel.proof import missing  # calls need no proof

        lacking = missing(wanted, program)
        if lacking:
            raise PluginError(
                f"the program does not contain {', '.join(map(repr, lacking))}, the signature of kernel "
                f"{self.kernel!r}: another kernel ran, or this program is not the one that was resolved."
            )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, described in docs/explanations.md; `schema` grows when a key changes its meaning."""
        return {
            "schema": SCHEMA,
            "request": self.request.to_json(),
            "plan": None if self.plan is None else self.plan.to_json(),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "rule": self.rule,
            "excluded": list(self.excluded),
            "forced": self.forced,
            "changes": [change.to_json() for change in self.changes],
            "advice": self.advice,
        }


def answer_of(resolution: Resolution, candidate: Candidate) -> tuple[str, ...]:
    """What a candidate answers, line by line: its refusals, or how it serves the request."""
    if candidate.refusals:
        return (*map(str, candidate.refusals), *candidate.notes)
    answer = "could serve, ranked lower"
    if resolution.plan is not None and candidate.name == resolution.kernel:
        answer = f"chosen with {resolution.plan.tiling}" if resolution.plan.tiling.values else "chosen"
    through = [f"through {step.adapter.name} ({step.cost})" for step in candidate.steps]
    if len(through) > 1:
        through.append(f"adapters together: {sum((step.cost for step in candidate.steps), Cost())}")
    return (answer, *through, *candidate.notes)


def remarks_on(resolution: Resolution) -> tuple[str, ...]:
    """What follows the candidates: kernels that were not considered, changes, and advice."""
    remarks = [f"would be {change}" for change in resolution.changes]
    if resolution.excluded:
        why = "another was asked for" if resolution.forced else "by this rule"
        hint = 'kernel="auto" chooses among them' if resolution.forced else "name one, or end the rule in 'auto'"
        names = ", ".join(resolution.excluded)
        remarks.insert(0, f"not considered, {why}: {names}{'' if resolution.plan else f'; {hint}'}")
    return (*remarks, *([] if resolution.advice is None else [resolution.advice]))


def refusal_error(resolution: Resolution) -> NoKernelError:
    """The error where no kernel serves the request: the explanation, without the reasons of kernels made for others.

    Those kernels share one line where they are more than two.
    """
    elsewhere = [c for c in resolution.refused if any(r.code is RefusalCode.PLATFORM for r in c.refusals)]
    elsewhere = elsewhere if len(elsewhere) > _MOST_ELSEWHERE else []
    told = _told(resolution, [c for c in resolution.candidates if c not in elsewhere], elsewhere)
    if resolution.forced:
        named = resolution.candidates[0].name
        return KernelRefusedError("\n".join([f"Kernel {named!r} refuses {resolution.request}.", *told]), resolution)
    return NoKernelError("\n".join([f"No kernel for {resolution.request}.", *told]), resolution)


def _told(
    resolution: Resolution, candidates: Sequence[Candidate], elsewhere: Sequence[Candidate] = ()
) -> Iterator[str]:
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
