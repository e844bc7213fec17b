"""What was decided: the plan, every candidate's refusals, and the rule that decided."""

from __future__ import annotations

import dataclasses
from typing import Any, final

from kernelry.errors import NoKernelError, PluginError
from kernelry.execution.plan import Plan, Step
from kernelry.kernel.proof import missing
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.registry import installed
from kernelry.request.request import Request
from kernelry.resolution.nearest_change import Change

SCHEMA = 1
"""The version of `Resolution.to_json`."""


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
      rule: what decided the order, with its source.
      excluded: installed kernels that the deciding rule did not let in.
      forced: whether a name was asked for, so that no other kernel may take its place.
      changes: for each other kernel that one changed fact would choose, the nearest such change; filled by `explain`.
    """

    request: Request
    plan: Plan | None
    candidates: tuple[Candidate, ...]
    rule: str
    excluded: tuple[str, ...] = ()
    forced: bool = False
    changes: tuple[Change, ...] = ()

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
        """Returns the decision as text: winner, adapters, rule, and every other candidate's reasons."""
        lines = [f"{self.request}"]
        lines.append(f"  decided by: {self.rule}")
        for candidate in self.candidates:
            lines.extend(self._lines(candidate))
        if self.excluded:
            lines.append(f"  not considered under this rule: {', '.join(self.excluded)}")
        lines.extend(f"  would be {change}" for change in self.changes)
        if self.advice is not None:
            lines.append(f"  {self.advice}")
        return "\n".join(lines)

    def _lines(self, candidate: Candidate) -> list[str]:
        notes = f" ({'; '.join(candidate.notes)})" if candidate.notes else ""
        if self.plan is not None and candidate.name == self.kernel:
            tiling = f" with {self.plan.tiling}" if self.plan.tiling.values else ""
            through = [f"      through {step.adapter.name} ({step.cost})" for step in self.plan.steps]
            total = [f"      adapters together: {self.plan.cost}"] if len(self.plan.steps) > 1 else []
            return [f"  → {candidate.name} [{candidate.distribution}]{tiling}{notes}", *through, *total]
        if not candidate.refusals:
            needed = "".join(f" through {step.adapter.name}" for step in candidate.steps)
            return [f"    {candidate.name}: could serve{needed}, ranked lower{notes}"]
        return [f"    {candidate.name}: {refusal}{notes}" for refusal in candidate.refusals]

    def verify(self, program: Any) -> None:
        """Checks that a lowered or compiled program contains the chosen kernel's work; see `kernelry.proof`.

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
