"""A question: a request with everything that decides which kernel it gets; the order of the kernels, and the choice."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from kernelry.errors import ArgumentError, nearest
from kernelry.execution.plan import Plan
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import AUTO, Environment, KernelSpec, Knowledge, check_kernel_name, no_reservations
from kernelry.policy.policy import Policy, check_policy, measurements_of_process
from kernelry.policy.rules import Rule, first_match
from kernelry.policy.scope import Scope, current_scope
from kernelry.registry import installed
from kernelry.request.request import Request
from kernelry.request.target import home_target
from kernelry.resolution.adapting import consider
from kernelry.resolution.explanation import Candidate, Candidates, Resolution

if TYPE_CHECKING:
    from kernelry.kernel.spec import Tiling
    from kernelry.policy.measurements import Evidence, Measurements
    from kernelry.registry.contents import InstalledKernel

_Pool = Mapping[str, "InstalledKernel"]
_logger = logging.getLogger("kernelry")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What is asked, under which circumstances: equal questions have one answer.

    Args:
      request: the static facts of the call.
      kernel: a name, absolutely, or `auto`.
      kernels: the kernels to choose among, besides those of `scope`; None is the installed ones.
      scope: what the surrounding `use` says.
      policy: the preferences in force.
      measurements: the times that may decide; None is none.
      environment: vendor facts; None looks on this machine's platform and assumes elsewhere.
    """

    request: Request
    kernel: str
    kernels: tuple[KernelSpec, ...] | None
    scope: Scope
    policy: Policy
    measurements: Measurements | None
    environment: Environment | None

    def __hash__(self) -> int:
        return hash((self.request, self.kernel, self.policy))  # hashes that are kept; these tell questions apart

    @classmethod
    def of(
        cls,
        request: Request,
        kernel: str,
        kernels: tuple[KernelSpec, ...] | None,
        policy: Policy | None,
        measurements: Measurements | None,
        environment: Environment | None,
    ) -> Question:
        """Asks in the circumstances of the caller.

        Raises:
          ArgumentError: the request, the kernel's name or the policy is of another kind.
        """
        if not isinstance(request, Request):
            raise ArgumentError(
                f"request must be a kernelry.Request, e.g. Request(q_len=1024, target='gpu:h100'), got "
                f"{type(request).__name__}."
            )
        check_kernel_name(kernel)
        check_policy(policy)
        scope = current_scope()
        policy = policy or scope.policy or Policy.of_process()
        measurements = measurements_of_process() if measurements is None else measurements
        return cls(request, kernel, kernels, scope, policy, measurements, environment)

    @property
    def known_environment(self) -> Environment:
        """The vendor facts; on this machine's platform found by looking."""
        if self.environment is not None:
            return self.environment
        here = self.request.target.platform == _home_platform()
        return Environment(Knowledge.PROBED if here else Knowledge.ASSUMED)

    @property
    def of_call(self) -> Question:
        """The same of a call, whose program is made here: what is chosen for another platform must be installed."""
        known = self.known_environment
        if known.knowledge is not Knowledge.ASSUMED or self.forced is not None:
            return self
        return dataclasses.replace(self, environment=dataclasses.replace(known, made_here=True))

    @property
    def forced(self) -> tuple[str, str] | None:
        """The kernel that must run and who says so; None where a choice is left."""
        if self.kernel != AUTO:
            return self.kernel, f"kernel={self.kernel!r} was asked for"
        if self.scope.kernel is not None:
            return self.scope.kernel, f"use({self.scope.kernel!r}) is in force"
        if self.policy.kernel is not None:
            return self.policy.kernel, f"KERNELRY_KERNEL={self.policy.kernel}"
        return None

    @property
    def pool(self) -> dict[str, InstalledKernel]:
        """The kernels to choose among, by name."""
        if self.kernels is None:
            found = installed.registry()
            if found.faults:
                found.check_usable()
            pool = dict(found.kernels)
        else:
            pool = {spec.name: installed.not_installed(spec, "resolve") for spec in self.kernels}
        given = {spec.name: installed.not_installed(spec, "use") for spec in self.scope.kernels}
        return {**pool, **given}

    def order(self, pool: _Pool) -> Order:
        """Returns the kernels to try: the one forced, those of a user's rule, or all.

        Raises:
          PluginError: a kernel named is claimed by two plugins, or cannot be used.
        """
        timed = None if self.measurements is None else self.measurements.about(self.request, pool)
        if self.forced is not None:
            name, why = self.forced
            _check_names((name,), pool)
            return Order((name,), why, tuple(sorted(pool.keys() - {name})), frozenset({name}), timed, is_forced=True)
        ranked, default, votes = self._ranked(pool, timed)
        rule = first_match(self.policy.rules, self.request)
        if rule is None:
            return Order(ranked, default, timed=timed, ranked_by=timed, votes=votes)
        _check_names(rule.names, pool)
        rest = tuple(name for name in ranked if name not in rule.names)
        tried, excluded = ((), rest) if rule.is_exhaustive else (rest, ())
        return Order((*rule.names, *tried), rule, excluded, frozenset(rule.names), timed)

    def _ranked(self, pool: _Pool, timed: Evidence | None) -> tuple[tuple[str, ...], Rule | str, Votes]:
        """Orders all kernels: by time, votes, the shipped policy, then name.

        Returns:
          Their names, what decides for kernels without a time and without votes, and the votes.
        """
        votes = _votes(self.request, tuple(sorted(pool)))
        default = first_match(self.policy.defaults, self.request)
        preferred, fastest = default.names if default else (), timed.names if timed else ()

        def rank(name: str) -> tuple[int, int, int, str]:
            return _position(name, fastest), -votes.points.get(name, 0), _position(name, preferred), name

        return tuple(sorted(pool, key=rank)), default or "by name", votes

    def tiling_for(self, name: str, decided_by: Rule | str) -> tuple[tuple[str, int], ...]:
        """The tunables set for a kernel: the policy's for that kernel, then the rule's, then the scope's.

        What comes later wins. A rule's are only for the kernels it names, a scope's for all.
        """
        own = dict(self.policy.tilings).get(name, ())
        ruled = decided_by.tiling if isinstance(decided_by, Rule) and name in decided_by.names else ()
        return tuple(sorted({**dict(own), **dict(ruled), **dict(self.scope.tiling)}.items()))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Votes:
    """What plugins say of a request.

    Args:
      points: of each kernel that was named, summed over the plugins.
      voters: the plugins that named some, with their sources.
    """

    points: Mapping[str, int] = dataclasses.field(default_factory=dict)
    voters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"votes of plugins: {', '.join(self.voters)}"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """The kernels to try, best first.

    Args:
      names: theirs.
      decided_by: the rule; where none decides, what does for kernels without a time and without votes.
      excluded: the other kernels, which must not be tried.
      named: the kernels that were asked for by name, which lifts their reservations.
      timed: the times of kernels; None where there are none.
      is_forced: whether one kernel was asked for by name.
      ranked_by: the times, where they come first.
      votes: those of plugins, where they come before the shipped policy.
    """

    names: tuple[str, ...]
    decided_by: Rule | str
    excluded: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()
    timed: Evidence | None = None
    is_forced: bool = False
    ranked_by: Evidence | None = None
    votes: Votes | None = None

    def approves(self, name: str) -> bool:
        """Whether a kernel was named or measured, so that the work of its adapters does not demote it."""
        return name in self.named or (self.timed is not None and name in self.timed.measured)

    def why(self, name: str | None) -> Rule | str:
        """What decides for a kernel: times, where it has one, else votes, where it has some."""
        if self.ranked_by and name in self.ranked_by.names:
            return str(self.ranked_by)
        return str(self.votes) if self.votes and name in self.votes.points else self.decided_by


