"""The file in which times are kept: JSON in the user's cache directory, or where KERNELRY_MEASUREMENTS says.

Writers take turns under a file lock, put everything into a new file and move that over the old one. So a reader, which
takes no lock, has the old file or the new one, and what was written before a process was killed stays. A file that is
damaged, or of another format, is not used; the next writer sets it aside under another name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import glob
import json
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, final

import jax

from kernelry._version import __version__
from kernelry.errors import ConfigError
from kernelry.policy.measurements import Entry, Measurements, Pairs, merged
from kernelry.policy.policy import Switches

_logger = logging.getLogger("kernelry")

FORMAT = 1
_PATIENCE = 60.0
"""Seconds that a writer waits for the others; each holds the lock for milliseconds."""

_COMPILERS = ("libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "jax-rocm60-pjrt", "jax-rocm7-pjrt")
"""The distributions whose compilers make the programs of accelerators."""
_REQUIREMENT = re.compile(r"\w[\w.-]*")
_FOR_DEVELOPERS = re.compile(r"""extra\s*==\s*["'](dev\w*|tests?|testing|lint|docs?|build|ci|benchmarks?)["']""")


class _DamagedError(Exception):
    """What is in a file is not what this module writes."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """The file of times.

    Args:
      path: the file; it need not exist.
    """

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    @classmethod
    def of_process(cls) -> Store:
        """The file that `kernelry tune` writes and calls read.

        Raises:
          ConfigError: KERNELRY_MEASUREMENTS is empty, or there is no home directory.
        """
        switches = Switches.of_process()
        path = switches.measurements_path
        if path is None:
            why = "there is no home directory" if switches.measurements is None else "KERNELRY_MEASUREMENTS is empty"
            raise ConfigError(
                f"{why}, so that times are neither read nor stored: set KERNELRY_MEASUREMENTS to the path of a file."
            )
        return cls(path)

    def read(self) -> tuple[Entry, ...]:
        """Returns the entries; none where there is no file.

        Raises:
          ConfigError: the file cannot be read, or is damaged or of another format.
        """
        try:
            return _entries(self.path)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigError(f"cannot read the times in {self.path}: {error.strerror}; name another file.") from error
        except _DamagedError as error:
            raise ConfigError(f"{self.path} is not a file of times that can be read: {error}.") from error

    def usable(self) -> Measurements | None:
        """Returns the times for calls; None where there are none. Takes no lock and raises nothing."""
        try:
            entries = self.read()
        except ConfigError as error:
            _logger.warning("no measured times are used: %s", error)
            return None
        return Measurements(entries, versions_here(entries)) if entries else None

    def add(self, entries: Iterable[Entry], *, set_aside: bool = True) -> tuple[Entry, ...]:
        """Stores entries, and returns all that are then stored; of equal keys the one of the highest rank stays.

        Args:
          entries: the times.
          set_aside: whether a file that is damaged, or not one of times, is renamed; else it is an error.

        Raises:
          ConfigError: the file cannot be written.
        """
        from filelock import FileLock, Timeout  # not needed to read

        try:
            path = Path(os.path.realpath(self.path))  # a link stays one
            if path.exists() and not path.is_file():  # a device must not be renamed
                raise OSError("it is not a file")
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{path.name}.lock"), timeout=_PATIENCE):
                everything = merged(_before(path, set_aside), entries)
                _replace(path, json.dumps({"format": FORMAT, "entries": [entry.to_json() for entry in everything]}))
        except Timeout as error:
            raise ConfigError(
                f"cannot write {self.path}: another process has held {error.lock_file} for {_PATIENCE:.0f} s; end it."
            ) from error
        except _DamagedError as error:
            raise ConfigError(
                f"{self.path} is not a file of times that can be read ({error}), and it stays as it is: name another."
            ) from error
        except OSError as error:
            raise ConfigError(
                f"cannot write the times to {self.path}: {error.strerror or error}; set KERNELRY_MEASUREMENTS, or "
                "--export, to the path of a file that can be written."
            ) from error
        return everything


def _before(path: Path, set_aside: bool) -> tuple[Entry, ...]:
    """What is stored so far; a file that is not one of ours is renamed, under the lock, if it may be."""
    try:
        return _entries(path)
    except FileNotFoundError:
        return ()
    except _DamagedError as error:
        if not set_aside:
            raise
        aside = _aside(path)
        os.replace(path, aside)
        warnings.warn(
            f"{path} is not a file of times that can be read ({error}): it is now {aside.name}, and a new one was "
            "begun",
            stacklevel=4,
        )
        return ()


def _aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists())


def _replace(path: Path, text: str) -> None:
    """Writes a file whole, with the permissions of the old one, else those that new files have."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of writers that were killed
        with contextlib.suppress(OSError):
            left.unlink()
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(new, "x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, new)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def _entries(path: Path) -> tuple[Entry, ...]:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _DamagedError(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise _DamagedError("not valid JSON: nested too deeply") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise _DamagedError(f"its format is {found!r}, not {FORMAT}")
    try:
        return tuple(Entry.from_json(entry) for entry in data["entries"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _DamagedError(f"an entry cannot be read: {error!r}") from error


def now() -> str:
    """The time as entries have it, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def versions_here(entries: Iterable[Entry] = ()) -> Pairs:
    """The versions in this process that times may depend on, besides that of a kernel's distribution.

    Args:
      entries: times, of which the versions that they name are looked up too.
    """
    found = {"jax": jax.__version__, "kernelry": __version__, "processor": _processor()}
    named = {name for entry in entries for name, _ in entry.versions}
    return tuple(sorted({**_installed({"jaxlib", *_COMPILERS, *named} - found.keys()), **found}.items()))


def versions_of(device: str, distribution: str) -> Pairs:
    """The versions that a time on a device depends on: of jax, the compiler, the kernel's distribution and its vendors.

    Its vendors are what the distribution requires, also for its extras. What is not installed is left out.

    Args:
      device: `platform[:kind]`.
      distribution: of the kernel, `name version`.
    """
    here = dict(versions_here())
    name, _, version = distribution.rpartition(" ")
    of_platform = {"cpu": ("processor",), "tpu": ("libtpu",), "gpu": _COMPILERS[1:]}
    wanted = ("jax", "jaxlib", "kernelry", *of_platform.get(device.partition(":")[0], ()))
    found = {**_installed(_required(name)), **{each: here[each] for each in wanted if each in here}}
    return tuple(sorted({**found, **({name: version} if name else {})}.items()))


def _required(distribution: str) -> frozenset[str]:
    """The normalised names of the distributions that one requires; those that only its developers use are left out."""
    import importlib_metadata  # not needed to import kernelry

    try:
        requirements = importlib_metadata.requires(distribution) or ()
    except Exception:  # no distribution brings the kernel, or its metadata is damaged
        return frozenset()
    names = (_REQUIREMENT.match(each) for each in requirements if not _FOR_DEVELOPERS.search(each))
    return frozenset(re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name)


def _installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of some distributions that are installed."""
    import importlib_metadata

    found = {}
    for name in names:
        with contextlib.suppress(Exception):  # not installed, half uninstalled, or a name that none can have
            found[name] = importlib_metadata.version(name)
    return found


def _processor() -> str:
    """The model of the CPU and the number of its cores that this process may use: kernels on CPU depend on both."""
    names: Iterator[str] = iter(())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(names, '') or platform.processor() or platform.machine()}, {cores} cores"
