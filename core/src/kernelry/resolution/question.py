"""Orders the kernels for a request: by name asked, by rule, or automatically."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from kernelry.kernel.spec import AUTO
from kernelry.policy.rules import Policy, Rule, Tilings
from kernelry.policy.scope import Scope
from kernelry.registry import installed
from kernelry.request.request import Request

if TYPE_CHECKING:
    from kernelry.policy.measurements import Measurements
    from kernelry.registry.contents import InstalledKernel


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A request with everything that may decide the order of kernels."""

    request: Request
    kernel: str
    scope: Scope
    policy: Policy
    pool: Mapping[str, InstalledKernel]
    measurements: Measurements | None

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
    def preference(self) -> Preference:
        """The kernels to try, in order."""
        if self.forced is not None:
            name, why = self.forced
            self._check_contested(name)
            others = tuple(other for other in sorted(self.pool) if other != name)
            return Preference((name,), why, others, self.scope.tiling, tilings=self.policy.tilings)
        for rule in self.policy.rules:
            if rule.when.matches(self.request):
                return self._by_rule(rule)
        names, why = self._automatic()
        return Preference(names, why, (), self.scope.tiling, tilings=self.policy.tilings)

    @property
    def measured(self) -> tuple[str, ...]:
        """The kernels here that were timed on this request, fastest first."""
        timed = self.measurements.fastest(self.request) if self.measurements else ()
        return tuple(name for name in timed if name in self.pool)

    def insists_on(self, name: str) -> bool:
        """Says whether a kernel was asked for or timed, so that the work of its adapters does not count against it."""
        by_rule = self.preference.by_rule
        ruled = by_rule is not None and name in by_rule.names
        return ruled or self.forced is not None or name in self.measured

    def _check_contested(self, name: str) -> None:
        if name not in self.pool:
            installed.registry().check_name(name)

    def _by_rule(self, rule: Rule) -> Preference:
        for name in rule.names:
            self._check_contested(name)
        rest = tuple(name for name in self._automatic()[0] if name not in rule.names)
        names, excluded = (rule.names, rest) if rule.is_exhaustive else ((*rule.names, *rest), ())
        return Preference(names, str(rule), excluded, self.scope.tiling, rule, self.policy.tilings)

    def _automatic(self) -> tuple[tuple[str, ...], str]:
        """Orders all kernels: by measured time, then by votes, then by the shipped policy, then by name."""
        measured = self.measured
        votes = _votes(self.request, tuple(sorted(self.pool)))
        default = next((rule for rule in self.policy.defaults if rule.when.matches(self.request)), None)
        preferred = default.names if default else ()

        def rank(name: str) -> tuple[int, int, int, str]:
            return _place(name, measured), -votes.get(name, 0), _place(name, preferred), name

        why = "measurements of this device" if measured else "votes of plugins" if votes else str(default or "by name")
        return tuple(sorted(self.pool, key=rank)), why


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """The names to try in order, what decided that, what it left out, and the tunables it sets."""

    names: tuple[str, ...]
    rule: str
    excluded: tuple[str, ...] = ()
    tiling: tuple[tuple[str, int], ...] = ()
    by_rule: Rule | None = None
    tilings: Tilings = ()

    def tiling_for(self, name: str) -> tuple[tuple[str, int], ...]:
        """The tunables set for a kernel: the policy's for that kernel, then a rule's, then a scope's.

        What comes later wins. A rule's are only for the kernels it names, a scope's for all.
        """
        own = dict(self.tilings).get(name, ())
        ruled = self.by_rule.tiling if self.by_rule is not None and name in self.by_rule.names else ()
        return tuple(sorted({**dict(own), **dict(ruled), **dict(self.tiling)}.items()))


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _votes(request: Request, candidates: tuple[str, ...]) -> dict[str, int]:
    points: dict[str, int] = {}
    for plugin, ask in sorted(installed.registry().rankers.items()):
        try:
            vote = ask(request=request, candidates=candidates)
        except Exception as error:
            warnings.warn(f"kernelry plugin {plugin}: kernelry_rank raised {error!r}; its vote is lost", stacklevel=2)
            continue
        for place, name in enumerate(dict.fromkeys(vote or ())):
            points[name] = points.get(name, 0) + len(candidates) - place
    return points
