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
from kernelry.errors import ConfigError
from kernelry.request import Request
from kernelry.switches import Switches

if TYPE_CHECKING:
    from kernelry.resolution import Resolution

FORMAT = 1


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What one request resolved to.

    Args:
      request: the request.
      kernel: the winner's name; None where no kernel serves the request.
      adapters: those around it, outermost first.
      tiling: (tunable, value) pairs.
      rule: what decided, with its source; told, not compared.
      distribution: where the kernel comes from, `name version`; told, not compared.
    """

    request: Request
    kernel: str | None
    adapters: tuple[str, ...]
    tiling: tuple[tuple[str, int], ...]
    rule: str = dataclasses.field(default="", compare=False)
    distribution: str = dataclasses.field(default="", compare=False)

    @classmethod
    def of(cls, resolution: Resolution) -> Entry:
        """Writes a resolution down."""
        plan, winner = resolution.plan, resolution.winner
        return cls(
            resolution.request,
            resolution.kernel,
            () if plan is None else tuple(step.adapter.name for step in plan.steps),
            () if plan is None else tuple(sorted(plan.tiling.values)),
            resolution.rule,
            "" if winner is None else winner.distribution,
        )

    @property
    def choice(self) -> str:
        """What may not change, as words."""
        through = "".join(f" through {name}" for name in self.adapters)
        tiling = ", ".join(f"{name}={value}" for name, value in self.tiling)
        return f"{self.kernel or 'no kernel'}{through}{f' with {tiling}' if tiling else ''}"

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `from_json` reads it back."""
        return {
            "request": self.request.to_json(),
            "kernel": self.kernel,
            "adapters": list(self.adapters),
            "tiling": dict(self.tiling),
            "rule": self.rule,
            "distribution": self.distribution,
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
        return cls(request, data["kernel"], adapters, tiling, data["rule"], data["distribution"])


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
    def of(cls, resolutions: Iterable[Resolution]) -> Lock:
        """Locks resolutions; the last of equal requests stays."""
        return cls(tuple({resolution.request: Entry.of(resolution) for resolution in resolutions}.values()))

    @classmethod
    def read(cls, path: str | Path) -> Lock:
        """Reads a lock file.

        Raises:
          ConfigError: there is none, or it is not one.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the lock file {path}: {error.strerror}; run kernelry lock.") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}; run kernelry lock again.") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f"{path} is no lock file of format {FORMAT}; run kernelry lock again.")
        try:
            return cls(tuple(Entry.from_json(entry) for entry in data["resolutions"]), str(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; run kernelry lock again.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: a resolution cannot be read: {error!r}; run kernelry lock again.") from error

    def to_json(self) -> dict[str, Any]:
        """Returns plain data in an order that depends on the requests only."""
        entries = sorted((entry.to_json() for entry in self.entries), key=_request_text)
        return {
            "format": FORMAT,
            "versions": {"jax": jax.__version__, "kernelry": __version__},
            "resolutions": entries,
        }

    def write(self, path: str | Path) -> None:
        """Writes the lock file: indented, keys sorted, the same bytes for the same resolutions."""
        text = json.dumps(self.to_json(), indent=2, sort_keys=True) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    def difference(self, resolution: Resolution) -> str | None:
        """Says in what a resolution differs from the lock; None where it does not."""
        locked = next((entry for entry in self.entries if entry.request == resolution.request), None)
        found = Entry.of(resolution)
        if locked is None:
            return f"{resolution.request} is not in {self.source}; it would get {found.choice} (by {found.rule})"
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
                f"strict mode: {difference}. Run kernelry lock to accept this, or restore what decided before."
            )


def _request_text(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry["request"], sort_keys=True)


def lock_in_force(scoped: Lock | None) -> Lock | None:
    """Returns the lock of a scope, else that of KERNELRY_STRICT and KERNELRY_LOCK.

    Raises:
      ConfigError: strict mode is on and the lock file cannot be read.
    """
    if scoped is not None:
        return scoped
    switches = Switches.of_process()
    return _read_once(switches.lock) if switches.strict else None


@functools.lru_cache(maxsize=8)
def _read_once(path: str) -> Lock:
    return Lock.read(path)
