"""What was decided: the plan, every candidate's refusals, and the rule that decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

from kernelry.errors import NoKernelError
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


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel that was considered.

    Args:
      name: the kernel's.
      distribution: where it comes from, `name version`.
      refusals: why it does not serve; empty where it would. Reservations are among them unless they were lifted.
      steps: the adapters it would need.
      notes: what was assumed or not looked at.
      reservations: why it is not chosen unless it is named, where it can serve.
    """

    name: str
    distribution: str
    refusals: tuple[Refusal, ...]
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    reservations: tuple[Refusal, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "refusals": [refusal.to_json() for refusal in self.refusals],
            "adapters": [step.adapter.name for step in self.steps],
            "notes": list(self.notes),
            "reservations": [reservation.to_json() for reservation in self.reservations],
        }


@final
class Candidates(Sequence[Candidate]):
    """Candidates of which those behind the winner are asked when somebody looks at them.

    Equal to a tuple of the same candidates. A call needs the winner alone; logs, observers and explanations look.
    """

    __slots__ = ("_asked",)

    def __init__(self, known: tuple[Candidate, ...], others: Callable[[], tuple[Candidate, ...]]) -> None:
        self._asked: tuple[tuple[Candidate, ...], Callable[[], tuple[Candidate, ...]] | None] = known, others

    def _all(self) -> tuple[Candidate, ...]:
        known, others = self._asked  # one attribute, as several threads may look
        if others is not None:
            known, _ = self._asked = (*known, *others()), None
        return known

    def __iter__(self) -> Iterator[Candidate]:
        known, _ = self._asked
        yield from known
        yield from self._all()[len(known) :]

    def __getitem__(self, place: Any) -> Any:
        return self._all()[place]

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, Candidates) else other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self._all(),)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Resolution:
    """The answer to a request.

    Args:
      request: what was asked.
      plan: what will run; None where no kernel serves the request.
      candidates: every kernel considered, in order of preference; those behind the winner are asked when looked at.
      decided_by: the rule that decided the order; where none did, what decided it.
      excluded: installed kernels that were not considered.
      forced: whether a name was asked for, so that no other kernel may take its place.
      changes: for each other kernel that one changed fact would choose, the nearest such change; filled by `explain`.
      shards: of a call on a mesh, what its devices are asked and the answers. Then `plan` is the one of the most pairs
        of shards, and `candidates` are those asked about these pairs.
    """

    request: Request
    plan: Plan | None
    candidates: Sequence[Candidate]
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
    def plans(self) -> tuple[Plan, ...]:
        """All that will run: of a call on a mesh, one for each class of pairs of shards."""
        answers = (self,) if self.shards is None else self.shards.resolutions
        return tuple(answer.plan for answer in answers if answer.plan is not None)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of all kernels that will run, the winner's first."""
        if self.kernel is None:
            return ()
        return tuple(dict.fromkeys([self.kernel, *(plan.kernel.name for plan in self.plans)]))

    @property
    def winner(self) -> Candidate | None:
        """The winner."""
        return next((c for c in self.candidates if c.name == self.kernel), None)

    @property
    def refused(self) -> tuple[Candidate, ...]:
        """The candidates that cannot serve the request, or do not unless they are named."""
        return tuple(candidate for candidate in self.candidates if candidate.refusals)

    @property
    def advice(self) -> str | None:
        """What to install or allow where no kernel serves and a missing one would; None elsewhere."""
        there = [c.name for c in self.candidates if all(r.code is not RefusalCode.NOT_INSTALLED for r in c.refusals)]
        refused_by_strategy = self.request.sharding is not None and self.shards is None  # so that no kernel was asked
        if self.plan is not None or (self.forced and not there) or refused_by_strategy:
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
        chosen = " and ".join([f"{self.kernel or 'no kernel'}{through}", *self.kernels[1:]])
        return f"{self.request} → {chosen} ({self.rule}; refused: {refused or 'none'})"

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """Returns the decision as text: rule, winner, adapters, and every other candidate's reasons."""
        from kernelry.resolution.telling import told  # calls need no text

        return "\n".join([str(self.request), *told(self, self.candidates)])

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
        from kernelry.kernel.proof import check_program  # calls need no proof

        for plan in self.plans:
            check_program(plan.kernel, plan.inner_request, program)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, described in docs/explanations.md; `schema` grows when a key changes its meaning."""
        from kernelry.resolution.telling import shards_json

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
            "shards": shards_json(self),
        }
