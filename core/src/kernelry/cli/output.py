"""How the command writes: JSON for programs, and text that every terminal can show."""

from __future__ import annotations

import codecs
import json
import sys
from typing import Annotated, Any, final

import rich.text
import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_HANDLER = "kernelry.plainer"

_SIGNS = {"≤": "<=", "≥": ">=", "≠": "!=", "±": "+-", "∞": "inf", "→": "->", "…": "...", "Σ": "sum", "⟨": "<", "⟩": ">"}
_PLAINER = str.maketrans({**dict(zip("–−·■▨×•", "--.#+x*", strict=True)), **_SIGNS})
"""What a sign means, in ASCII; one character for one where a grid is drawn with it."""


@final
class Text(rich.text.Text):
    """Text that is made plainer before it is laid out, so that tables stay aligned, where standard output needs it."""

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


def survive_narrow_encodings() -> None:
    """Makes both outputs replace what their encoding lacks, instead of raising UnicodeEncodeError."""
    codecs.register_error(_HANDLER, _plainer)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_PLAINER)
    return lacking.encode("ascii", "replace").decode("ascii"), error.end
