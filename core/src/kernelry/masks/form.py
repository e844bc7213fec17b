"""The static side of masks: what kind of mask it is, without its arrays.

A `MaskForm` is a conjunction of typed atoms in canonical order. It is hashable and
JSON-serialisable, so requests can be compared, cached, written down and sent to another machine.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, final

import numpy as np

Runs: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""Static positions per batch row: each row is runs of (first position, count)."""

OPEN_RUN = -1
"""The count of a run that goes on to the end of the side, whatever its length."""


@final
class AtomKind(enum.Enum):
    """What a kernel can claim to understand."""

    CAUSAL = "causal"
    WINDOW = "window"
    SEGMENTS = "segments"
    """One array of ids for queries and keys."""
    SEGMENTS_SEPARATE = "segments_separate"
    """Two arrays of ids."""
    LENGTHS = "lengths"
    DENSE = "dense"
    ANY_OF = "any_of"
    NOT = "not"
    CUSTOM = "custom"


@final
class PositionKind(enum.Enum):
    """How positions of one side are given."""

    DEFAULT = "default"
    OFFSET = "offset"
    STATIC = "static"
    TRACED = "traced"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PositionForm:
    """The static side of one side's positions: an int for OFFSET, runs for STATIC, else None."""

    kind: PositionKind = PositionKind.DEFAULT
    value: int | Runs | None = None

    @property
    def start(self) -> int | None:
        """The first position where they are consecutive and known, else None."""
        if self.kind is PositionKind.DEFAULT:
            return 0
        return self.value if isinstance(self.value, int) else None

    def positions(self, length: int) -> np.ndarray | None:
        """Returns the positions as int64 [rows, length], or None where they are traced."""
        if self.kind is PositionKind.TRACED:
            return None
        if self.kind is PositionKind.STATIC:
            assert isinstance(self.value, tuple)
            return np.stack([_expand(row, length) for row in self.value])
        start = self.start or 0
        return np.arange(start, start + length)[None]

    def __str__(self) -> str:
        return str(self.value) if self.kind is PositionKind.OFFSET else self.kind.value


def _expand(row: tuple[tuple[int, int], ...], length: int) -> np.ndarray:
    counted = ((first, length if count == OPEN_RUN else count) for first, count in row)
    return np.concatenate([np.arange(0), *(np.arange(first, first + count) for first, count in counted)])