def choose(question: Question) -> Resolution:
    """Asks the kernels in order and chooses the first that serves, or none; the others are asked when looked at."""
    fallback: Plan | None = None  # the best of those that serve through too much work
    candidates: list[Candidate] = []
    pool, environment = question.pool, question.known_environment
    order = question.order(pool)
    for place, name in enumerate(order.names, 1):
        candidate, plan = _asked(name, question, order, pool, environment)
        if plan is not None and (order.approves(name) or not question.policy.demotes(plan.extra_work)):
            others = functools.partial(_others, order.names[place:], question, order, pool, environment)
            found = Candidates((*candidates, candidate), others)
            return Resolution(question.request, plan, found, order.why(name), order.excluded, order.is_forced)
        if plan is not None:
            note = f"its adapters add {plan.extra_work:.1f} times the work: ranked below kernels that need less"
            candidate = dataclasses.replace(candidate, notes=(*candidate.notes, note))
            fallback = fallback or plan
        candidates.append(candidate)
    why = order.why(fallback.kernel.name if fallback else None)
    return Resolution(question.request, fallback, tuple(candidates), why, order.excluded, order.is_forced)


def _asked(
    name: str, question: Question, order: Order, pool: _Pool, environment: Environment
) -> tuple[Candidate, Plan | None]:
    """A kernel's answer, and its plan where it serves."""
    if name not in pool:
        return _absent(name, pool), None
    tunables = question.tiling_for(name, order.why(name))
    spec, request, policy = pool[name].spec, question.request, question.policy

    def ask(where: Environment) -> tuple[Candidate, Tiling]:
        return consider(pool[name], request, policy, where, tunables, order.timed)

    if spec.reservations is no_reservations:
        candidate, tiling = ask(environment)
    else:
        from kernelry.resolution.reserved import with_reservations  # few kernels have some

        lifted = policy.experimental or name in order.named
        candidate, tiling = with_reservations(spec, request, environment, ask, lifted=lifted)
    serves = not candidate.refusals
    return candidate, Plan(spec, candidate.steps, request, tiling) if serves else None


