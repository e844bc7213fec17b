"""What the compilers write about the programs that they compile, on request.

libtpu reads once, when it is loaded, where to write the final schedules of a program; XLA for GPUs is told with each
program. What the user has told either of them in `LIBTPU_INIT_ARGS` or `XLA_FLAGS` stays as it is, and is read there.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import final

from kernelry.aot.devices import topology_of
from kernelry.aot.gpu_code import THUNKS, Listed, kernels_in
from kernelry.request.target import Target


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """What was written about one program.

    Args:
      schedules: by the name of a kernel, for each time that the program has it, libtpu's final bundles and the slots
        that each of them uses, None where that was not written.
      listed: the kernels of a GPU's program, in the order of their launches.
      missing: why nothing was written; empty where the compilers write.
    """

    schedules: Mapping[str, tuple[tuple[str, str | None], ...]] = dataclasses.field(default_factory=dict)
    listed: tuple[Listed, ...] = ()
    missing: str = ""


@final
class Dumps:
    """The folder that a target's compiler writes to, which `dumps_for` opens.

    Args:
      folder: where; None where nothing is written.
      options: compiler options, for a compiler that is told with each program.
      missing: why nothing is written.
      own: whether the folder is kernelry's, so that a file is deleted when it was read.
    """

    def __init__(self, folder: Path | None, options: dict[str, str], missing: str = "", *, own: bool = True) -> None:
        self.folder, self.options = folder, options
        self._missing, self._own = missing, own
        self._seen: frozenset[str] = frozenset()
        self._programs: set[str] = set()
        self.collect()  # what was written before is not of the next program

    def collect(self) -> Written:
        """Returns what was written since the last time."""
        if self.folder is None:
            return Written(missing=self._missing)
        files = [path for path in sorted(self.folder.glob("*")) if path.is_file()]
        new = [path for path in files if path.name not in self._seen]
        listed = kernels_in(self.folder) if any(path.name.endswith(THUNKS) for path in new) else ()
        written = Written(_schedules(new), tuple(kernel for kernel in listed if kernel.program not in self._programs))
        self._programs |= {kernel.program for kernel in written.listed}
        if self._own:
            for path in new:
                path.unlink(missing_ok=True)
        self._seen = frozenset() if self._own else frozenset(path.name for path in files)
        return written


@contextlib.contextmanager
def dumps_for(target: Target) -> Iterator[Dumps]:
    """Lets the compiler of a target write, and deletes what it wrote at the end.

    Raises:
      NoCompilerError, ConfigError: as `topology_of`.
    """
    if target.platform != "gpu":
        folder, missing, own = _told_libtpu()
        yield Dumps(folder, {}, missing, own=own)
        return
    if theirs := _folder_in("XLA_FLAGS", "xla_dump_to"):
        yield Dumps(theirs, {}, own=False)
        return
    with tempfile.TemporaryDirectory(prefix="kernelry-") as name:
        yield Dumps(Path(name), {"xla_dump_to": name})


_LOADED = "libtpu was loaded before it was told to write its schedules, which it reads only then: "


def _told_libtpu() -> tuple[Path | None, str, bool]:
    if theirs := _folder_in("LIBTPU_INIT_ARGS", "xla_jf_dump_to"):
        return theirs, "", False
    folder = _folder_of_libtpu()
    if folder is None:
        return None, f"{_LOADED}ask in a new process, before anything is compiled for a TPU", True
    return folder, "", True


@functools.lru_cache(maxsize=1)
def _folder_of_libtpu() -> Path | None:
    """Where libtpu writes in this process; None where it was loaded before it could be told."""
    if _is_loaded("libtpu"):
        return None
    name = tempfile.mkdtemp(prefix="kernelry-")
    theirs = os.environ.get("LIBTPU_INIT_ARGS")
    mine = f"--xla_jf_dump_to={name} --xla_jf_dump_llo_pass_label_regex=final.*"
    os.environ["LIBTPU_INIT_ARGS"] = f"{theirs} {mine}" if theirs else mine
    try:
        topology_of(_ANY)  # loads libtpu
    except BaseException:  # no compiler, for instance
        shutil.rmtree(name, ignore_errors=True)
        raise
    finally:  # other processes that are started from here write nothing
        os.environ.pop("LIBTPU_INIT_ARGS")
        if theirs is not None:
            os.environ["LIBTPU_INIT_ARGS"] = theirs
    atexit.register(shutil.rmtree, name, ignore_errors=True)
    return Path(name)


_ANY = "tpu:v5e"
"""A target of which libtpu needs nothing else."""


def _is_loaded(library: str) -> bool:
    """Whether this process has loaded a shared library; libtpu exists for Linux alone."""
    try:
        return f"/{library}.so" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


def _folder_in(variable: str, flag: str) -> Path | None:
    """The folder that the user has named."""
    found = re.findall(rf"--{flag}=(\S+)", os.environ.get(variable, ""))
    return Path(found[-1]) if found else None


_FILE = re.compile(r"\d+-(?P<kernel>.+?)(?:\.(?P<number>\d+))?-\d+-(?P<what>[^-].*)\.txt")
_BUNDLES = "final_bundles"
_SLOTS = "final_hlo-static-per-bundle-utilization"


def _schedules(files: Iterable[Path]) -> dict[str, tuple[tuple[str, str | None], ...]]:
    """Of each kernel, in the order of the numbers by which XLA tells calls of one name apart."""
    found: dict[tuple[str, int], dict[str, Path]] = {}
    for path in files:
        match = _FILE.fullmatch(path.name)
        if match and match["what"] in (_BUNDLES, _SLOTS):
            found.setdefault((match["kernel"], int(match["number"] or 0)), {})[match["what"]] = path
    schedules: dict[str, tuple[tuple[str, str | None], ...]] = {}
    for (kernel, _), parts in sorted(found.items()):
        if _BUNDLES in parts:
            slots = parts[_SLOTS].read_text() if _SLOTS in parts else None
            schedules[kernel] = (*schedules.get(kernel, ()), (parts[_BUNDLES].read_text(), slots))
    return schedules
