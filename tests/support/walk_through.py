"""Follows a page that is to be followed: its commands are run and its edits made, in order.

A block `console` has commands after `$ ` and what they print; `…` is what is left out. A block of another language with
a title is a file; in a `diff` lines are replaced, `as generated` is a file that must be so already.
"""

import dataclasses
import re

_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_LINES_OF_TABLES = re.compile(r"[│┃┏┓┗┛┡┩├┤└┘─━┳┻╇┼┴┬╋\[\]\s]+")
GENERATED = ", as generated"


@dataclasses.dataclass(frozen=True)
class Step:
    """A block: its language, the title of the file, and its text."""

    language: str
    title: str
    text: str

    @property
    def commands(self):
        """Each command with the output shown."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [tuple(part.split("\n", 1)) for part in parts]


def steps_of(page):
    """The blocks that are commands or files."""
    found = (Step(*block) for block in _BLOCK.findall(page))
    return [step for step in found if step.language == "console" or step.title]


def check_printed(shown, printed):
    """Compares what a command printed with what the page shows, in order; lines may break elsewhere."""
    pattern = ".*?".join(re.escape(_words(part)).strip() for part in shown.split("…"))
    found = re.search(pattern, _words(printed))
    assert found, f"the page shows\n{shown}\nand this was printed:\n{printed}"


def _words(text):
    return _LINES_OF_TABLES.sub(" ", text).strip()


def edit(folder, step):
    """Writes a file, changes it as a diff says, or compares it with what was generated."""
    path = folder / step.title.removesuffix(GENERATED)
    if step.title.endswith(GENERATED):
        assert path.read_text() == step.text
    elif step.language == "diff":
        path.write_text(patched(path.read_text(), step.text))
    else:
        path.write_text(step.text)


def patched(text, diff):
    """Replaces the lines before a change by those after it; they must be there, once."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    assert f"\n{text}".count(f"\n{before}") == 1, before
    return f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:]
