"""Rules: when a condition on the request holds, use these kernels in this order."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any, final

from kernelry._values import SymbolicSize
from kernelry.errors import ConfigError, followed, nearest
from kernelry.kernel.spec import AUTO
from kernelry.masks.form import AtomKind
from kernelry.request.checks import DTYPES
from kernelry.request.request import Mode, Request
from kernelry.request.target import KINDS, PLATFORMS, Target

FULL = "full"
RANGES = ("q_len", "kv_len", "batch", "groups", "head_dim")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from `minimum` to `maximum`, both included; None is open."""

    minimum: int | None = None
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ConfigError(f"the range {self.minimum}..{self.maximum} is empty; write the low end first.")

    @classmethod
    def parse(cls, value: int | str) -> Range:
        """Reads `128`, `">=128"`, `">128"`, `"<=128"`, `"<128"` or `"128..1024"`.

        Raises:
          ConfigError: it is none of these, or contains no number.
        """
        match = re.fullmatch(r"(>=|>|<=|<|)\s*(\d+)|(\d+)\s*\.\.\s*(\d+)", str(value).strip())
        if match is None or isinstance(value, bool | float):
            raise ConfigError(f"cannot read {value!r} as a range; write 128, '>=128', '<128' or '128..1024'.")
        sign, bound, low, high = match.groups()
        if low is not None:
            return cls(int(low), int(high))
        if (sign, int(bound)) == ("<", 0):
            raise ConfigError(f"the range {value!r} is empty: lengths start at 0.")
        number = int(bound)
        ranges = {">=": (number, None), ">": (number + 1, None), "<=": (None, number), "<": (None, number - 1)}
        return cls(*ranges.get(sign, (number, number)))

    @property
    def bounds(self) -> tuple[int, ...]:
        """Its ends, and the numbers just outside."""
        low = () if self.minimum is None else (self.minimum - 1, self.minimum)
        high = () if self.maximum is None else (self.maximum, self.maximum + 1)
        return tuple(number for number in (*low, *high) if number >= 0)

    def __contains__(self, value: int) -> bool:
        if isinstance(value, SymbolicSize):  # whether it does, is not known
            return False
        above = self.minimum is None or value >= self.minimum
        return above and (self.maximum is None or value <= self.maximum)

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return f"={self.minimum}"
        if self.maximum is None:
            return f">={self.minimum}"
        return f"<={self.maximum}" if self.minimum is None else f"={self.minimum}..{self.maximum}"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class AnyRange:
    """Whole numbers that lie in any of some ranges."""

    ranges: tuple[Range, ...]

    @staticmethod
    def parse(value: int | str | Sequence[int | str]) -> Range | AnyRange:
        """Reads what `Range.parse` reads, or a list of such, any of which may hold.

        Raises:
          ConfigError: a part is not a range, or the list is empty.
        """
        if not isinstance(value, list | tuple):
            return Range.parse(value)  # type: ignore[arg-type]
        if not value:
            raise ConfigError("an empty list contains no number; leave the condition out or name a range.")
        ranges = tuple(Range.parse(part) for part in value)
        return ranges[0] if len(ranges) == 1 else AnyRange(ranges)

    @property
    def bounds(self) -> tuple[int, ...]:
        """The ends of all parts, and the numbers just outside."""
        return tuple(number for part in self.ranges for number in part.bounds)

    def __contains__(self, value: int) -> bool:
        return any(value in part for part in self.ranges)

    def __str__(self) -> str:
        return "=" + "|".join(str(part).removeprefix("=") for part in self.ranges)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """When a rule applies; a field that is left out does not matter.

    Args:
      platform: any of these platforms.
      kind: any of these device kinds, as kernelry or JAX names them; globs such as `v5*` are
        compared with kernelry's names.
      mode: any of these modes.
      q_len, kv_len, batch, head_dim: in this range, or any of these; a symbolic size is in none.
      groups: query heads per key head, in this range, or any of these.
      dtype: any of these dtypes.
      mask: the mask has all of these atoms (`causal`, `window`, …); `full` means no atom at all.

    Raises:
      ConfigError: a name is unknown; the message names the nearest.
    """

    platform: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    mode: tuple[Mode, ...] = ()
    q_len: Range | AnyRange | None = None
    kv_len: Range | AnyRange | None = None
    batch: Range | AnyRange | None = None
    groups: Range | AnyRange | None = None
    head_dim: Range | AnyRange | None = None
    dtype: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", tuple(_kind(name) for name in self.kind))
        atoms = [FULL, *(kind.value for kind in AtomKind)]
        for field, names, known in (
            ("platform", self.platform, PLATFORMS),
            ("dtype", self.dtype, DTYPES),
            ("mask", self.mask, atoms),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(f"when.{field}: unknown name {name!r}{_hint(name, known)}")

    def matches(self, request: Request) -> bool:
        """Says whether the rule applies to a request."""
        target = request.target
        atoms = {atom.kind.value for atom in request.mask.atoms} or {FULL}
        return (
            (not self.platform or target.platform in self.platform)
            and (not self.kind or any(fnmatch.fnmatchcase(target.kind or "", glob) for glob in self.kind))
            and (not self.mode or request.mode in self.mode)
            and all((wanted := getattr(self, name)) is None or getattr(request, name) in wanted for name in RANGES)
            and (not self.dtype or request.dtype in self.dtype)
            and atoms.issuperset(self.mask)
        )

    def __str__(self) -> str:
        parts = [
            f"{field.name}{value}"
            if isinstance(value, Range | AnyRange)
            else f"{field.name}={'|'.join(map(_text, value))}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name))
        ]
        return " ".join(parts) or "always"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """`when` a condition holds, `use` these kernels in this order.

    Args:
      when: the condition.
      use: kernel names, best first; exhaustive unless the last one is `auto`.
      tiling: overrides of the kernels' tunables.
      source: where the rule comes from, e.g. a file, for explanations.
      reason: why in this order: measured, predicted or published, and by whom.
    """

    when: Condition
    use: tuple[str, ...]
    tiling: tuple[tuple[str, int], ...] = ()
    source: str = "a Policy"
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.use:
            raise ConfigError(f"{self.source}: a rule must use at least one kernel, or 'auto'.")
        if AUTO in self.use[:-1]:
            raise ConfigError(f"{self.source}: 'auto' may only come last in use={list(self.use)}.")
        check_tiling(self.tiling, self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels named, without `auto`."""
        return tuple(name for name in self.use if name != AUTO)

    @property
    def is_exhaustive(self) -> bool:
        """True where no other kernel may be chosen."""
        return self.use[-1] != AUTO

    def __str__(self) -> str:
        rule = f"{self.source}: when {self.when} use {', '.join(self.use)}"
        return f"{rule}; {self.reason}" if self.reason else rule


def check_tiling(tiling: Iterable[tuple[str, int]], source: str) -> None:
    """Raises ConfigError where a tunable is not a positive integer."""
    for name, value in tiling:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{source}: tiling: {name} must be a positive integer, got {value!r}.")


def first_match(rules: Iterable[Rule], request: Request) -> Rule | None:
    """Returns the first rule whose condition the request meets."""
    return next((rule for rule in rules if rule.when.matches(request)), None)


def _text(value: Any) -> str:
    return value.value if isinstance(value, Mode) else str(value)


def _kind(name: str) -> str:
    """Returns kernelry's name of a device kind; a glob stays one."""
    if any(sign in name for sign in "*?["):
        return name.lower()
    for platform in PLATFORMS:
        try:
            found = Target.parse(f"{platform}:{name}").kind
        except ConfigError:
            continue
        if found in KINDS:
            return found
    unknown = f"when.kind: unknown kind {name!r}{nearest(name.lower(), KINDS)}"
    raise ConfigError(followed(unknown, "or write a glob, e.g. 'h*'."))


def _hint(name: str, known: Sequence[str]) -> str:
    try:  # `cuda` and `rocm` are names of a platform too
        meant = Target.parse(name).platform
    except ConfigError:
        meant = ""
    return f"; did you mean {meant!r}?" if meant in known else nearest(name, known)
