"""How the command writes: JSON for programs, and text that every terminal can show."""

from __future__ import annotations

import codecs
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, final

import rich.text
import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, ProgressColumn
from rich.table import Table

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
class Paragraph:
    """Text in lines as wide as the terminal, broken between words alone: a word that is longer runs over.

    Args:
      text: what it says.
      indent: spaces before its lines.
      hang: spaces before all but the first, in addition.
      style: of all of it.
      head: how many characters at its start are bold.
    """

    def __init__(self, text: str, indent: int = 0, hang: int = 2, style: str = "", head: int = 0) -> None:
        self._text, self._first, self._rest = _shown(text), " " * indent, " " * (indent + hang)
        self._style, self._head = style, indent + head if head else 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = textwrap.wrap(
            self._text,
            max(options.max_width, len(self._rest) + 1),
            initial_indent=self._first,
            subsequent_indent=self._rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for number, line in enumerate(lines):
            text = rich.text.Text(line, self._style, no_wrap=True, overflow="ignore")
            if number == 0:
                text.stylize("bold", 0, self._head)
            yield text


@final
class Rows:
    """A table where it fits the terminal; elsewhere a paragraph for each row, with each column's name and value.

    It fits where words are whole: of columns with `no_wrap` the texts, and of those that fold words are divided after
    underscores.

    Args:
      table: without rows.
      rows: the text of each cell; a space before the first is indentation.
    """

    def __init__(self, table: Table, rows: Sequence[Sequence[str]]) -> None:
        self._table, self._rows = table, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._fitted(options.max_width)
        yield from [table] if table is not None else self._paragraphs()

    def _fitted(self, width: int) -> Table | None:
        """The table with its rows, and columns that are as wide as they have to be; None where it does not fit."""
        columns = self._table.columns
        texts = [[str(column.header), *(row[i] for row in self._rows)] for i, column in enumerate(columns)]
        longest = [max(map(len, own)) for own in texts]
        words = [_longest(_WORD, own) for own in texts]
        widths = [
            whole if column.no_wrap else word for column, whole, word in zip(columns, longest, words, strict=True)
        ]
        least = [
            _longest(_PIECE, own) if column.overflow == "fold" else width
            for column, own, width in zip(columns, texts, widths, strict=True)
        ]
        available = width - sum(3 if self._table.box else 2 for _ in columns) - bool(self._table.box)
        while sum(widths) > available:
            widest = max(range(len(columns)), key=lambda i: (widths[i] > least[i], widths[i]))
            if widths[widest] == least[widest]:
                return None
            widths[widest] -= 1
        for _ in range(available - sum(widths)):
            cut = max(range(len(columns)), key=lambda i: longest[i] - widths[i])
            widths[cut] += longest[cut] > widths[cut]
        for column, each in zip(columns, widths, strict=True):
            column.width = each
        for row in self._rows:
            self._table.add_row(*(Text(_divided(cell, each)) for cell, each in zip(row, widths, strict=True)))
        return self._table

    def _paragraphs(self) -> Iterator[RenderableType]:
        if self._table.title:
            yield Paragraph(str(self._table.title))
        for first, *values in self._rows:
            pairs = zip(self._table.columns[1:], values, strict=True)
            told = ", ".join(f"{column.header} {value}".lstrip() for column, value in pairs if value not in _NOTHING)
            name = first.strip().removesuffix(":")
            text = f"{name}: {told}" if name and told else name or told
            yield Paragraph(text, indent=1 + len(first) - len(first.lstrip()))


_NOTHING = ("", "·", "–")
"""Cells that a paragraph leaves out."""
_WORD, _PIECE = re.compile(r"\S+"), re.compile(r"[^\s_]*_+|[^\s_]+")


def _longest(part: re.Pattern[str], texts: Sequence[str]) -> int:
    """The characters of the longest part of texts, with their indentation."""
    return max((len(text) - len(text.lstrip()) + len(word) for text in texts for word in part.findall(text)), default=1)


def _divided(text: str, width: int) -> str:
    """A text whose words are no longer than a width, where they can be divided after underscores."""
    indentation = text[: len(text) - len(text.lstrip())]
    if all(len(indentation + word) <= width for word in text.split()):
        return text
    lines = [indentation]
    for piece in re.findall(r"\s*(?:[^\s_]*_+|[^\s_]+)", text.lstrip()):
        if len(lines[-1] + piece) > width and lines[-1].strip():
            lines.append(indentation + piece.lstrip())
        else:
            lines[-1] += piece
    return "\n".join(lines)


def print_json(data: Any) -> None:
    """Writes indented JSON."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def show(as_json: bool, data: Any, parts: Iterable[RenderableType]) -> None:
    """Writes the result of a verb: its data for programs, or its parts for people."""
    if as_json:
        print_json(data)
        return
    for part in parts:
        console.print(part, crop=False)


def tell(texts: Iterable[str]) -> None:
    """Writes paragraphs for people."""
    for text in texts:
        console.print(Paragraph(text), crop=False)


def progress(*columns: str | ProgressColumn) -> Progress:
    """Returns a progress bar on standard error that is gone at the end; it shows nothing where there is no terminal."""
    bars = Console(stderr=True)
    # FORCE_COLOR makes rich take a file for a terminal.
    is_shown = sys.stderr.isatty() and bars.is_terminal and not bars.is_dumb_terminal
    return Progress(*columns, console=bars, transient=True, disable=not is_shown)


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
