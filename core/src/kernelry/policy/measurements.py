"""Times of kernels, measured on a device or predicted for it, as evidence for the resolver.

A time is about a bucket of requests: those that differ so little that the same kernel and the same tiling are expected
to be the fastest. Times are compared within one request of a bucket alone: those of two requests are not comparable.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, final

from kernelry.kernel.spec import Tiling
from kernelry.masks.form import OPEN_RUN, OPERANDS, Atom, AtomKind, MaskForm, PositionForm, PositionKind
from kernelry.masks.functions import FunctionRef
from kernelry.request.request import NEUTRAL, Request
from kernelry.request.target import Target

Pairs = tuple[tuple[str, str], ...]


@final
class Kind(enum.Enum):
    """Where a time comes from."""

    MEASURED = "measured"
    PREDICTED = "predicted"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """The requests that one time is about: equal but for what is rounded. docs/tuning.md has the table.

    Lengths, batch times heads, the width of a window and the size of a chunk are rounded to the power of two that is
    nearest on a logarithmic scale. What is known at run time only is a word. The scale and the value of the cap, on
    which no time depends, are left out.

    Args:
      facts: (name, value) pairs.
    """

    facts: Pairs

    @classmethod
    def of(cls, request: Request) -> Bucket | None:
        """Returns the bucket of a request; None where a size is symbolic or a predicate cannot be told from others."""
        if request.symbolic_sizes or _has_nameless(request.mask):
            return None
        gradients = ",".join(sorted(operand.value for operand in request.gradients))
        facts: dict[str, Any] = {
            "mode": request.mode.value,
            "dtype": request.dtype,
            "T": _power(request.q_len),
            "S": _power(request.kv_len),
            "BN": _power(request.batch * request.q_heads),
            "G": _power(request.groups),
            "H": request.head_dim,
            "D": request.value_dim,
            "mask": _mask(request.mask),
            "gradients": gradients,
            "bias": _broadcast(request.bias),
            **{name: getattr(request, name) for name in _AS_THEY_ARE},
            **{name: getattr(request, name) not in (None, False, 0.0) for name in _WHETHER},
        }
        told = ((name, value) for name, value in facts.items() if value != _UNSAID.get(name, ""))
        return cls(tuple((name, str(value)) for name, value in told))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.facts)


_WHETHER = ("soft_cap", "bias_after_cap", "sinks", "dropout_rate")
"""What costs time by being there."""
_AS_THEY_ARE = tuple(name for name in NEUTRAL if name not in (*_WHETHER, "mask", "bias"))
_UNSAID = {**NEUTRAL, **dict.fromkeys(_WHETHER, False), "mask": "full"}
"""The values that are left out."""


def _power(size: int) -> int:
    """The power of two that is nearest to a size on a logarithmic scale; 0 stays 0."""
    return 2 ** round(math.log2(size)) if size > 0 else 0


def _broadcast(bias: tuple[int, ...] | None) -> str | None:
    """Which of a bias's dimensions are broadcast, so that fewer bytes are read: `111S`, `BNTS`; None without bias."""
    return (
        None if bias is None else "".join("1" if size == 1 else axis for axis, size in zip("BNTS", bias, strict=True))
    )


def _mask(form: MaskForm) -> str:
    return " & ".join(sorted(map(_atom, form.atoms))) or "full"


def _has_nameless(form: MaskForm) -> bool:
    """Whether a predicate has no importable name: all lambdas have one title, and each sees other keys."""
    params = [param for atom in form.atoms for param in atom.params]
    return any(isinstance(each, FunctionRef) or (isinstance(each, MaskForm) and _has_nameless(each)) for each in params)


def _atom(atom: Atom) -> str:
    where = [f"{side}={_positions(form)}" for side, form in (("query", atom.query), ("kv", atom.kv))]
    placed = [text for text in where if not text.endswith("=default")]
    return _what(atom) + (f" at {', '.join(placed)}" if placed else "")


def _what(atom: Atom) -> str:
    kind, params = atom.kind, atom.params
    if kind is AtomKind.WINDOW:
        return f"window({', '.join('inf' if side is None else str(_width(side)) for side in params)})"
    if kind is AtomKind.ANY_OF:
        return f"({' | '.join(sorted(map(_mask, params)))})"
    if kind is AtomKind.NOT:
        return f"~({_mask(params[0])})"
    if kind is AtomKind.CUSTOM:
        return f"{params[0]}" + (" with arrays" if OPERANDS in params else "")
    if kind is AtomKind.CAUSAL:
        return str(kind.value)
    told = [str(_power(param) if isinstance(param, int) else param) for param in params]
    return f"{kind.value}({', '.join(told)})" if told else kind.value


def _width(side: int) -> int:
    """A side of a window, of which 511 and 512 tokens are alike; 0 stays 0, and the sign stays."""
    return int(math.copysign(_power(abs(side) + 1), side)) if side else 0


