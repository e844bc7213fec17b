"""Masks drawn as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kernelry.masks.base import Mask
from kernelry.masks.run_time import BlockKind
from kernelry.pictures.drawn_mask import DrawnMask

COLUMNS = 64
"""Tokens or blocks a row; each takes two characters."""
MOST_PICTURES = 16
"""Batch rows times heads."""
_MOST_BLOCKS = 32
"""Blocks a side, where the caller does not say how large they are."""
_SIGNS = {BlockKind.EMPTY: "·", BlockKind.PARTIAL: "▨", BlockKind.FULL: "■"}


def text(
    mask: Mask,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    columns: int = COLUMNS,
) -> str:
    """Draws a mask: which keys (columns) each query (row) sees, or which blocks hold anything.

    Args:
      mask: the mask, with its arrays.
      q_len, kv_len: T and S; None takes the longest array of the mask, else the other side, else 8.
      block_q, block_kv: tokens a block; a mask is drawn in blocks where one is given, and where it has
        more tokens than fit.
      columns: the most keys, or blocks of keys, to draw in a row.

    Returns:
      Lines without an end of line: the canonical form, the sizes, a grid for each batch row and
      head that may differ, and a legend.

    Raises:
      ArgumentError: that many tokens cannot be drawn, or a block is too small.
      ShapeError: the mask's arrays do not fit, or a positional mask meets T ≠ S without `.at`.
    """
    drawn = DrawnMask.of(mask, q_len, kv_len)
    extent = drawn.extent
    title = [str(mask.form), f"{extent.q_len} queries (rows), {extent.kv_len} keys (columns)"]
    fits = extent.kv_len <= columns and extent.q_len <= COLUMNS
    if fits and block_q is None and block_kv is None:
        return "\n".join([*title, *_tokens(drawn), "", "1 visible   . hidden"])
    block_q, block_kv = block_sizes(drawn, block_q, block_kv, min(columns, _MOST_BLOCKS))
    title[1] += f", in blocks of {block_q} x {block_kv}"
    found = drawn.blocks(block_q, block_kv)
    legend = "   ".join(f"{_SIGNS[kind]} {kind.name.lower()}" for kind in reversed(BlockKind))
    if not found.exact:
        legend += "\nToo large to look into its arrays: a block that they may empty or cut is partial."
    signs = np.array([_SIGNS[kind] for kind in BlockKind])[found.kinds]
    return "\n".join([*title, *_pictures(signs, lambda _: ([], [])), "", legend])


def block_sizes(drawn: DrawnMask, block_q: int | None, block_kv: int | None, most: int) -> tuple[int, int]:
    """Fills in block sizes: the least power of two, from 2 on, that leaves `most` blocks a side."""
    extent = drawn.extent
    return (
        _power_of_two(extent.q_len, most) if block_q is None else block_q,
        _power_of_two(extent.kv_len, most) if block_kv is None else block_kv,
    )


def _power_of_two(length: int, most: int) -> int:
    size = 2
    while -(-length // size) > most:
        size *= 2
    return size


def pictures(grids: np.ndarray) -> Iterator[tuple[int | None, int | None, np.ndarray]]:
    """Yields batch row, head and grid, of [rows, heads, …]; None where all rows or heads are alike."""
    rows, heads = grids.shape[:2]
    for row in range(rows):
        for head in range(heads):
            yield (row if rows > 1 else None), (head if heads > 1 else None), grids[row, head]


def caption(row: int | None, head: int | None) -> str:
    """`batch row 0, head 1`, as far as they differ."""
    named = (("batch row", row), ("head", head))
    return ", ".join(f"{name} {number}" for name, number in named if number is not None)


def _tokens(drawn: DrawnMask) -> list[str]:
    query, kv = drawn.positions()
    notes = []
    if query is None or kv is None:
        notes = ["The parts of the mask are at different positions."]
    elif not (_plain(query) and _plain(kv)):
        notes = ["The numbers at the edges are positions."]

    def labels(row: int) -> tuple[list[str], list[str]]:
        if query is None or kv is None or (_plain(query) and _plain(kv)):
            return [], []
        return _words(query, row), _words(kv, row)

    return [*notes, *_pictures(np.where(drawn.visible(), "1", "."), labels)]


def _plain(positions: np.ndarray) -> bool:
    return bool((positions == np.arange(positions.shape[1])).all())


def _words(positions: np.ndarray, row: int) -> list[str]:
    return [str(position) for position in positions[row % len(positions)]]


def _pictures(signs: np.ndarray, labels: Any) -> list[str]:
    lines: list[str] = []
    total = signs.shape[0] * signs.shape[1]
    for place, (row, head, grid) in enumerate(pictures(signs)):
        if place == MOST_PICTURES:
            return [*lines, "", f"... and {total - MOST_PICTURES} more batch rows and heads"]
        lines += ["", *([caption(row, head)] if caption(row, head) else []), *_grid(grid, *labels(row or 0))]
    return lines


def _grid(signs: np.ndarray, rows: list[str], columns: list[str]) -> list[str]:
    """Joins the signs of one picture; column labels are vertical, one digit a line."""
    edge = max(map(len, rows), default=0)
    tall = max(map(len, columns), default=0)
    upright = ["".join(digits) for digits in zip(*(label.rjust(tall) for label in columns), strict=True)]
    margin = f"{'':{edge}}  " if rows else ""
    head = [(margin + " ".join(line)).rstrip() for line in upright]
    starts = [f"{label:>{edge}}  " for label in rows] or [""] * len(signs)
    return [*head, *(start + " ".join(line) for start, line in zip(starts, signs, strict=True))]
