"""The static side of masks: what kind of mask it is, without its arrays.

A `MaskForm` is a conjunction of typed atoms in canonical order. It is hashable and
JSON-serialisable, so requests can be compared, cached, written down and sent to another machine.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np

from kernelry.errors import ConfigError, ShapeError
from kernelry.masks.functions import FunctionRef

if TYPE_CHECKING:
    from kernelry.masks.base import Mask
    from kernelry.masks.composition import Visibility

Runs: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""Static positions per batch row: each row is runs of (first position, count)."""

_MOST_RUNS = 32
"""Of one row of positions, so that a program can hold them as an expression: two for each of 16 devices, as in causal
attention whose load is balanced."""

OPEN_RUN = -1
"""The count of a run that goes on to the end of the side, whatever its length."""


@final
class AtomKind(enum.Enum):
    """What a kernel can claim to understand."""

    __hash__ = object.__hash__  # by identity, as members compare

    CAUSAL = "causal"
    WINDOW = "window"
    SEGMENTS = "segments"
    """One array of ids for queries and keys."""
    SEGMENTS_SEPARATE = "segments_separate"
    """Two arrays of ids."""
    LENGTHS = "lengths"
    SPANS = "spans"
    """One array of span ids for queries and keys."""
    SPANS_SEPARATE = "spans_separate"
    """Two arrays of span ids."""
    CHUNKED = "chunked"
    BLOCK_CAUSAL = "block_causal"
    PREFIX_LM = "prefix_lm"
    BLOCK_SELECTION = "block_selection"
    PREDICATE = "predicate"
    DENSE = "dense"
    ANY_OF = "any_of"
    NOT = "not"
    CUSTOM = "custom"
    """A third party's mask."""


OPERANDS = "operands"
"""The parameter of a PREDICATE or CUSTOM atom that cannot be evaluated from slots and positions alone."""

_CLASSES: dict[AtomKind | str | None, type[Mask]] = {}
"""By kind of atom; of custom masks by name. None is `Mask` itself, whose answers are right for any mask."""


def register_mask(key: AtomKind | str | None, cls: type[Mask]) -> None:
    """Says which class an atom belongs to; a name that two classes claim belongs to neither."""
    known = _CLASSES.get(key)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        cls = _CLASSES[None]
    _CLASSES[key] = cls


@final
class PositionKind(enum.Enum):
    """How positions of one side are given."""

    __hash__ = object.__hash__  # by identity, as members compare

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

    @property
    def is_arithmetic(self) -> bool:
        """True where a slot's position is an expression of the slot, the same in every batch row: a few runs."""
        if not isinstance(self.value, tuple):
            return self.kind is not PositionKind.TRACED
        return len(self.value) == 1 and len(self.value[0]) <= _MOST_RUNS

    def lengthened(self, more: int) -> PositionForm:
        """Those of a side with `more` slots put behind, which stand one after another."""
        if not more or not isinstance(self.value, tuple):
            return self
        return PositionForm(self.kind, lengthened_runs(self.value, more))

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
    firsts, counts = np.fromiter(itertools.chain.from_iterable(row), np.int64, 2 * len(row)).reshape(-1, 2).T
    counts = np.where(counts == OPEN_RUN, length, counts)
    starts = np.cumsum(counts) - counts
    return np.repeat(firsts - starts, counts) + np.arange(counts.sum())


def lengthened_runs(runs: Runs, more: int) -> Runs:
    """Each row goes on for `more` positions."""
    return tuple(_lengthened_run(row, more) for row in runs) if more else runs


def _lengthened_run(row: tuple[tuple[int, int], ...], more: int) -> tuple[tuple[int, int], ...]:
    if not row:
        return ((0, more),)
    first, count = row[-1]
    return row if count == OPEN_RUN else (*row[:-1], (first, count + more))


