"""How the command writes: JSON for programs, and text that every terminal can show."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, final

import rich.text
import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table

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


@final
class Rows:
    """A table where it fits the terminal; elsewhere a paragraph for each row, with each column's name and value.

    It fits where no line is cut: of columns with `no_wrap` the whole text, of others their longest word, but of those
    that fold no more than min_width characters, or 9.

    Args:
      table: with a title and without rows.
      rows: the text of each cell; a space before the first is indentation.
    """

    def __init__(self, table: Table, rows: Sequence[Sequence[str]]) -> None:
        self._table, self._rows = table, rows
        for first, *others in rows:
            table.add_row(_indented(first, 0), *map(Text, others))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self._table.columns
        texts = zip(*self._rows, strict=True) if self._rows else [()] * len(columns)
        between = 3 if self._table.box else 2
        if sum(between + _least(*each) for each in zip(columns, texts, strict=True)) < options.max_width:
            yield self._table
            return
        yield Text(str(self._table.title))
        for first, *values in self._rows:
            pairs = zip(columns[1:], values, strict=True)
            told = ", ".join(f"{column.header} {value}" for column, value in pairs if value)
            yield _indented(f"{first.removesuffix(':')}: {told}".rstrip(), 1)


def _indented(text: str, more: int) -> Padding:
    return Padding(Text(text.lstrip()), (0, 0, 0, more + len(text) - len(text.lstrip())), expand=False)


def _least(column: Column, texts: Sequence[str]) -> int:
    """The characters that a column needs."""
    texts = [str(column.header), *texts]
    if column.no_wrap:
        return max(map(len, texts))
    longest = max(len(word) for text in texts for word in text.split() or [""])
    return min(longest, column.min_width or 9) if column.overflow == "fold" else longest


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
