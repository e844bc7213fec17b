"""What each extra of the installed distributions would add, read from their metadata."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import re
from collections.abc import Iterable, Iterator
from typing import Any, final

import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kernelry.kernel.refusal import RefusalCode
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.registry.contents import InstalledKernel, Registry
from kernelry.request.request import Mode, Request
from kernelry.request.target import Target

CORE = "kernelry"


@final
class State(enum.Enum):
    """Whether what an extra adds is here."""

    INSTALLED = "installed"
    MISSING = "missing"
    UNAVAILABLE = "not for this Python or platform"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Extra:
    """An extra of an installed distribution.

    Args:
      distribution, name: as pip names them, e.g. `kernelry` and `flax`.
      state: whether what it adds is here.
      adds: its requirements, e.g. `flax>=0.12`; with their condition, where this Python or platform does not meet it.
      missing: what of it, and of what it needs itself, is not installed, or installed in another version.
      kernels: those that do not serve without it.
    """

    distribution: str
    name: str
    state: State
    adds: tuple[str, ...]
    missing: tuple[str, ...]
    kernels: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install '{self.distribution}[{self.name}]'"

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `install` is null where there is nothing to install."""
        install = self.install if self.state is State.MISSING else None
        return {**dataclasses.asdict(self), "state": self.state.value, "install": install}

    def __str__(self) -> str:
        kernels = f"for {', '.join(self.kernels)}, " if self.kernels else ""
        if self.state is State.MISSING:
            return f"{kernels}would add {', '.join(self.missing)}: {self.install}"
        return f"{kernels}{self.state.value}: {', '.join(self.adds) or 'adds nothing'}"


def extras(registry: Registry) -> tuple[Extra, ...]:
    """Returns the extras of core and of every distribution that brings a plugin, by distribution."""
    others = sorted({plugin.distribution.partition(" ")[0] for plugin in registry.plugins} - {CORE})
    return tuple(extra for distribution in (CORE, *others) for extra in _extras_of(distribution, registry))


def _extras_of(distribution: str, registry: Registry) -> Iterator[Extra]:
    try:
        found = importlib_metadata.distribution(distribution)
    except (importlib_metadata.PackageNotFoundError, ValueError):  # half uninstalled, or a name that none can have
        return
    names = found.metadata.get_all("Provides-Extra") or ()
    needs = {name: tuple(_needs(found.requires, name)) for name in names}
    kernels = _kernels(distribution, [need for own in needs.values() for need in own], registry)
    for name, own in sorted(needs.items()):
        here = [need for need in own if _applies(need, name)]
        missing = tuple(dict.fromkeys(text for need in here for text in _missing(need, {(distribution, name)})))
        if own and not here:
            state = State.UNAVAILABLE
            adds = tuple(f"{_short(need)} {_condition(need)}" for need in own)
        else:
            state, adds = State.MISSING if missing else State.INSTALLED, tuple(map(_short, here))
        yield Extra(distribution, name, state, adds, missing, kernels.get(name, ()))


def _needs(requires: Iterable[str] | None, extra: str) -> Iterator[Requirement]:
    """Of all requirements those of an extra, whatever the Python and the platform."""
    for text in requires or ():
        with contextlib.suppress(InvalidRequirement):
            need = Requirement(text)
            if canonicalize_name(extra) in map(canonicalize_name, _EXTRA.findall(str(need.marker or ""))):
                yield need


_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


def _short(need: Requirement) -> str:
    """The requirement without its condition."""
    extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    return f"{need.name}{extras}{need.specifier}"


def _condition(need: Requirement) -> str:
    """What a requirement asks of Python and the platform, e.g. `where python_version >= "3.12"`."""
    parts = re.split(r"\s+and\s+", str(need.marker))
    return "where " + " and ".join(part.strip("() ") for part in parts if not _EXTRA.search(part))


def _missing(need: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """What a requirement lacks here: itself, its version, or what its own extras need."""
    try:
        found = importlib_metadata.distribution(need.name)
    except importlib_metadata.PackageNotFoundError:
        yield _short(need)
        return
    if not need.specifier.contains(found.version, prereleases=True):
        yield f"{_short(need)} ({found.version} is installed)"
        return
    for extra in sorted(need.extras):
        key = (canonicalize_name(need.name), canonicalize_name(extra))
        if key not in seen:
            seen.add(key)
            for inner in _needs(found.requires, extra):
                if _applies(inner, extra):
                    yield from _missing(inner, seen)


def _kernels(distribution: str, needs: Iterable[Requirement], registry: Registry) -> dict[str, tuple[str, ...]]:
    """The kernels of a distribution by the extra that they ask for where nothing of its extras is installed."""
    spellings = {name for need in needs for name in (need.name, *(need.name.replace(*pair) for pair in ("-_", "_-")))}
    nothing = Environment(Knowledge.ASSUMED, tuple((name, None) for name in sorted(spellings)))
    asked: dict[str, tuple[str, ...]] = {}
    for kernel in registry.kernels.values():
        if kernel.distribution.partition(" ")[0] == distribution:
            for extra in _asked_by(kernel, nothing):
                asked[extra] = (*asked.get(extra, ()), kernel.name)
    return asked


def _asked_by(kernel: InstalledKernel, nothing: Environment) -> tuple[str, ...]:
    """The extras that a kernel's refusals name."""
    can = kernel.spec.capabilities
    target = Target(min(can.platforms, default="cpu"))
    mode = next((mode for mode in Mode if mode in can.modes), Mode.TRAIN)
    try:
        request = Request(target=target, q_len=1024, dtype=min(can.dtypes, default="float32"), mode=mode)
        refusals = kernel.spec.refusals(request, nothing.fresh())
    except Exception:  # another's function, which conformance tests
        return ()
    missing = [each.remedy or "" for each in refusals if each.code is RefusalCode.VENDOR_MISSING]
    return tuple(dict.fromkeys(name for text in missing for name in re.findall(r"\[([\w.-]+)\]", text)))
