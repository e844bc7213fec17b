"""Lock files: the resolutions of a config, written down, and checked in strict mode."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import jax

from kernelry._version import __version__
from kernelry.errors import ConfigError, followed
from kernelry.request.request import Mode, Request

if TYPE_CHECKING:
    from kernelry.execution.plan import Plan
    from kernelry.resolution.explanation import Resolution

FORMAT = 1
_LOCK_AGAIN = "name another file, or delete it and run kernelry lock again."


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """What asked for a resolution: a config, with the shape of a model.

    Args:
      config: its file, relative to the lock file.
      facts: (name, value) pairs of the target and the shape, sorted.
    """

    config: str
    facts: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `from_json` reads it back."""
        return {"config": self.config, "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        """Reads what `to_json` wrote.

        Raises:
          ConfigError: a fact is neither a number nor a name.
        """
        facts = data["facts"]
        if any(isinstance(value, list | dict) for value in facts.values()):
            raise ConfigError(f"origin: facts must be numbers and names, got {facts!r}")
        return cls(str(data["config"]), tuple(sorted(facts.items())))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What one request resolved to.

    Args:
      request: the request.
      kernel: the winner's name; None where no kernel serves the request.
      adapters: those around it, outermost first.
      tiling: (tunable, value) pairs.
      shards: of a call on a mesh, what runs in each class of its pairs of shards, as words; else empty.
      rule: what decided, with its source; told, not compared.
      distribution: where the kernel comes from, `name version`; told, not compared.
      origins: what asked for it, where `kernelry lock` wrote it; told, not compared.
    """

    request: Request
    kernel: str | None
    adapters: tuple[str, ...]
    tiling: tuple[tuple[str, int], ...]
    shards: tuple[str, ...] = ()
    rule: str = dataclasses.field(default="", compare=False)
    distribution: str = dataclasses.field(default="", compare=False)
    origins: tuple[Origin, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def of(cls, resolution: Resolution, origins: tuple[Origin, ...] = ()) -> Entry:
        """Writes a resolution down."""
        winner = resolution.winner
        classes = () if resolution.shards is None else resolution.plans
        return cls(
            resolution.request,
            *_facts(resolution.plan),
            tuple(_words(*_facts(plan)) for plan in classes),
            resolution.rule,
            "" if winner is None else winner.distribution,
            origins,
        )

    @property
    def choice(self) -> str:
        """What may not change, as words."""
        chosen = _words(self.kernel, self.adapters, self.tiling)
        others = [words for words in dict.fromkeys(self.shards) if words != chosen]
        return chosen + (f", for other pairs of shards {' or '.join(others)}" if others else "")

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `from_json` reads it back."""
        return {
            "request": self.request.to_json(),
            "kernel": self.kernel,
            "adapters": list(self.adapters),
            "tiling": dict(self.tiling),
            **({"shards": list(self.shards)} if self.shards else {}),
            "rule": self.rule,
            "distribution": self.distribution,
            "origins": [origin.to_json() for origin in self.origins],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Reads what `to_json` wrote.

        Raises:
          ConfigError: the request cannot be read.
        """
        tiling = tuple(sorted((str(name), int(value)) for name, value in data["tiling"].items()))
        adapters = tuple(str(name) for name in data["adapters"])
        request = Request.from_json(data["request"])
        origins = tuple(Origin.from_json(origin) for origin in data.get("origins", ()))
        shards = tuple(str(words) for words in data.get("shards", ()))
        return cls(request, data["kernel"], adapters, tiling, shards, data["rule"], data["distribution"], origins)


def _facts(plan: Plan | None) -> tuple[str | None, tuple[str, ...], tuple[tuple[str, int], ...]]:
    """The kernel, the adapters and the tiling of a plan."""
    if plan is None:
        return None, (), ()
    return plan.kernel.name, tuple(step.adapter.name for step in plan.steps), tuple(sorted(plan.tiling.values))


def _words(kernel: str | None, adapters: tuple[str, ...], tiling: tuple[tuple[str, int], ...]) -> str:
    through = "".join(f" through {name}" for name in adapters)
    tunables = ", ".join(f"{name}={value}" for name, value in tiling)
    return f"{kernel or 'no kernel'}{through}{f' with {tunables}' if tunables else ''}"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Lock:
    """The resolutions that strict mode allows.

    Args:
      entries: one per request.
      source: where they were read, for errors.
    """

    entries: tuple[Entry, ...]
    source: str = dataclasses.field(default="the lock", compare=False)

    @classmethod
    def of(cls, resolutions: Iterable[Resolution], origin: Origin | None = None) -> Lock:
        """Locks resolutions; the last of equal requests stays.

        Args:
          resolutions: e.g. the list of `kernelry.record()`.
          origin: what asked for them, so that it can be asked again.
        """
        origins = () if origin is None else (origin,)
        entries = {resolution.request: Entry.of(resolution, origins) for resolution in resolutions}
        return cls(tuple(entries.values()))

    def merged(self, newer: Lock) -> Lock:
        """Returns both together. What the newer lock's origins asked for before and ask no more is left out.

        Raises:
          ConfigError: configs that are not the same file decide differently for one request.
        """
        again = {origin for entry in newer.entries for origin in entry.origins}
        kept: dict[Request, Entry] = {}
        for entry in self.entries:
            others = tuple(origin for origin in entry.origins if origin not in again)
            if others or not entry.origins:
                kept[entry.request] = dataclasses.replace(entry, origins=others)
        for entry in newer.entries:
            kept[entry.request] = _joined(kept.get(entry.request), entry)
        return Lock(tuple(kept.values()), self.source)

    def without(self, configs: Iterable[str]) -> Lock:
        """Returns this lock without what only these configs asked for."""
        left_out = set(configs)
        kept = []
        for entry in self.entries:
            others = tuple(origin for origin in entry.origins if origin.config not in left_out)
            if others or not entry.origins:
                kept.append(dataclasses.replace(entry, origins=others))
        return Lock(tuple(kept), self.source)

    @classmethod
    def read(cls, path: str | Path) -> Lock:
        """Reads a lock file.

        Raises:
          ConfigError: there is none, or it is not one.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            fix = "run kernelry lock" if isinstance(error, FileNotFoundError) else "name another file"
            raise ConfigError(f"cannot read the lock file {path}: {error.strerror}; {fix}.") from error
        except ValueError as error:
            raise ConfigError(followed(f"{path} is not valid JSON: {error}", _LOCK_AGAIN)) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f"{path} is not a lock file of format {FORMAT}; {_LOCK_AGAIN}")
        try:
            return cls(tuple(Entry.from_json(entry) for entry in data["resolutions"]), str(path))
        except ConfigError as error:
            raise ConfigError(followed(f"{path}: {error}", _LOCK_AGAIN)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: a resolution cannot be read: {error!r}; {_LOCK_AGAIN}") from error

    def to_json(self) -> dict[str, Any]:
        """Returns plain data in an order that depends on the requests only."""
        entries = sorted((entry.to_json() for entry in self.entries), key=_request_text)
        return {
            "format": FORMAT,
            "versions": {"jax": jax.__version__, "kernelry": __version__},
            "resolutions": entries,
        }

    def write(self, path: str | Path, *, merge: bool = False, gone: Iterable[str] = ()) -> Lock:
        """Writes the lock file: indented, keys sorted, the same bytes for the same resolutions.

        What no kernel serves is left out, and with `merge` out of the file: such a call is an error in any mode.

            with kernelry.record() as resolutions:
                train_step(...)
            Lock.of(resolutions).write("kernelry.lock.json", merge=True)

        Args:
          path: the file.
          merge: keep what the file, where there is one, holds of other requests.
          gone: with `merge`, configs that no longer exist: what only they asked for is left out.

        Returns:
          The lock as written.

        Raises:
          ConfigError: the file cannot be written; with `merge` also where it is not a lock file, or where configs
            decide differently for one request.
        """
        merged = Lock.read(path).without(gone).merged(self) if merge and Path(path).exists() else self
        lock = Lock(tuple(entry for entry in merged.entries if entry.kernel is not None), merged.source)
        text = json.dumps(lock.to_json(), indent=2, sort_keys=True) + "\n"
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the lock file {path}: {error.strerror}.") from error
        return lock

    def difference(self, resolution: Resolution) -> str | None:
        """Says in what a resolution differs from the lock; None where it does not."""
        locked = next((entry for entry in self.entries if entry.request == resolution.request), None)
        found = Entry.of(resolution)
        if locked is None:
            nearest = self._nearest(resolution.request)
            return (
                f"{resolution.request} is not in {self.source}; it would get {found.choice} (by {found.rule}){nearest}"
            )
        if locked == found:
            return None
        return (
            f"{resolution.request}: {self.source} says {locked.choice} (by {locked.rule}), "
            f"now it would get {found.choice} (by {found.rule})"
        )

    def check(self, resolution: Resolution) -> None:
        """Refuses a resolution that is not the locked one.

        Raises:
          ConfigError: the request is not in the lock, or kernel, adapters or tiling differ.
        """
        difference = self.difference(resolution)
        if difference is not None:
            raise ConfigError(
                f"strict mode: {difference}. Run kernelry lock to accept this (its --batch, --mask and --cache say "
                "what a model asks for; in Python, kernelry.config.Lock.of(resolutions of record()).write(path, "
                "merge=True)), or restore what decided before."
            )

    def _nearest(self, request: Request) -> str:
        """Says how the locked request that is most like this one differs from it."""
        alike = [changed_fields(entry.request, request) for entry in self.entries]
        if not alike:
            return ""
        fields = min(alike, key=len)
        return f"; the nearest one there has {', '.join(f'{name}={was} instead of {now}' for name, was, now in fields)}"


def changed_fields(before: Request, now: Request) -> tuple[tuple[str, str, str], ...]:
    """The fields in which two requests differ: name, value before, value now."""
    names = [field.name for field in dataclasses.fields(Request) if field.compare and field.init]
    pairs = [(name, getattr(before, name), getattr(now, name)) for name in names]
    return tuple((name, _shown(one), _shown(other)) for name, one, other in pairs if one != other)


def _shown(value: Any) -> str:
    if isinstance(value, frozenset):
        return ",".join(sorted(operand.value for operand in value)) or "none"
    return str(value.value) if isinstance(value, Mode) else str(value)


def _joined(before: Entry | None, now: Entry) -> Entry:
    """The newer entry, with the origins of both."""
    if before is None or before.kernel is None:
        return now
    if now.kernel is None:
        return before
    configs = {origin.config for origin in now.origins}
    others = sorted({origin.config for origin in before.origins} - configs)
    if before != now and others and configs:
        raise ConfigError(
            f"{now.request}: {', '.join(others)} got {before.choice}, and {', '.join(sorted(configs))} gets "
            f"{now.choice}. Strict mode allows one of them: give both configs the same rules, or lock them in two "
            "files."
        )
    origins = dict.fromkeys((*before.origins, *now.origins))
    return dataclasses.replace(now, origins=tuple(origins))


def _request_text(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry["request"], sort_keys=True)


@functools.lru_cache(maxsize=8)
def read_once(path: str) -> Lock:
    """Reads a lock file that does not change while the process runs, as KERNELRY_LOCK names it."""
    return Lock.read(path)
