"""What a mask says of one query and one key, as an expression that the vendor can trace into its kernels.

The vendor calls it with the numbers of a batch row, a head, a query slot and a key slot: scalars of its own language
while a kernel is compiled, arrays in its reference backend. Both have comparisons, `&`, `|`, sums and indexing, and
nothing here needs more. An expression is compared by value, so that masks of one form share a compiled kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, final

_NEGATED: dict[Callable[[Any, Any], Any], Callable[[Any, Any], Any]] = {
    operator.le: operator.gt,
    operator.gt: operator.le,
    operator.lt: operator.ge,
    operator.ge: operator.lt,
    operator.eq: operator.ne,
    operator.ne: operator.eq,
}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Axes:
    """The axes of B N T S along which an array of rank 4 is indexed; along the others its size is 1.

    Args:
      row, head, query, key: the axes.
      through: the array whose entry is the index of the last axis; None where that is the key's slot, or 0.
    """

    row: bool = False
    head: bool = False
    query: bool = False
    key: bool = False
    through: int | None = None


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One query and one key, and the arrays of the mask: rank 4, each with its Axes."""

    row: Any
    head: Any
    query: Any
    key: Any
    arrays: tuple[Any, ...]
    axes: tuple[Axes, ...]

    def entry(self, number: int) -> Any:
        """The entry of an array for this query and key."""
        axes = self.axes[number]
        last = self.key if axes.key else 0
        if axes.through is not None:
            last = self.entry(axes.through)
        at = (self.row if axes.row else 0, self.head if axes.head else 0, self.query if axes.query else 0, last)
        return self.arrays[number][at]


class Term(Protocol):
    """An integer that depends on the place."""

    def at(self, place: Place) -> Any:
        """Its value."""
        ...


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Query(Term):
    """The query's slot, shifted."""

    shift: int = 0

    def at(self, place: Place) -> Any:
        return _shifted(place.query, self.shift)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Key(Term):
    """The key's slot, shifted."""

    shift: int = 0

    def at(self, place: Place) -> Any:
        return _shifted(place.key, self.shift)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Entry(Term):
    """The entry of an array, shifted."""

    number: int
    shift: int = 0

    def at(self, place: Place) -> Any:
        return _shifted(place.entry(self.number), self.shift)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Number(Term):
    """A number."""

    value: int

    def at(self, place: Place) -> Any:
        return self.value


def _shifted(value: Any, shift: int) -> Any:
    return value + shift if shift else value


def moved(term: Query | Key | Entry, by: int) -> Query | Key | Entry:
    """The term, shifted further."""
    return dataclasses.replace(term, shift=term.shift + by)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Compare:
    """True where two terms compare, e.g. by `operator.le`; the first is not a Number."""

    compare: Callable[[Any, Any], Any]
    left: Term
    right: Term

    def at(self, place: Place) -> Any:
        """Booleans."""
        return self.compare(self.left.at(place), self.right.at(place))

    def negated(self) -> Rule:
        """True where this is not."""
        return Compare(_NEGATED[self.compare], self.left, self.right)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class All:
    """True where all parts are; of no parts everywhere."""

    parts: tuple[Rule, ...]

    def at(self, place: Place) -> Any:
        """Booleans."""
        return functools.reduce(operator.and_, [part.at(place) for part in self.parts or _ALWAYS])

    def negated(self) -> Rule:
        """True where this is not."""
        return Some(tuple(part.negated() for part in self.parts))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Some:
    """True where some part is; of no parts nowhere."""

    parts: tuple[Rule, ...]

    def at(self, place: Place) -> Any:
        """Booleans."""
        return functools.reduce(operator.or_, [part.at(place) for part in self.parts or _NEVER])

    def negated(self) -> Rule:
        """True where this is not."""
        return All(tuple(part.negated() for part in self.parts))


Rule: TypeAlias = "Compare | All | Some"

_ALWAYS = (Compare(operator.ge, Query(), Number(0)),)
_NEVER = (Compare(operator.lt, Query(), Number(0)),)