_DEFAULT = PositionForm()


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Atom:
    """One conjunct of a mask without its arrays.

    Args:
      kind: what it is.
      params: its static parameters; for CAUSAL and WINDOW the band `(left, right)`, None meaning
        unbounded; for ANY_OF and NOT the MaskForms inside; for CUSTOM the name first.
      query, kv: how the positions of each side are given.
    """

    kind: AtomKind
    params: tuple[Any, ...] = ()
    query: PositionForm = _DEFAULT
    kv: PositionForm = _DEFAULT

    @property
    def is_band(self) -> bool:
        """True for the atoms that bound the difference of positions."""
        return self.kind in (AtomKind.CAUSAL, AtomKind.WINDOW)

    @property
    def is_static(self) -> bool:
        """True when the mask can be evaluated without any array of the call."""
        if self.kind is AtomKind.ANY_OF or self.kind is AtomKind.NOT:
            return all(atom.is_static for form in self.params for atom in form.atoms)
        traced = PositionKind.TRACED in (self.query.kind, self.kv.kind)
        return self.is_band and not traced

    @property
    def position_kinds(self) -> frozenset[PositionKind]:
        """The ways positions are given, here and inside ANY_OF and NOT."""
        own = {self.query.kind, self.kv.kind}
        inside = (a.position_kinds for p in self.params if isinstance(p, MaskForm) for a in p.atoms)
        return frozenset(own.union(*inside))

    @property
    def sort_key(self) -> tuple[str, str]:
        """Orders atoms the same way however the mask was written."""
        return self.kind.value, repr(self)

    def __str__(self) -> str:
        text = _describe(self.kind, self.params)
        where = [f"{name}={form}" for name, form in (("query", self.query), ("kv", self.kv)) if form != _DEFAULT]
        return f"{text} at {', '.join(where)}" if where else text

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `from_json` reads it back."""
        params = [p.to_json() if isinstance(p, MaskForm) else p for p in self.params]
        sides = {side: {"kind": form.kind.value, "value": form.value} for side, form in self._sides()}
        return {"kind": self.kind.value, "params": params, **sides}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Atom:
        """Reads what `to_json` wrote."""
        kind = AtomKind(data["kind"])
        nested = kind in (AtomKind.ANY_OF, AtomKind.NOT)
        params = tuple(MaskForm.from_json(p) if nested else _frozen(p) for p in data["params"])
        query, kv = (PositionForm(PositionKind(s["kind"]), _frozen(s["value"])) for s in (data["query"], data["kv"]))
        return cls(kind, params, query, kv)

    def _sides(self) -> tuple[tuple[str, PositionForm], tuple[str, PositionForm]]:
        return ("query", self.query), ("kv", self.kv)


def _describe(kind: AtomKind, params: tuple[Any, ...]) -> str:
    if kind is AtomKind.CAUSAL:
        return "causal"
    if kind is AtomKind.WINDOW:
        left, right = ("inf" if bound is None else str(bound) for bound in params)
        return f"window({left}, {right})"
    if kind is AtomKind.ANY_OF:
        return "(" + " | ".join(str(p) for p in params) + ")"
    if kind is AtomKind.NOT:
        return f"~({params[0]})"
    return f"{kind.value}({', '.join(str(p) for p in params)})" if params else kind.value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


@final
@dataclasses.dataclass(frozen=True, slots=True)
class MaskForm:
    """A conjunction of atoms, sorted; no atoms means every key is visible."""

    atoms: tuple[Atom, ...] = ()
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.atoms))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskForm, (self.atoms,)  # hashes differ between processes

    def take(self, wanted: Callable[[Atom], bool]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Splits the atoms into those a kernel wants and the rest.

        Returns:
          Two tuples of indices, aligned with `atoms` and with `Inputs.mask`.
        """
        taken = tuple(i for i, atom in enumerate(self.atoms) if wanted(atom))
        return taken, tuple(i for i in range(len(self.atoms)) if i not in taken)

    @property
    def position_kinds(self) -> frozenset[PositionKind]:
        """The ways positions are given in the atoms."""
        return frozenset().union(*(atom.position_kinds for atom in self.atoms))

    def may_have_empty_rows(self, q_len: int, kv_len: int) -> bool:
        """False only where every query row certainly sees a key."""
        return self._visibility(q_len, kv_len)[0]

    def may_hide_slots(self, q_len: int, kv_len: int) -> bool:
        """False only where every key is certainly seen by some query row."""
        return self._visibility(q_len, kv_len)[1]

    def _visibility(self, q_len: int, kv_len: int) -> tuple[bool, bool]:
        if not self.atoms:
            return kv_len == 0, q_len == 0
        if len(self.atoms) > 1 or not (self.atoms[0].is_band and self.atoms[0].is_static):
            return True, True
        return _band_visibility(self.atoms[0], q_len, kv_len)

    def __str__(self) -> str:
        return " & ".join(str(atom) for atom in self.atoms) or "full"

    def to_json(self) -> list[dict[str, Any]]:
        """Returns plain data; `from_json` reads it back."""
        return [atom.to_json() for atom in self.atoms]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> MaskForm:
        """Reads what `to_json` wrote."""
        return cls(tuple(Atom.from_json(atom) for atom in data))


@functools.lru_cache(maxsize=512)
def _band_visibility(atom: Atom, q_len: int, kv_len: int) -> tuple[bool, bool]:
    left, right = atom.params
    if atom.query.start is not None and atom.kv.start is not None:
        queries, slots = (atom.query.start, q_len), (atom.kv.start, kv_len)
        return not _all_see(queries, slots, left, right), not _all_see(slots, queries, right, left)
    query, kv = atom.query.positions(q_len), atom.kv.positions(kv_len)
    assert query is not None
    assert kv is not None
    rows = max(len(query), len(kv))
    pairs = list(zip(np.broadcast_to(query, (rows, q_len)), np.broadcast_to(kv, (rows, kv_len)), strict=True))
    empty = any(not _sees_any(q, k, left, right).all() for q, k in pairs)
    hidden = any(not _sees_any(k, q, right, left).all() for q, k in pairs)
    return empty, hidden


def _all_see(own: tuple[int, int], other: tuple[int, int], below: int | None, above: int | None) -> bool:
    """Says whether every position p of a run (first, count) has one of `other` in [p − below, p + above]."""
    (first, count), (other_first, other_count) = own, other
    if count == 0 or other_count == 0:
        return count == 0
    last, other_last = first + count - 1, other_first + other_count - 1
    return (below is None or last - below <= other_last) and (above is None or first + above >= other_first)


def _sees_any(own: np.ndarray, other: np.ndarray, below: int | None, above: int | None) -> np.ndarray:
    """Says for each own position p whether `other` has one in [p − below, p + above]."""
    ordered = np.sort(other)
    first = 0 if below is None else np.searchsorted(ordered, own - below, side="left")
    last = len(ordered) if above is None else np.searchsorted(ordered, own + above, side="right")
    return np.broadcast_to(np.asarray(last > first), own.shape)
