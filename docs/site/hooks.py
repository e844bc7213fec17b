"""What mkdocs runs while it builds the site: pages from elsewhere in the repository, links that leave docs/, pictures.

The pages are written to be read in a repository browser, too. There a link may lead to any file; in the site it leads
to the page that is made of that file, or, where there is none, it becomes the path of the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import mask_pictures
import matrix
import support
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from kernelry.config import json_schema

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{
        f"plugins/{path.parent.name}/README.md": f"plugins/{path.parent.name}.md"
        for path in ROOT.glob("plugins/*/README.md")
    },
}
"""Files of the repository that are pages of the site, and where."""
INSTEAD = {"README.md": "docs/index.md"}
"""Files of the repository that other pages of the site replace."""
WIDE = ("kernels.md", "matrix.md", "support.md")
"""Pages with wide tables, which get the place of the table of contents."""

_SUPPORT = "<!-- support matrix -->"
_CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_TESTS = re.compile(r"^  `(tests/[^`]+::[^`]+)`$", re.MULTILINE)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<(?P<kind>t[hd])(?P<style>[^>]*)>(?P<text>.*?)</t[hd]>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_LINK = re.compile(r"(?<!\!)\[(?P<text>[^\[\]]*)\]\((?P<path>[^)#:\s]*)(?P<heading>#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages whose files are not in docs/, and the data that pages are about."""
    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for path, data in (("matrix.json", matrix.data()), ("kernelry-config.schema.json", json_schema())):
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        files.append(File.generated(config, f"assets/{path}", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the text of a page with links that lead somewhere in the site."""
    if _SUPPORT in markdown:
        markdown = markdown.replace(_SUPPORT, support.markdown())
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    markdown = mask_pictures.with_pictures(markdown)
    page.meta.setdefault("description", described(markdown))
    markdown = _TESTS.sub(r'  <br><code class="test">\1</code>', markdown)
    source, titles = Path(page.file.abs_src_path or "").relative_to(ROOT).as_posix(), titles_of(config.nav or [])
    return outside_code(
        markdown, lambda text: _LINK.sub(lambda link: _linked(link, source, page.file.src_uri, titles), text)
    )


def titles_of(nav: list[Any]) -> dict[str, str]:
    """The titles that mkdocs.yml gives to pages, by their paths."""
    titles: dict[str, str] = {}
    for entry in nav:
        if isinstance(entry, dict):
            for title, under in entry.items():
                titles |= titles_of(under) if isinstance(under, list) else {under: title}
    return titles


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with its column's heading in each cell, for narrow screens, where a row is shown as a list."""
    return re.sub(r"<table>.*?</table>", lambda table: _with_headings(table.group()), html, flags=re.DOTALL)


def _with_headings(table: str) -> str:
    headings = [_TAG.sub("", cell["text"]).strip() for cell in _CELL.finditer(table) if cell["kind"] == "th"]

    def row(found: re.Match[str]) -> str:
        names = iter(headings)
        return _CELL.sub(lambda cell: _with_heading(cell, next(names, "")), found.group())

    return _ROW.sub(row, table)


def _with_heading(cell: re.Match[str], heading: str) -> str:
    if cell["kind"] == "th":
        return cell.group()
    name = heading.replace('"', "&quot;")
    return f'<td{cell["style"]} data-heading="{name}">{cell["text"]}</td>'


def described(markdown: str) -> str:
    """The first paragraph of a page, as plain text: what search engines show of it."""
    paragraphs = (part.strip() for part in _CODE.sub("", markdown).split("\n\n"))
    first = next((part for part in paragraphs if part[:1].isalpha() or part[:1] == "`"), "")
    return re.sub(r"[`*]", "", _LINK.sub(lambda link: link["text"], first)).replace("\n", " ").replace('"', "'")


def outside_code(markdown: str, changed: Any) -> str:
    """Returns the text with everything but its blocks of code changed."""
    parts, start = [], 0
    for block in _CODE.finditer(markdown):
        parts += [changed(markdown[start : block.start()]), block.group()]
        start = block.end()
    return "".join([*parts, changed(markdown[start:])])


def _linked(link: re.Match[str], source: str, page: str, titles: dict[str, str]) -> str:
    """A link of the file `source`, whose page is `page`, as a link between pages or as the path of a file.

    A link whose text is the name of a page's file has the page's title instead.
    """
    text, path, heading = link["text"], link["path"], link["heading"] or ""
    if not path:
        return link.group()
    target = _normal(PurePosixPath(source).parent / path)
    target = INSTEAD.get(target, target)
    if target in ELSEWHERE or (target.startswith("docs/") and (ROOT / target).is_file()):
        to = ELSEWHERE.get(target, target.removeprefix("docs/"))
        text = titles.get(to, text) if text.endswith(".md") else text
        return f"[{text}]({_relative(to, page)}{heading})"
    if not (ROOT / target).exists():
        return link.group()  # mkdocs warns about it
    return f"`{target}`" if text.strip("`") == target else f"{text} (`{target}`)"


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _relative(target: str, page: str) -> str:
    return "../" * (len(PurePosixPath(page).parts) - 1) + target
