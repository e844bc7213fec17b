"""On which line of a config file a key is. Lines that cannot be told are left out."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, final

Keys = tuple[str | int, ...]
"""The keys of tables and indices of arrays that lead to a value, from the top of the file."""

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_KEY_OR_HEADER = re.compile(rf"[ \t]*(\[\[?)?[ \t]*({_KEY}(?:[ \t]*\.[ \t]*{_KEY})*)[ \t]*[=\]]")
_STRING = r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\''''
_TOKEN = re.compile(rf"{_STRING}|#[^\n]*|[\n\[\]{{}}]|\Z", re.DOTALL)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class TableLines:
    """A table of a config file, and the lines of its keys.

    Args:
      name: the file, or `config` for a mapping.
      lines: line numbers from 1, by the keys from the top of the file.
      table: the keys that lead to the table.
    """

    name: str
    lines: Mapping[Keys, int] = dataclasses.field(default_factory=dict)
    table: Keys = ()

    def at(self, *keys: str | int) -> str:
        """Returns `file:line` of a key, or of the nearest value around it whose line is known."""
        path = (*self.table, *keys)
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines[path]}" if path else self.name


def toml_lines(text: str) -> dict[Keys, int]:
    """Finds the headers of a valid TOML text, and the keys that begin a line; others are left out."""
    lines: dict[Keys, int] = {}
    lasts: dict[Keys, int] = {}  # the last index of each array of tables
    table: Keys = ()
    for number, statement in _statements(text):
        header, path = statement[1], () if statement[1] else table
        inside: Any = tomllib.loads(f"{statement[2]} = 0")  # which splits a dotted key and reads its quotes
        while isinstance(inside, dict):
            [(name, inside)] = inside.items()
            path = (*path, name)
            lines.setdefault(path, number)
            if header == "[[" and inside == 0:
                lasts[path] = lasts.get(path, -1) + 1
            if path in lasts:
                path = (*path, lasts[path])
                lines.setdefault(path, number)
        table = path if header else table
    return lines


def _statements(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """Yields headers and keys, with their line's number, that begin outside of strings, arrays and inline tables."""
    depth = start = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
        if depth == 0 and token[0] in ("\n", ""):
            if found := _KEY_OR_HEADER.match(text, start):
                yield text.count("\n", 0, start) + 1, found
            start = token.end()


def yaml_lines(root: Any) -> dict[Keys, int]:
    """Reads the lines off the nodes that `yaml.compose` returned."""
    lines: dict[Keys, int] = {}
    pending: list[tuple[Keys, Any]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if node is None or node.id == "scalar" or len(path) > 64:  # an alias may contain itself
            continue
        entries = node.value if node.id == "mapping" else [(None, value) for value in node.value]
        for index, (key, value) in enumerate(entries):
            inner = (*path, index if key is None else key.value)
            if isinstance(inner[-1], str | int):
                lines.setdefault(inner, (key or value).start_mark.line + 1)
                pending.append((inner, value))
    return lines
