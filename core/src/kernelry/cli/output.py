"""How the command writes: JSON for programs, and text that every terminal can show."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any, final

import rich.text
import typer
from rich.console import Console, RenderableType

console = Console(highlight=False, soft_wrap=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_HANDLER = "kernelry.ascii"

_SIGNS = {"≤": "<=", "≥": ">=", "≠": "!=", "±": "+-", "∞": "inf", "→": "->", "…": "...", "Σ": "sum", "⟨": "<", "⟩": ">"}
_ASCII = str.maketrans({**dict(zip("–−·■▨×•", "--.#+x*", strict=True)), **_SIGNS})
"""ASCII that replaces a sign; a single character for those that grids are drawn with."""


@final
class Text(rich.text.Text):
    """Text whose signs, where standard output lacks them, are replaced before it is laid out: tables stay aligned."""

    def __init__(self, text: str = "", style: str = "") -> None:
        super().__init__(_shown(text), style)


def _shown(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, _HANDLER).decode(encoding)
    return text


def print_json(data: Any) -> None:
    """Writes indented JSON."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def show(as_json: bool, data: Any, parts: Iterable[RenderableType]) -> None:
    """Writes the result of a verb: its data for programs, or its parts for people."""
    if as_json:
        print_json(data)
        return
    for part in parts:
        console.print(part)


def survive_narrow_encodings() -> None:
    """Makes standard output and error replace what their encoding lacks, instead of raising UnicodeEncodeError."""
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_ASCII)
    return lacking.encode("ascii", "replace").decode("ascii"), error.end
