"""Flax's logical axis rules: which mesh axes cut the dimensions of an array that have logical names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, final

from kernelry.errors import ArgumentError, nearest


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LogicalRules:
    """Pairs of a logical name and its mesh axes, in the order of their priority."""

    pairs: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, rules: Iterable[tuple[str, Any]] | None) -> LogicalRules:
        """Reads rules as flax has them; None are the current rules of `flax.linen`.

        Raises:
          ArgumentError: none are active, or one has another form.
        """
        given = rules
        if rules is None:
            from flax.linen import get_logical_axis_rules  # imported only where its rules are asked for

            given = get_logical_axis_rules()
            if not given:
                raise ArgumentError(
                    "Sharding.of_rules: no logical axis rules are active; pass them, or enter "
                    "flax.linen.logical_axis_rules(rules)."
                )
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ArgumentError(f"Sharding.of_rules: rules must be pairs of a name and its mesh axes, got {given!r}.")
        return cls(tuple(map(_pair, given)))

    def check(self, **names: str | None) -> None:
        """Checks that each name has a rule.

        Raises:
          ArgumentError: one has none; the message has the nearest that does.
        """
        known = list(dict.fromkeys(name for name, _ in self.pairs))
        for argument, name in names.items():
            if name is not None and name not in known:
                raise ArgumentError(f"Sharding.of_rules: {argument}={name!r} has no rule{nearest(str(name), known)}")

    def axes(self, names: Sequence[str | None]) -> tuple[tuple[str, ...], ...]:
        """The mesh axes of an array's dimensions, as `flax.linen.logical_to_mesh_axes` gives them.

        Rules are read in their order: one holds if its dimension has no axes yet, and no other dimension has its axes.
        """
        found: dict[str, tuple[str, ...]] = {}
        for name, axes in self.pairs:
            taken = {axis for other in found.values() for axis in other}
            if name in names and name not in found and taken.isdisjoint(axes):
                found[name] = axes
        return tuple(() if name is None else found.get(name, ()) for name in names)


def _pair(rule: Any) -> tuple[str, tuple[str, ...]]:
    pair = tuple(rule) if isinstance(rule, Sequence) and not isinstance(rule, str) else ()
    if len(pair) == 2 and isinstance(pair[0], str):
        axes = () if pair[1] is None else (pair[1],) if isinstance(pair[1], str) else pair[1]
        if isinstance(axes, Sequence) and all(isinstance(axis, str) for axis in axes):
            return pair[0], tuple(axes)
    raise ArgumentError(
        "Sharding.of_rules: a rule is a logical name and its mesh axes, e.g. ('activation_batch', ('data', 'fsdp')), "
        f"got {rule!r}."
    )
