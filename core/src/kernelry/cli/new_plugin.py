"""The verb `new-plugin`: writes a plugin distribution with a kernel that works."""

from __future__ import annotations

import dataclasses
import importlib.resources
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Annotated, final

import typer

from kernelry import _version
from kernelry.cli.output import Json, print_json
from kernelry.errors import ArgumentError
from kernelry.kernel.spec import AUTO
from kernelry.registry import installed
from kernelry.registry.hooks import CONTRACT

_TEMPLATES = "new_plugin_files"
"""Holds a template for each file, by the file's own name and `.txt`."""

_FILES = (
    "README.md",
    "pyproject.toml",
    ".github/workflows/test.yml",
    "src/$package/__init__.py",
    "src/$package/kernel.py",
    "src/$package/plugin.py",
    "src/$package/py.typed",
    "tests/test_kernel.py",
)
_EMPTY = "py.typed"
_PREFIX = re.compile(r"kernelry[-_]")
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_LONGEST = 40
"""Characters of a name: with more, lines of the files are longer than 88 characters."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """What things are called in a new plugin.

    `flash-mini` and `kernelry-flash-mini` name the folder as they are written, the distribution `kernelry-flash-mini`,
    the package `kernelry_flash_mini`, the plugin and its kernel `flash_mini`, and the class `FlashMiniKernel`.
    """

    folder: str
    kernel: str

    @classmethod
    def of(cls, given: str) -> Names:
        """Reads what the command was given.

        Raises:
          ArgumentError: it is not a name, or one that means something else.
        """
        name = _PREFIX.sub("", given, count=1) if _PREFIX.match(given) else given
        if not _NAME.fullmatch(name) or len(name) > _LONGEST:
            hint = "-".join(re.findall(r"[a-z0-9]+", name.lower())).lstrip("0123456789-")[:_LONGEST].rstrip("-")
            instead = f"; write e.g. {hint}" if hint else ""
            raise ArgumentError(
                f"new-plugin: {given!r} is not a name for a plugin: at most {_LONGEST} lower-case letters and digits, "
                f"with - or _ between words, and a letter first{instead}."
            )
        kernel = name.replace("-", "_")
        if kernel == AUTO:
            raise ArgumentError(f"new-plugin: {kernel!r} means something else in kernelry; give another name.")
        return cls(given, kernel)

    @property
    def distribution(self) -> str:
        """What pip calls it."""
        return f"kernelry-{self.kernel.replace('_', '-')}"

    @property
    def package(self) -> str:
        """What Python imports."""
        return f"kernelry_{self.kernel}"

    @property
    def body(self) -> str:
        """The class that computes."""
        return "".join(word.capitalize() for word in self.kernel.split("_")) + "Kernel"

    def clashes(self) -> Iterator[str]:
        """Says which of the names are taken in this environment, or by a distribution of this project."""
        found = installed.registry()
        for plugin in found.plugins:
            if self.kernel == plugin.name:
                yield f"a plugin of that name is installed, from {plugin.distribution}"
        if self.kernel in found.kernels:
            yield f"a kernel of that name is installed, from {found.kernels[self.kernel].distribution}"
        elif self.kernel in found.contested:
            yield f"a kernel of that name is installed, from {' and '.join(found.contested[self.kernel])}"
        for distribution, kernels in installed.KERNELS_OF.items():
            if self.kernel in kernels or self.distribution == distribution:
                yield f"it is a name of {distribution}"
        if importlib.util.find_spec(self.package) is not None:
            yield f"a package {self.package} is installed"

    def texts(self) -> dict[str, str]:
        """The files, by their path in the folder."""
        names = {name: getattr(self, name) for name in ("distribution", "package", "kernel", "body")}
        words = {**names, "contract": str(CONTRACT), "versions": _compatible(_version.__version__)}
        templates = importlib.resources.files("kernelry.cli") / _TEMPLATES
        return {
            Template(path).substitute(words): ""
            if path.endswith(_EMPTY)
            else Template((templates / f"{path.rpartition('/')[2]}.txt").read_text("utf-8")).substitute(words)
            for path in _FILES
        }


def _compatible(version: str) -> str:
    """The releases with the plugin contract of this one: `0.1.3` → `>=0.1,<0.2`."""
    major, minor = map(int, version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"


def write(
    name: Annotated[str, typer.Argument(help="of the plugin and its kernel, e.g. flash-mini.")],
    into: Annotated[Path, typer.Option(help="the folder in which the folder NAME is made.")] = Path(),
    as_json: Json = False,
) -> None:
    """Writes a plugin distribution: a kernel that works, with its declarations, tests and CI file."""
    names = Names.of(name)
    clash = next(names.clashes(), None)
    if clash is not None:
        instead = f"Give another name, e.g. my-{names.kernel.replace('_', '-')}"
        own = f", or pip uninstall {names.distribution}" if names.distribution in clash else ""
        raise ArgumentError(f"new-plugin: {names.kernel!r} is taken: {clash}. {instead}{own}.")
    folder = into / names.folder
    texts = names.texts()
    _write(folder, texts)
    steps = _steps(folder, names.kernel)
    data = {
        "folder": str(folder),
        "distribution": names.distribution,
        "plugin": names.kernel,
        "kernel": names.kernel,
        "files": [*texts],
        "next": steps,
    }
    if as_json:
        print_json(data)
        return
    lines = [f"{folder}: the distribution {names.distribution} with the kernel {names.kernel}"]
    lines += [*(f"  {path}" for path in texts), "", "Next:", *(f"  {step}" for step in steps)]
    lines += ["", "Without a network, where hatchling is installed:", f"  {steps[0]} --no-build-isolation"]
    sys.stdout.write("\n".join(lines) + "\n")  # not wrapped: commands are copied


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True)
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8", newline="\n")
    except FileExistsError as error:
        raise ArgumentError(
            f"new-plugin: {error.filename} exists, and nothing is overwritten: delete it, give another name, or "
            "another folder with --into."
        ) from error
    except OSError as error:
        raise ArgumentError(f"new-plugin: cannot write {error.filename or folder}: {error.strerror}.") from error


def _steps(folder: Path, kernel: str) -> list[str]:
    """What to do next; `./` because `pip install NAME` would ask the index for it."""
    place = str(folder) if folder.is_absolute() else f"./{folder.as_posix()}"
    place = shlex.quote(place)
    return [f"pip install {place}", f"kernelry conformance {kernel}", f"pip install pytest && pytest {place}"]
