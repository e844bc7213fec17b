"""How the command writes: JSON for programs, and text that every terminal can show."""

from __future__ import annotations

import codecs
import json
import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_PLAINER = str.maketrans("→–−…·■▨≤≥≠×±•", ">--..#+<>!x~*")
"""One character for one, so that grids and tables stay aligned."""


def print_json(data: Any) -> None:
    """Writes indented JSON."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def survive_narrow_encodings() -> None:
    """Makes both outputs replace what their encoding lacks, instead of raising UnicodeEncodeError."""
    codecs.register_error("kernelry.plainer", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="kernelry.plainer")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_PLAINER)
    return lacking.encode("ascii", "replace").decode("ascii"), error.end
