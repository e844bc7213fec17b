"""Time against length as a PNG, with matplotlib, which is imported only here.

A panel is a case at several lengths; both axes are logarithmic. A line is a kernel, its band the quartiles; a ring is
what `auto` takes; peers are dashed. A dotted line is a length at which another kernel becomes the fastest. What is
wrong is not drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelry.bench.crossings import Crossing, Series
from kernelry.bench.results import Kind, Result, Row
from kernelry.bench.turns import quartiles
from kernelry.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#8c6d31")
"""Told apart by every kind of colour vision (Okabe and Ito's, and two more)."""
_MARKERS = "osD^vhpX"
_GREY = "#3b4252"
_SHADES = 128
"""Colours of the PNG, which make it a third as large as one with all."""
_ACROSS = 3
"""Panels in a row, at most."""
_PANEL = 4.4, 3.5
"""Inches."""

Style = dict[str, Any]


def check(path: Path | None) -> None:
    """Checks that a picture can be drawn, before anything is timed.

    Raises:
      ConfigError: matplotlib is not installed, the name does not end in .png, or the folder does not exist.
    """
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: the picture is a PNG; pass a name that ends in .png.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}; make it first.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("--plot needs matplotlib; pip install 'kernelry[plot]'.") from error


def draw(groups: Sequence[Series], machine: dict[str, Any], path: Path) -> str:
    """Writes the PNG.

    Returns:
      Where it is, or why there is none.
    """
    shown = [group for group in groups if group.times]
    if not shown:
        return "no picture: no kernel was timed"
    from PIL import Image  # which matplotlib requires

    drawn = io.BytesIO()
    figure_of(shown, machine).savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(_SHADES).save(path, optimize=True)
    return f"picture: {path}"


def figure_of(groups: Sequence[Series], machine: dict[str, Any]) -> Figure:
    """The figure, which belongs to no window."""
    from matplotlib.figure import Figure

    across = min(_ACROSS, len(groups))
    down = -(-len(groups) // across)
    width, height = _PANEL
    size = max(across * width, 6.5), down * height + 1.3
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    styles = _styles(groups)
    for axes, group in zip(panels, groups, strict=False):
        _panel(axes, group, styles)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    versions = machine["versions"]
    said = ", ".join(f"{name} {versions[name]}" for name in ("kernelry", "jax") if name in versions)
    device = machine["processor"] if machine["platform"] == "cpu" else machine["device_kind"]
    figure.suptitle(f"{device}\n{said}, {machine['date'][:10]}", fontsize="medium")
    _legend(figure, styles)
    return figure


def _styles(groups: Sequence[Series]) -> dict[tuple[Kind, str], Style]:
    """Colour and marker by kernel, the same in every panel."""
    kernels = list(dict.fromkeys(name for group in groups for name in sorted(group.times)))
    rows = [row for group in groups for result in group.results for row in result.rows]
    peers = list(dict.fromkeys(row.name for row in rows if row.kind is Kind.PEER and row.is_timed))
    styles: dict[tuple[Kind, str], Style] = {}
    for place, name in enumerate(kernels):
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        styles[Kind.KERNEL, name] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8, "zorder": 3}
    for place, name in enumerate(peers):
        marker = "x+"[place % 2]
        styles[Kind.PEER, name] = {"color": _GREY, "marker": marker, "linestyle": "--", "linewidth": 1, "zorder": 2}
    if any(row.kind is Kind.AUTO for row in rows):
        ring: Style = {
            "color": "black",
            "marker": "o",
            "markersize": 11,
            "markerfacecolor": "none",
            "linestyle": "none",
        }
        styles[Kind.AUTO, "auto"] = ring | {"zorder": 4}
    return styles


def _panel(axes: Axes, group: Series, styles: dict[tuple[Kind, str], Style]) -> None:
    for (kind, name), style in styles.items():
        points = [
            (result.case.length, *quartiles(row.program.times))
            for result in group.results
            for row in _drawn(result, kind, name)
            if row.program is not None
        ]
        if not points:
            continue
        lengths, low, median, high = zip(*points, strict=True)
        axes.plot(lengths, median, **style)
        if kind is not Kind.AUTO:
            axes.fill_between(lengths, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for place, crossing in enumerate(group.crossings):
        _mark(axes, crossing, place)
    _ticks(axes, [result.case.length for result in group.results])
    request = group.case.request
    axes.set_title(f"{group.case.name}, {group.case.which.value}\nB={request.batch} {request.dtype}", fontsize="medium")
    axes.set_ylabel("milliseconds")
    axes.set_xlabel("S" if group.case.which.value == "decode" else "T")
    axes.grid(color="#d8dce2", linewidth=0.6)
    axes.set_axisbelow(True)


def _drawn(result: Result, kind: Kind, name: str) -> list[Row]:
    found = [result.program_of(row) for row in result.rows if row.kind is kind and row.name == name]
    return [row for row in found if row.is_timed]


def _mark(axes: Axes, crossing: Crossing, place: int) -> None:
    """A dotted line through a crossing; the labels of neighbours are at different heights, inside the panel."""
    axes.axvline(crossing.length, color=_GREY, linewidth=1, linestyle=":", zorder=1)
    left, right = axes.get_xlim()
    is_left = crossing.length < math.sqrt(left * right)
    axes.annotate(
        f"{round(crossing.length)} → {crossing.after}",
        (crossing.length, 0.02 + 0.07 * (place % 4)),
        xycoords=("data", "axes fraction"),
        xytext=(3 if is_left else -3, 0),
        textcoords="offset points",
        fontsize="small",
        ha="left" if is_left else "right",
        va="bottom",
        color=_GREY,
        bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
        zorder=6,
    )


def _ticks(axes: Axes, lengths: Sequence[int]) -> None:
    """Lengths that were timed, and milliseconds, as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(lengths[:: -(-len(lengths) // 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    low, high = axes.get_ylim()
    if high / low < 30:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(length: float) -> str:
    whole = round(length)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def _legend(figure: Figure, styles: dict[tuple[Kind, str], Style]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **style) for (_, name), style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
