"""Pictures of masks for the site, as SVG that takes its colours from the style sheet, so that they suit both schemes.

A page has `<!-- mask: EXPRESSION T=8 S=8 blocks=4 -->`, sizes and blocks being optional, and after it the mask as text,
for readers of the file. The site shows a picture in place of both.
"""

from __future__ import annotations

import html
import re
from typing import NamedTuple

import numpy as np

from kernelry import pictures
from kernelry.masks import BlockKind, Mask
from kernelry.masks.parse import parse_mask
from kernelry.pictures.drawn_mask import DrawnMask

PICTURE = re.compile(r"^<!-- mask: (?P<words>.+?) -->\n(?:\n```text\n(?P<text>.*?)```\n)?", re.MULTILINE | re.DOTALL)
_SIZE = re.compile(r"\s(T|S|blocks)=(\d+)")
_CELL = 18
"""Units of the drawing a token, where there are at most `_CELLS` of them; more share the same width."""
_CELLS = 12
_MARGIN = 22
_EDGE = 18
"""Units more of margin where the positions of tokens are written at the edges."""


class Drawing(NamedTuple):
    """A mask, its sizes, and the size of a block if blocks are drawn."""

    expression: str
    mask: Mask
    q_len: int | None
    kv_len: int | None
    block: int | None

    @classmethod
    def of(cls, words: str) -> Drawing:
        """Reads what a comment says."""
        sizes = {name: int(number) for name, number in _SIZE.findall(words)}
        expression = _SIZE.sub("", words)
        return cls(expression, parse_mask(expression), sizes.get("T"), sizes.get("S"), sizes.get("blocks"))

    def text(self) -> str:
        """The mask as text, as the command draws it, without its title and the legend of tokens."""
        drawn = pictures.text(self.mask, self.q_len, self.kv_len, block_q=self.block, block_kv=self.block)
        return drawn.partition("\n\n")[2].removesuffix("1 visible   . hidden").strip("\n") + "\n"


def with_pictures(markdown: str) -> str:
    """Returns the text of a page with every mask as a picture."""
    return PICTURE.sub(lambda found: f"\n{figure(Drawing.of(found['words']))}\n\n", markdown)


def with_texts(markdown: str) -> str:
    """Returns the text of a page with every mask as text after its comment."""
    return PICTURE.sub(
        lambda found: f"<!-- mask: {found['words']} -->\n\n```text\n{Drawing.of(found['words']).text()}```\n", markdown
    )


def figure(drawing: Drawing) -> str:
    """A mask as a figure: a square for each token, or for each block."""
    drawn = DrawnMask.of(drawing.mask, drawing.q_len, drawing.kv_len)
    visible = drawn.visible()[0, 0]
    q_len, kv_len = visible.shape
    said = f"The mask {drawing.expression}: {q_len} queries as rows, {kv_len} keys as columns"
    cell = _CELL if max(q_len, kv_len) <= _CELLS else _CELL * _CELLS / max(q_len, kv_len)
    squares = _cells(visible, cell) if cell == _CELL else _runs(visible, cell)
    if drawing.block:
        squares += _blocks(drawn, drawing.block, cell)
        said += f", in blocks of {drawing.block} by {drawing.block}"
    squares += (numbers := _numbers(drawn, cell))
    margin = _MARGIN + (_EDGE if numbers else 0)
    width, height = kv_len * cell, q_len * cell
    labels = (
        f'<text x="{margin + width / 2:g}" y="14" text-anchor="middle">keys</text>'
        f'<text transform="translate(14 {margin + height / 2:g}) rotate(-90)" text-anchor="middle">queries</text>'
    )
    view = f"0 0 {margin + width + 2:g} {margin + height + 2:g}"
    return (
        f'<figure class="mask" markdown="0"><svg viewBox="{view}" width="{margin + width + 2:g}" role="img" '
        f'aria-label="{html.escape(said)}">{labels}<g transform="translate({margin} {margin})">{"".join(squares)}</g>'
        f"</svg><figcaption><code>{html.escape(drawing.expression)}</code></figcaption></figure>"
    )


def _cells(visible: np.ndarray, cell: float) -> list[str]:
    """A square for each token."""
    return [
        _square(column * cell, row * cell, cell, "seen" if seen else "hidden")
        for (row, column), seen in np.ndenumerate(visible)
    ]


def _runs(visible: np.ndarray, cell: float) -> list[str]:
    """A bar for each run of keys that a query sees, on one ground; squares would be too small to tell apart."""
    bars = [_rectangle(0, 0, visible.shape[1] * cell, visible.shape[0] * cell, "hidden fine")]
    for row, seen in enumerate(visible):
        ends = np.flatnonzero(np.diff(np.r_[False, seen, False])).reshape(-1, 2)
        bars += [_rectangle(start * cell, row * cell, (end - start) * cell, cell, "seen fine") for start, end in ends]
    return bars


def _numbers(drawn: DrawnMask, cell: float) -> list[str]:
    """The positions of queries and keys at the edges, unless they are 0, 1, 2 and so on."""
    query, kv = drawn.positions()
    if query is None or kv is None or all((side[0] == np.arange(side.shape[1])).all() for side in (query, kv)):
        return []
    columns = [_number(position, (slot + 0.5) * cell, -6) for slot, position in enumerate(kv[0])]
    return columns + [_number(position, -10, (slot + 0.5) * cell + 4) for slot, position in enumerate(query[0])]


def _number(number: int, x: float, y: float) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle">{number}</text>'


def _blocks(drawn: DrawnMask, block: int, cell: float) -> list[str]:
    """Frames around blocks, by kind."""
    kinds = drawn.blocks(block, block).kinds[0, 0]
    return [
        _square(column * block * cell, row * block * cell, block * cell, f"block {BlockKind(kind).name.lower()}")
        for (row, column), kind in np.ndenumerate(kinds)
    ]


def _square(x: float, y: float, size: float, kind: str) -> str:
    return _rectangle(x, y, size, size, kind)


def _rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'
