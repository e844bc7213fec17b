"""Masks drawn with matplotlib, which is imported only when a figure is wanted."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelry.errors import ArgumentError, ConfigError
from kernelry.masks.base import Mask
from kernelry.pictures.drawn_mask import DrawnMask
from kernelry.pictures.grid import MOST_PICTURES, block_sizes, caption, pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BLOCKS = 16
"""Blocks a side, where the caller does not say how large they are."""
_MOST_TOKENS = 2048
"""Tokens a side; of more there would be several in a pixel, so that blocks are drawn instead."""
_CELLS = 32
"""Tokens a side up to which each gets a frame of its own."""
_PANEL = 5.2
"""Inches along the longer side of one picture."""

_HIDDEN, _CUT, _SEEN, _FULL = range(4)
_COLOURS = np.array([(236, 238, 241), (253, 224, 186), (221, 119, 30), (38, 96, 164)], np.uint8)
"""Distinct in every kind of colour vision, and in grey, because they differ in lightness."""
_WORDS = ("empty block", "partial block: hidden", "partial block: visible", "full block")
_WORDS_OF_BLOCKS = ("empty block", "", "partial block", "full block")


def image(
    mask: Mask,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> Figure:
    """Draws a mask as a figure: tokens in colour, by the kind of their block, under the grid of blocks.

    Args:
      mask: the mask, with its arrays.
      q_len, kv_len: T and S; None takes the longest array of the mask, else the other side, else 8.
      block_q, block_kv: tokens a block; None gives at most 16 blocks a side.

    Returns:
      A matplotlib Figure that belongs to no window; save it with `savefig`.

    Raises:
      ArgumentError: a size cannot be drawn, a block is too small, or there are more than 16 pictures.
      ShapeError: the mask's arrays do not fit, or a positional mask meets T ≠ S without `.at`.
      ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("drawing images needs matplotlib; pip install 'kernelry[plot]'.") from error
    drawn = DrawnMask.of(mask, q_len, kv_len)
    blocks = block_sizes(drawn, block_q, block_kv, _MOST_BLOCKS)
    codes, by_block, exact = _codes(drawn, blocks)
    panels = list(pictures(codes))
    if len(panels) > MOST_PICTURES:
        raise ArgumentError(
            f"mask={mask!r} has {len(panels)} batch rows and heads, but an image holds {MOST_PICTURES}; take some."
        )
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    width, height = _panel_size(drawn, len(panels))
    figure = Figure(figsize=(across * width + 0.6, down * height + 1.5), dpi=160, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).reshape(-1)
    for (row, head, code), ax in zip(panels, axes, strict=False):
        _panel(ax, drawn, code, blocks)
        ax.set_title(caption(row, head), fontsize="medium")
        _label(ax, drawn, row or 0)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle(_title(drawn, blocks, exact=exact))
    _legend(figure, codes, by_block=by_block)
    return figure


def _codes(drawn: DrawnMask, blocks: tuple[int, int]) -> tuple[np.ndarray, bool, bool]:
    """Colours by number [rows, heads, T, S], or by block; whether by block, and whether exact."""
    found = drawn.blocks(*blocks)
    extent = drawn.extent
    of_kind = np.array([_HIDDEN, _SEEN, _FULL], np.uint8)[found.kinds]
    if not found.exact or max(extent.q_len, extent.kv_len) > _MOST_TOKENS:
        return of_kind, True, found.exact
    spread = np.repeat(np.repeat(of_kind, blocks[0], axis=2), blocks[1], axis=3)
    spread = spread[:, :, : extent.q_len, : extent.kv_len]
    cut = (spread == _SEEN) & ~drawn.visible()
    return np.where(cut, np.uint8(_CUT), spread), False, True


def _panel_size(drawn: DrawnMask, panels: int) -> tuple[float, float]:
    """Width and height in inches; cells are square unless that makes a strip too thin to see."""
    longest = max(drawn.extent.q_len, drawn.extent.kv_len)
    side = _PANEL if panels == 1 else _PANEL / 1.6
    thinnest = side / 5
    return max(side * drawn.extent.kv_len / longest, thinnest), max(side * drawn.extent.q_len / longest, thinnest)


def _panel(ax: Axes, drawn: DrawnMask, code: np.ndarray, blocks: tuple[int, int]) -> None:
    q_len, kv_len = drawn.extent.q_len, drawn.extent.kv_len
    bottom, right = code.shape[0] - 0.5, code.shape[1] - 0.5
    if (q_len, kv_len) != code.shape:  # drawn by block; the last ones may reach beyond the tokens
        bottom, right = code.shape[0] * blocks[0] - 0.5, code.shape[1] * blocks[1] - 0.5
    ax.imshow(_COLOURS[code], extent=(-0.5, right, bottom, -0.5), aspect="auto", interpolation_stage="rgba")
    if max(q_len, kv_len) <= _CELLS:
        _lines(ax, (1, 1), (q_len, kv_len), color="white", linewidth=0.8)
    few = max(-(-q_len // blocks[0]), -(-kv_len // blocks[1])) <= 64
    _lines(ax, blocks, (q_len, kv_len), color="#3b4252", linewidth=1.2 if few else 0.2)
    ax.set_xlim(-0.5, kv_len - 0.5)
    ax.set_ylim(q_len - 0.5, -0.5)


def _lines(ax: Axes, steps: tuple[int, int], lengths: tuple[int, int], **style: Any) -> None:
    ax.hlines(np.arange(steps[0], lengths[0], steps[0]) - 0.5, -0.5, lengths[1] - 0.5, **style)
    ax.vlines(np.arange(steps[1], lengths[1], steps[1]) - 0.5, -0.5, lengths[0] - 0.5, **style)


def _label(ax: Axes, drawn: DrawnMask, row: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis, name, positions in zip((ax.yaxis, ax.xaxis), ("query", "key"), drawn.positions(), strict=True):
        numbers = None if positions is None else positions[row % len(positions)]
        axis.set_label_text(f"{name} {'slot' if numbers is None else 'position'}")
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 8, 10]))
        axis.set_major_formatter(FuncFormatter(_Ticks(numbers)))


class _Ticks:
    """Names the slot under a tick by its position."""

    def __init__(self, numbers: np.ndarray | None) -> None:
        self.numbers = numbers

    def __call__(self, value: float, _: int | None = None) -> str:
        slot = round(value)
        if self.numbers is None:
            return str(slot)
        return str(self.numbers[slot]) if 0 <= slot < len(self.numbers) else ""


def _title(drawn: DrawnMask, blocks: tuple[int, int], *, exact: bool) -> str:
    extent = drawn.extent
    form = textwrap.shorten(str(drawn.mask.form), 200, placeholder=" …")
    sizes = f"{extent.q_len} queries, {extent.kv_len} keys, blocks of {blocks[0]} × {blocks[1]}"
    unread = "" if exact else "\ntoo large to look into its arrays: a block that they may empty or cut is partial"
    return f"{textwrap.fill(form, 56)}\n{sizes}{unread}"


def _legend(figure: Figure, codes: np.ndarray, *, by_block: bool) -> None:
    from matplotlib.patches import Patch

    words = _WORDS_OF_BLOCKS if by_block else _WORDS
    shown = [code for code in range(4) if words[code] and (codes == code).any()]
    patches = [Patch(facecolor=_COLOURS[code] / 255, edgecolor="#3b4252", label=words[code]) for code in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