def _others(
    names: tuple[str, ...], question: Question, order: Order, pool: _Pool, environment: Environment
) -> tuple[Candidate, ...]:
    """The answers of the kernels behind the winner, for whom nothing is probed."""
    looking = environment.without_probing()
    return tuple(_asked(name, question, order, pool, looking)[0] for name in names)


def _absent(name: str, pool: _Pool) -> Candidate:
    remedy = installed.how_to_get(name)
    detail = f"no installed plugin brings a kernel of that name{'' if remedy else nearest(name, pool)}"
    return Candidate(name, "not installed", (Refusal(RefusalCode.NOT_INSTALLED, detail, remedy),))


def _check_names(names: Sequence[str], pool: _Pool) -> None:
    for name in names:
        if name not in pool:
            installed.registry().check_name(name)


def _position(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _votes(request: Request, candidates: tuple[str, ...]) -> Votes:
    points: dict[str, int] = {}
    voters: list[str] = []
    for plugin, ask in sorted(installed.registry().rankers.items()):
        try:
            vote = ask(request=request, candidates=candidates)
        except Exception as error:
            warnings.warn(f"kernelry plugin {plugin}: kernelry_rank raised {error!r}; its vote is lost", stacklevel=2)
            continue
        named = () if vote is None else tuple(dict.fromkeys(vote.kernels))
        for place, name in enumerate(named):
            points[name] = points.get(name, 0) + len(candidates) - place
        if named:
            voters.append(f"{plugin} ({vote.source})" if vote.source else plugin)
    return Votes(points, tuple(voters))


def _home_platform() -> str | None:
    try:
        return home_target().platform
    except Exception as error:  # JAX_PLATFORMS names a backend that is not here; JAX raises various types
        _logger.warning("JAX has no usable backend: %s", error)
        return None
