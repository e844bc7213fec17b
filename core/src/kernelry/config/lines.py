"""On which line of a config file each key stands. What cannot be told is left out."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from typing import Any, final

Keys = tuple[str | int, ...]
"""Keys of tables and places in arrays, from the top of the file."""

_KEY = re.compile(r"""\s*(?:([A-Za-z0-9_-]+)|"((?:[^"\\\n]|\\.)*)"|'([^'\n]*)')\s*""")
_STRINGS = re.compile(r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL)
_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_BARE = re.compile(r"[^,\]}\n#]+")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A table in a file, and where its keys stand.

    Args:
      name: the file, or `config` for a mapping.
      lines: line numbers from 1, by path from the top of the file.
      table: the path of the table.
    """

    name: str
    lines: Mapping[Keys, int] = dataclasses.field(default_factory=dict)
    table: Keys = ()

    def at(self, *keys: str | int) -> str:
        """Returns `file:line` of a key, or of the nearest table around it whose line is known."""
        path = (*self.table, *keys)
        while path:
            if path in self.lines:
                return f"{self.name}:{self.lines[path]}"
            path = path[:-1]
        return self.name


def toml_lines(text: str) -> dict[Keys, int]:
    """Finds the keys of a text that tomllib can read; empty where the scan loses its way."""
    scanner = _TomlScanner(text)
    try:
        scanner.scan()
    except (ValueError, IndexError, RecursionError):
        return {}
    return scanner.lines


class _TomlScanner:
    """Walks along a valid TOML text and notes where keys begin."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Keys, int] = {}
        self._lasts: dict[Keys, int] = {}

    def scan(self) -> None:
        table: Keys = ()
        self._skip()
        while self.at < len(self.text):
            if self._peek("["):
                table = self._header()
            else:
                self._pair(table)
            self._skip()

    def _header(self) -> Keys:
        start, double = self.at, self._peek("[[")
        self.at += 2 if double else 1
        names = self._names()
        self._expect("]]" if double else "]")
        table: Keys = ()
        for place, name in enumerate(names):
            table = (*table, name)
            if double and place == len(names) - 1:
                self._lasts[table] = self._lasts.get(table, -1) + 1
            self._note(table, start)
            if table in self._lasts:
                table = (*table, self._lasts[table])
                self._note(table, start)
        return table

    def _pair(self, table: Keys) -> None:
        start = self.at
        path = table
        for name in self._names():
            path = (*path, name)
            self._note(path, start)
        self._expect("=")
        self._value(path)

    def _names(self) -> list[str]:
        names = []
        while True:
            match = _KEY.match(self.text, self.at)
            if match is None:
                raise ValueError("no key here")
            bare, quoted, literal = match.groups()
            escaped = quoted is not None and "\\" in quoted
            names.append(tomllib.loads(f'k = "{quoted}"')["k"] if escaped else bare or quoted or literal or "")
            self.at = match.end()
            if not self._peek("."):
                return names
            self.at += 1

    def _value(self, path: Keys) -> None:
        self._skip()
        if self._peek("["):
            self._list(path)
        elif self._peek("{"):
            self._inline(path)
        else:
            pattern = _STRINGS if self.text[self.at] in "\"'" else _BARE
            match = pattern.match(self.text, self.at)
            if match is None:
                raise ValueError("no value here")
            self.at = match.end()

    def _list(self, path: Keys) -> None:
        self.at += 1
        place = 0
        self._skip()
        while not self._peek("]"):
            self._note((*path, place), self.at)
            self._value((*path, place))
            place += 1
            self._skip_comma()
        self.at += 1

    def _inline(self, path: Keys) -> None:
        self.at += 1
        self._skip()
        while not self._peek("}"):
            self._pair(path)
            self._skip_comma()
        self.at += 1

    def _skip_comma(self) -> None:
        self._skip()
        if self._peek(","):
            self.at += 1
            self._skip()
        elif self.text[self.at] not in "]}":
            raise ValueError("no comma here")

    def _skip(self) -> None:
        match = _BLANK.match(self.text, self.at)
        self.at = self.at if match is None else match.end()

    def _peek(self, sign: str) -> bool:
        return self.text.startswith(sign, self.at)

    def _expect(self, sign: str) -> None:
        if not self._peek(sign):
            raise ValueError(f"no {sign} here")
        self.at += len(sign)

    def _note(self, path: Keys, at: int) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, at) + 1)


def yaml_lines(root: Any) -> dict[Keys, int]:
    """Reads the lines off the nodes that `yaml.compose` returned."""
    lines: dict[Keys, int] = {}
    pending: list[tuple[Keys, Any]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if node is None or len(path) > 64:  # an alias may hold itself
            continue
        if node.id == "mapping":
            for key, value in node.value:
                inner = (*path, key.value) if isinstance(key.value, str) else None
                if inner is not None:
                    lines.setdefault(inner, key.start_mark.line + 1)
                    pending.append((inner, value))
        elif node.id == "sequence":
            for place, value in enumerate(node.value):
                lines.setdefault((*path, place), value.start_mark.line + 1)
                pending.append(((*path, place), value))
    return lines