def _positions(form: PositionForm) -> str:
    """The kind of positions; of consecutive ones that are known also the first, rounded."""
    runs = form.value if isinstance(form.value, tuple) else ()
    firsts = {row[0][0] for row in runs if len(row) == 1 and row[0][1] == OPEN_RUN}
    first = form.value if form.kind is PositionKind.OFFSET else next(iter(firsts)) if len(firsts) == 1 else None
    return form.kind.value if not isinstance(first, int) else f"offset {_width(first)}"


def device_of(target: Target) -> str:
    """The device that times are about, `tpu:v6e`: a target without its topology."""
    return ":".join(filter(None, (target.platform, target.kind)))


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The time of one kernel with one tiling on one request.

    Args:
      device: `platform[:kind]`.
      bucket: the bucket of the request.
      request: the request that was timed, as text.
      kernel: its name.
      tiling: its tunables, all of them.
      seconds: of one call, with its adapters where it was measured; of training forward and backward together. None
        where there is none, as `failure` says.
      kind: measured or predicted.
      versions: (distribution, version) pairs that the time depends on, sorted: of jax, of kernelry, of the kernel's
        distribution and what that requires, and of the compiler; of a CPU also the processor. Without any it does not
        depend on versions.
      time: when that was, in UTC, e.g. `2026-11-30T09:39:01.250Z`.
      failure: why there is no time: the compiler's message, or that there is no model.
    """

    device: str
    bucket: Bucket
    request: str
    kernel: str
    tiling: tuple[tuple[str, int], ...] = ()
    seconds: float | None
    kind: Kind
    versions: Pairs = ()
    time: str = ""
    failure: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What an entry is about: of entries with equal keys one is kept, see `merged`."""
        return self.device, self.bucket, self.request, self.kernel, self.tiling, self.versions

    @property
    def rank(self) -> tuple[bool, str, str]:
        """Of equal keys the highest is kept: measured above predicted, then the newest, then by its text."""
        return self.kind is Kind.MEASURED, self.time, json.dumps(self.to_json(), sort_keys=True)

    @property
    def sizes(self) -> str:
        """B, T, S, N and K of the request that was timed."""
        return " ".join(word for word in self.request.split(" ") if word[:2] in ("B=", "T=", "S=", "N=", "K="))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `from_json` reads it back."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pairs = {name: dict(given[name]) for name in ("tiling", "versions")}
        return {**given, **pairs, "bucket": dict(self.bucket.facts), "kind": self.kind.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Reads what `to_json` wrote; what else is in there is ignored.

        Raises:
          KeyError, TypeError, ValueError, AttributeError: it is not an entry.
        """
        seconds = None if data["seconds"] is None else float(data["seconds"])
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"seconds={seconds} is not a time")
        return cls(
            bucket=Bucket(tuple((str(name), str(value)) for name, value in data["bucket"].items())),
            tiling=tuple(sorted((str(name), int(value)) for name, value in data["tiling"].items())),
            versions=tuple(sorted((str(name), str(value)) for name, value in data["versions"].items())),
            seconds=seconds,
            kind=Kind(data["kind"]),
            **{name: str(data[name]) for name in ("device", "request", "kernel", "time", "failure")},
        )

    @classmethod
    def of(cls, request: Request, kernel: str, seconds: float | None, **more: Any) -> Entry:
        """An entry of a request; measured, unless `kind` says otherwise."""
        bucket = Bucket.of(request)
        assert bucket is not None, "a symbolic size has no time"
        facts = {"kind": Kind.MEASURED, **more}
        return cls(
            device=device_of(request.target),
            bucket=bucket,
            request=str(request),
            kernel=kernel,
            seconds=seconds,
            **facts,
        )


def merged(*sources: Iterable[Entry]) -> tuple[Entry, ...]:
    """Entries of several sources together: of those with equal keys the one of the highest rank.

    As a maximum it is associative, commutative and idempotent, so files may be merged in any order and again.
    """
    kept: dict[tuple[Any, ...], Entry] = {}
    for source in sources:
        for entry in source:
            before = kept.get(entry.key)
            if before is None or entry.rank > before.rank:
                kept[entry.key] = entry
    return tuple(sorted(kept.values(), key=lambda entry: (entry.device, entry.request, entry.kernel, entry.rank)))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """What times say of one request.

    Args:
      best: the fastest entry of each kernel that was timed: first those measured, then those predicted, fastest first.
      tilings: for each kernel the tilings that were timed; the least value is the best.
      unused: for kernels that have entries of other versions, why those are not used.
      request: the request, as text.
    """

    best: tuple[Entry, ...]
    tilings: Mapping[str, Mapping[Tiling, tuple[float, ...]]]
    unused: Mapping[str, str]
    request: str

    @property
    def measured(self) -> tuple[str, ...]:
        """The kernels that were measured, with the work of their adapters, which a prediction leaves out."""
        return tuple(entry.kernel for entry in self.best if entry.kind is Kind.MEASURED)

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels that have a time, fastest first."""
        return tuple(entry.kernel for entry in self.best)

    def __str__(self) -> str:
        """E.g. `measured on cpu: blockwise 1.23 ms, dot_product 2.1 ms`."""
        told = []
        for kind, words in (
            (Kind.MEASURED, "measured on {}"),
            (Kind.PREDICTED, "predicted for {}, static, not measured"),
        ):
            times = [f"{entry.kernel} {in_ms(entry.seconds)}" for entry in self.best if entry.kind is kind]
            if times:
                told.append(f"{words.format(self.best[0].device)}: {', '.join(times)}")
        return "; ".join(told)

    def notes(self, kernel: str) -> tuple[str, ...]:
        """What a kernel's entries say of it: its best time, or why they are not used."""
        entry = next((entry for entry in self.best if entry.kernel == kernel), None)
        if entry is None:
            return (self.unused[kernel],) if kernel in self.unused else ()
        tiling = f" with {Tiling(entry.tiling)}" if entry.tiling else ""
        alike = "" if entry.request == self.request else f", timed with {entry.sizes}"
        static = ", static, not measured" if entry.kind is Kind.PREDICTED else ""
        return (f"{entry.kind.value} {in_ms(entry.seconds)}{tiling}{alike}{static}",)


def in_ms(seconds: float | None) -> str:
    """E.g. `1.23 ms`."""
    return "–" if seconds is None else f"{seconds * 1e3:.3g} ms"


class _Kernel(Protocol):
    """A kernel and where it comes from, `name version`."""

    @property
    def distribution(self) -> str: ...


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Measurements:
    """Times that may decide; of other versions than these, or of other devices than the request's, none does.

    Args:
      entries: the times.
      versions: those of this process, by distribution; an entry that names one that is not there is taken as it is.
    """

    entries: tuple[Entry, ...] = ()
    versions: Pairs = ()
    _found: dict[tuple[str, Bucket], list[Entry]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for entry in self.entries:
            self._found.setdefault((entry.device, entry.bucket), []).append(entry)

    def __hash__(self) -> int:
        return hash(self.versions)

    def about(self, request: Request, kernels: Mapping[str, _Kernel]) -> Evidence | None:
        """Returns what the times say of a request; None where there are none for its device and bucket.

        Args:
          request: the request.
          kernels: the kernels to choose among, by name; their distributions are compared with those of the times.
        """
        bucket = Bucket.of(request) if self._found else None
        found = () if bucket is None else self._found.get((device_of(request.target), bucket), ())
        timed = [entry for entry in found if entry.seconds is not None and entry.kernel in kernels]
        if not timed:
            return None
        told = {entry: self.why_not(entry, kernels[entry.kernel].distribution) for entry in timed}
        usable = [entry for entry, why in told.items() if why is None]
        unused = {entry.kernel: why for entry, why in told.items() if why is not None}
        asked = str(request)
        best: dict[str, Entry] = {}
        tilings: dict[str, dict[Tiling, tuple[float, ...]]] = {}
        for entry in [each for kind in Kind for each in _fastest(_comparable(usable, kind, asked))]:
            best.setdefault(entry.kernel, entry)
            value = entry.kind is Kind.PREDICTED, entry.seconds or 0.0
            tilings.setdefault(entry.kernel, {}).setdefault(Tiling(entry.tiling), value)
        return Evidence(tuple(best.values()), tilings, unused, asked)

    def why_not(self, entry: Entry, distribution: str) -> str | None:
        """Says why an entry is of other versions than these; None where it is not.

        Args:
          entry: the entry.
          distribution: of its kernel as it is installed, `name version`.
        """
        name, _, version = distribution.rpartition(" ")
        then, now = dict(entry.versions), {**dict(self.versions), name: version}
        if then and name not in then:
            return f"{entry.kind.value} with a kernel of this name from elsewhere: not used"
        for of, was in then.items():
            if now.get(of, was) != was:
                return f"{entry.kind.value} with {of} {was}, this is {now[of]}: not used; run kernelry tune"
        return None


def _comparable(entries: Iterable[Entry], kind: Kind, asked: str) -> list[Entry]:
    """The entries of a kind that are about one request: the one asked, else that of most kernels, else the newest."""
    by_request: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind is kind:
            by_request.setdefault(entry.request, []).append(entry)

    def told(request: str) -> tuple[bool, int, str, str]:
        mine = by_request[request]
        return request == asked, len({e.kernel for e in mine}), max(e.time for e in mine), request

    return by_request[max(by_request, key=told)] if by_request else []


def _fastest(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (entry.seconds, entry.kernel, entry.tiling))
