"""What a shell completes: the names that options take, and words with colons in bash.

typer writes the shells' scripts and completes verbs, options and files. Each function here returns the names of one
kind that begin with what was typed, and imports what knows them.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator

_VARIABLE = "_KERNELRY_COMPLETE"
"""What typer's scripts set, to `complete_bash` and so on."""


def _completer(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _kernels() -> Iterable[str]:
    from kernelry.registry import installed

    return installed.registry().kernels


def _targets() -> Iterable[str]:
    from kernelry.request.target import KINDS, PLATFORMS, Target, platform_meant

    return *PLATFORMS, *(str(Target(str(platform_meant(kind)), kind)) for kind in KINDS)


def _models() -> Iterable[str]:
    from kernelry.models.named import named_configs

    return named_configs()


def _modes() -> Iterable[str]:
    from kernelry.request.request import Mode

    return (mode.value for mode in Mode)


def _shapes() -> Iterable[str]:
    from kernelry.bench.shapes import ACCELERATOR, CPU

    return *ACCELERATOR, *CPU


def _passes() -> Iterable[str]:
    from kernelry.bench.cases import Pass

    return (which.value for which in Pass)


kernel_names = _completer(_kernels)
kernels_or_auto = _completer(lambda: ("auto", *_kernels()))
targets = _completer(_targets)
models = _completer(_models)
modes = _completer(_modes)
shapes = _completer(_shapes)
passes = _completer(_passes)
dtypes = _completer(lambda: ("bfloat16", "float16", "float32", "float64"))


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Lets the command answer a shell, where one asks for completions; an error completes nothing."""
    shell = os.environ.get(_VARIABLE, "").removeprefix("complete_")
    if _VARIABLE not in os.environ or shell.startswith("source"):
        yield
        return
    typed = _join_words() if shell == "bash" else ""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception:
        raise SystemExit(1) from None
    finally:
        lines = out.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line.removeprefix(typed) for line in lines))


def _join_words() -> str:
    """Joins the words of the line that bash divided, in the variables that typer reads.

    bash ends a word at a colon and at `=`, and replaces only what follows.

    Returns:
      The part of the name being completed that bash does not replace, e.g. `gpu:`.
    """
    words, place = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    joined, found = list[str](), 0
    for index, word in enumerate(words[: place + 1]):
        before = words[index - 1] if index else ""
        is_value = joined and joined[-1].startswith("--") and "=" in (word[:1], before[-1:])
        if joined and word and (is_value or word.startswith(":") or before.endswith(":")):
            joined[-1] += word
        else:
            joined.append(word)
        found = len(joined) - 1
    os.environ |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(found)}
    option, _, value = joined[found].partition("=")
    name = value if option.startswith("--") else joined[found]
    return "".join(name.rpartition(":")[:2])
