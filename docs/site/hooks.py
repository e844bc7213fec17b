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
    markdown = _TESTS.sub(r'  <br><code class="test">\1</code>', markdown)
    source = Path(page.file.abs_src_path or "").relative_to(ROOT).as_posix()
    return outside_code(markdown, lambda text: _LINK.sub(lambda link: _linked(link, source, page.file.src_uri), text))


def outside_code(markdown: str, changed: Any) -> str:
    """Returns the text with everything but its blocks of code changed."""
    parts, start = [], 0
    for block in _CODE.finditer(markdown):
        parts += [changed(markdown[start : block.start()]), block.group()]
        start = block.end()
    return "".join([*parts, changed(markdown[start:])])


def _linked(link: re.Match[str], source: str, page: str) -> str:
    """A link of the file `source`, whose page is `page`, as a link between pages or as the path of a file."""
    text, path, heading = link["text"], link["path"], link["heading"] or ""
    if not path:
        return link.group()
    target = _normal(PurePosixPath(source).parent / path)
    target = INSTEAD.get(target, target)
    if target in ELSEWHERE:
        return f"[{text}]({_relative(ELSEWHERE[target], page)}{heading})"
    if target.startswith("docs/") and (ROOT / target).is_file():
        return f"[{text}]({_relative(target.removeprefix('docs/'), page)}{heading})"
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
