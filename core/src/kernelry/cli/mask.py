"""The verb `mask`: draws a mask."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kernelry.cli.output import Json, console, print_json, tell
from kernelry.errors import ArgumentError
from kernelry.masks.base import Mask
from kernelry.masks.parse import parse_mask
from kernelry.pictures import grid, image
from kernelry.pictures.drawn_mask import DrawnMask
from kernelry.registry import installed

_MOST_VISIBLE = 2**18
"""Elements of B N T S that JSON lists; more is megabytes."""
_MARGIN = 8
"""Characters that row labels may take."""


def draw(
    expression: Annotated[str, typer.Argument(help="e.g. 'causal & window(3) & segments(0,0,0,1,1,1)'.")],
    q_len: Annotated[int | None, typer.Option(min=1, help="T; default: the longest array, else S, else 8.")] = None,
    kv_len: Annotated[int | None, typer.Option(min=1, help="S; default: the longest array, else T.")] = None,
    block_q: Annotated[int | None, typer.Option(min=1, help="queries a block; default: what fits.")] = None,
    block_kv: Annotated[int | None, typer.Option(min=1, help="keys a block; default: what fits.")] = None,
    png: Annotated[Path | None, typer.Option(help="write an image here (needs the extra plot).")] = None,
    as_json: Json = False,
) -> None:
    """Draws a mask: as text, as JSON or as an image. Large masks are drawn in blocks."""
    mask = parse_mask(expression, installed.registry().masks)
    if png is not None:
        _save(mask, png, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
    if as_json:
        data = _as_json(DrawnMask.of(mask, q_len, kv_len), block_q, block_kv)
        print_json(data if png is None else {**data, "png": str(png)})
    elif png is None:
        drawn = grid.text(mask, q_len, kv_len, block_q=block_q, block_kv=block_kv, columns=_columns())
        title, _, rows = drawn.partition("\n\n")
        tell(title.splitlines())
        sys.stdout.write(f"\n{rows}\n")
    else:
        sys.stdout.write(f"{png}\n")


def _columns() -> int:
    """Tokens that fit into a line, with two characters each."""
    return max(min((console.width - _MARGIN) // 2, grid.COLUMNS), 1)


def _save(mask: Mask, png: Path, **sizes: int | None) -> None:
    figure = image(mask, **sizes)
    try:
        figure.savefig(png, format="png")
    except OSError as error:
        raise ArgumentError(f"cannot write the image {png}: {error.strerror}.") from error


def _as_json(picture: DrawnMask, block_q: int | None, block_kv: int | None) -> dict[str, Any]:
    """Sizes, form, and for each batch row and head that may differ the tokens and the blocks."""
    extent = picture.extent
    block_q, block_kv = grid.block_sizes(picture, block_q, block_kv, grid.COLUMNS)
    blocks = picture.blocks(block_q, block_kv)
    small = picture.size <= _MOST_VISIBLE
    tokens = picture.visible() if small else np.zeros(blocks.kinds.shape, bool)
    drawn = zip(grid.pictures(tokens), grid.pictures(blocks.kinds), strict=True)
    return {
        "form": picture.mask.form.to_json(),
        "text": str(picture.mask.form),
        "q_len": extent.q_len,
        "kv_len": extent.kv_len,
        "block_q": block_q,
        "block_kv": block_kv,
        "exact": blocks.exact,
        "pictures": [
            {
                "batch_row": row,
                "head": head,
                "visible": visible.astype(int).tolist() if small else None,
                "block_map": kinds.tolist(),
            }
            for (row, head, visible), (_, _, kinds) in drawn
        ],
    }