_DEFAULT = PositionForm()


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Atom:
    """One conjunct of a mask without its arrays.

    Args:
      kind: what it is.
      params: its static parameters; for CAUSAL and WINDOW the band `(left, right)`, None meaning
        unbounded; for CHUNKED, BLOCK_CAUSAL and BLOCK_SELECTION the size; for PREDICATE the
        function, by name where it has one, else a FunctionRef; for ANY_OF and NOT the MaskForms inside; for CUSTOM
        the name first. PREDICATE and CUSTOM end in the word `operands` where they need arrays.
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
        return PositionKind.TRACED not in (self.query.kind, self.kv.kind) and not self.has_arrays

    @property
    def has_arrays(self) -> bool:
        """True when it depends on arrays other than positions; masks inside are not looked at."""
        if self.kind in (AtomKind.PREDICATE, AtomKind.CUSTOM):
            return OPERANDS in self.params
        return bool(self.mask_class.axes)

    @property
    def is_predicate(self) -> bool:
        """True for a PREDICATE, and for a custom mask without arrays, which is one in all but name."""
        return self.kind is AtomKind.PREDICATE or (self.kind is AtomKind.CUSTOM and OPERANDS not in self.params)

    @property
    def mask_class(self) -> type[Mask]:
        """The class that answers for this atom; `Mask` itself where it is not known."""
        name = self.params[0] if self.kind is AtomKind.CUSTOM and self.params else self.kind
        return _CLASSES.get(name) or _CLASSES[None]

    @property
    def position_kinds(self) -> frozenset[PositionKind]:
        """The ways positions are given, here and inside ANY_OF and NOT."""
        return frozenset(kind for atom in self.walk() for kind in (atom.query.kind, atom.kv.kind))

    def positions(self, q_len: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Static positions of queries and of keys, int64 [rows, length] of as many rows."""
        query, kv = self.query.positions(q_len), self.kv.positions(kv_len)
        assert query is not None
        assert kv is not None
        rows = max(len(query), len(kv))
        return np.broadcast_to(query, (rows, q_len)), np.broadcast_to(kv, (rows, kv_len))

    def walk(self) -> tuple[Atom, ...]:
        """This atom, and those inside ANY_OF and NOT."""
        inside = (param.walk() for param in self.params if isinstance(param, MaskForm))
        return (self, *itertools.chain.from_iterable(inside))

    @property
    def sort_key(self) -> tuple[str, str]:
        """Orders atoms the same way however the mask was written; anonymous functions of one title stay as written."""
        return self.kind.value, repr(self)

    def __str__(self) -> str:
        text = _describe(self.kind, self.params)
        where = [f"{name}={form}" for name, form in (("query", self.query), ("kv", self.kv)) if form != _DEFAULT]
        return f"{text} at {', '.join(where)}" if where else text

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `from_json` reads it back.

        Raises:
          ArgumentError: a Predicate's function has no name by which it could be found again.
        """
        params = [_plain(param) for param in self.params]
        placed = (("query", self.query), ("kv", self.kv))
        sides = {side: {"kind": form.kind.value, "value": form.value} for side, form in placed}
        return {"kind": self.kind.value, "params": params, **sides}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Atom:
        """Reads what `to_json` wrote."""
        kind = AtomKind(data["kind"])
        nested = kind in (AtomKind.ANY_OF, AtomKind.NOT)
        params = tuple(MaskForm.from_json(p) if nested else _frozen(p) for p in data["params"])
        query, kv = (PositionForm(PositionKind(s["kind"]), _frozen(s["value"])) for s in (data["query"], data["kv"]))
        return cls(kind, params, query, kv)


def _plain(param: Any) -> Any:
    if isinstance(param, MaskForm):
        return param.to_json()
    if isinstance(param, FunctionRef):
        raise param.not_serialisable()
    return param


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
    named = (param.title if isinstance(param, FunctionRef) else str(param) for param in params)
    return f"{kind.value}({', '.join(named)})" if params else kind.value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Placed:
    """How many rows of static positions one side has, and how long they are."""

    side: str
    rows: int
    lengths: frozenset[int]

    def check(self, batch: int, length: int) -> None:
        name, letter = ("q_len", "T") if self.side == "query" else ("kv_len", "S")
        for given in sorted(self.lengths - {length}):
            raise ShapeError(
                f"mask: {self.side}_positions are {given} numbers, and {name}={length}: give one position for each of "
                f"the {letter} tokens, or pass {name}={given}."
            )
        if self.rows not in (1, batch):
            raise ShapeError(
                f"mask: {self.side} positions differ between {self.rows} rows, and batch={batch}: pass "
                f"batch={self.rows}, or positions that all rows share."
            )


def _placed(atoms: Iterable[Atom]) -> Iterator[_Placed]:
    for atom in atoms:
        for side, form in (("query", atom.query), ("kv", atom.kv)):
            if isinstance(form.value, tuple):
                counts = ([count for _, count in row] for row in form.value)
                yield _Placed(side, len(form.value), frozenset(sum(row) for row in counts if OPEN_RUN not in row))
        for param in atom.params:
            if isinstance(param, MaskForm):
                yield from param._placed


@final
@dataclasses.dataclass(frozen=True, slots=True)
class MaskForm:
    """A conjunction of atoms, sorted; no atoms means every key is visible."""

    atoms: tuple[Atom, ...] = ()
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)
    _placed: tuple[_Placed, ...] = dataclasses.field(init=False, repr=False, compare=False)
    _walk: tuple[Atom, ...] = dataclasses.field(init=False, repr=False, compare=False)
    moved_kinds: frozenset[PositionKind] = dataclasses.field(init=False, repr=False, compare=False)
    """The ways positions are given, but for the default."""
    _text: str | None = dataclasses.field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.atoms))
        object.__setattr__(self, "_placed", tuple(_placed(self.atoms)))
        object.__setattr__(self, "_walk", tuple(inside for atom in self.atoms for inside in atom.walk()))
        object.__setattr__(self, "moved_kinds", self.position_kinds - {PositionKind.DEFAULT})

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskForm, (self.atoms,)  # hashes differ between processes

    def take(self, wanted: Callable[[Atom], bool]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Splits the atoms into those that are wanted and the rest.

        Returns:
          Two tuples of indices, aligned with `atoms` and with `Inputs.mask`.
        """
        taken = tuple(i for i, atom in enumerate(self.atoms) if wanted(atom))
        return taken, tuple(i for i in range(len(self.atoms)) if i not in taken)

    def walk(self) -> tuple[Atom, ...]:
        """The atoms, and those inside ANY_OF and NOT."""
        return self._walk

    @property
    def position_kinds(self) -> frozenset[PositionKind]:
        """The ways positions are given in the atoms."""
        return frozenset([form.kind for atom in self._walk for form in (atom.query, atom.kv)])

    def may_have_empty_rows(self, q_len: int, kv_len: int) -> bool:
        """False only where every query row certainly sees a key."""
        return self._visibility(q_len, kv_len).empty_rows

    def may_hide_slots(self, q_len: int, kv_len: int) -> bool:
        """False only where every key is certainly seen by some query row."""
        return self._visibility(q_len, kv_len).hidden_slots

    def check_positions(self, batch: int, q_len: int, kv_len: int) -> None:
        """Checks that there is a static position for each token.

        Raises:
          ShapeError: they are of another length, or of another batch.
        """
        for placed in self._placed:
            placed.check(batch, q_len if placed.side == "query" else kv_len)

    def _visibility(self, q_len: int, kv_len: int) -> Visibility:
        # Imported here because it imports this module.
        from kernelry.masks.composition import visibility_of

        return visibility_of(self, q_len, kv_len)

    def __str__(self) -> str:
        if self._text is None:  # refusals ask for it again and again
            object.__setattr__(self, "_text", " & ".join(str(atom) for atom in self.atoms) or "full")
        return self._text  # type: ignore[return-value]

    def to_json(self) -> list[dict[str, Any]]:
        """Returns plain data; `from_json` reads it back."""
        return [atom.to_json() for atom in self.atoms]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> MaskForm:
        """Reads what `to_json` wrote.

        Raises:
          ConfigError: `to_json` does not write such data.
        """
        try:
            return cls(tuple(Atom.from_json(atom) for atom in data))
        except KeyError as error:
            raise ConfigError(f"mask: cannot be read from {data!r}: it lacks {error}.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"mask: cannot be read from {data!r}: {error}") from error
