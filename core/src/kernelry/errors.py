"""Every exception kernelry raises.

    KernelryError
    ├── ArgumentError (ValueError)        an argument of a call is wrong
    │   └── ShapeError                    … in rank, shape, length or dtype
    ├── ConfigError (ValueError)          a config, policy or environment switch is wrong
    ├── PluginError (RuntimeError)        a plugin is broken or two plugins collide
    ├── CacheFullError (RuntimeError)     tokens do not fit into a cache
    └── NoKernelError (LookupError)       no kernel serves the request
        └── KernelRefusedError            the kernel that was asked for by name refuses it

Each message says what was asked, what was found, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelry.resolution.explanation import Resolution


class KernelryError(Exception):
    """Base of every exception kernelry raises."""


class ArgumentError(KernelryError, ValueError):
    """An argument has a value that means nothing here."""


class ShapeError(ArgumentError):
    """An argument has the wrong rank, shape, length or dtype."""


class ConfigError(KernelryError, ValueError):
    """A config file, a policy or an environment switch cannot be understood."""


class PluginError(KernelryError, RuntimeError):
    """A plugin is broken, unknown, or claims a name that another one claims too."""


class CacheFullError(KernelryError, RuntimeError):
    """Tokens do not fit into a cache; nothing was written."""


class NoKernelError(KernelryError, LookupError):
    """No kernel serves the request; `resolution` holds every refusal."""

    def __init__(self, message: str, resolution: Resolution | None = None) -> None:
        super().__init__(message)
        self.resolution = resolution


class KernelRefusedError(NoKernelError):
    """The kernel that was asked for by name refuses the request."""


def nearest(name: str, known: Iterable[str], *, listed: bool = True) -> str:
    """Returns a hint for a misspelt name: `; did you mean 'x'?` or, where `listed`, the names there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not listed:
        return ""
    return f"; known: {', '.join(names) or 'none'}"


def sentence(text: str) -> str:
    """Returns a text with one mark at its end; that of a question stays."""
    return text if text.endswith((".", "?")) else f"{text}."


def followed(text: str, more: str) -> str:
    """Returns `text; more`, or where the text is a question `Text? More`."""
    if text.endswith("?"):
        return f"{text} {more[:1].upper()}{more[1:]}"
    return f"{text.removesuffix('.')}; {more}"
