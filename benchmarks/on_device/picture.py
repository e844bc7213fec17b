"""A report as a picture, with matplotlib, which is imported only here.

A row is a pass over a shape. Left: speed, where 1 is the fastest peer. Right: the rate, where 1 is what the device
does: a matrix product's, or for a decode step, which reads and hardly computes, a copy's. A pass without a peer has
only the right side. What was wrong is not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from on_device.kernels import AUTO

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#8c6d31")
"""Told apart by every kind of colour vision (Okabe and Ito's, and two more)."""
_MARKS = "osD^vhpX"
_PEER_MARKS = "x+124"
_PEER_COLOUR = "#3b4252"
_ROW = 0.46
"""Inches."""

Row = tuple[str, str, dict[str, Any]]


def draw(report: dict[str, Any], path: Path) -> str | None:
    """Writes the PNG. Returns why there is none, in a line, or None."""
    rows = list(_rows(report))
    if not rows:
        return "no picture: nothing was timed"
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no picture: matplotlib is not installed; pip install 'kernelry[plot]'"
    figure = Figure(figsize=(13, 2.6 + _ROW * len(rows)), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = _styles(rows)
    for place, (shape, _, programs) in enumerate(rows):
        _draw_row(left, place, _against_best_peer(programs), styles)
        _draw_row(right, place, _of_device(programs, report["shapes"][shape]), styles)
    _dress(left, rows, "speed: the fastest peer of each row is 1", "no peer ran this")
    _dress(right, rows, "share of a matrix product's rate (decode: of a copy's)", "")
    right.set_xlim(0, None)
    right.axvline(1, color="#3b4252", linewidth=1, linestyle="--")
    _entitle(figure, report, styles)
    figure.savefig(path)
    return None


def _rows(report: dict[str, Any]) -> Iterator[Row]:
    for shape, about in report["shapes"].items():
        for which, cell in about["passes"].items():
            right = {k: v for k, v in cell["programs"].items() if "median_ms" in v and not v["wrong"]}
            if right:
                yield shape, which, right


def _against_best_peer(programs: dict[str, Any]) -> dict[str, float]:
    peers = [found["median_ms"] for found in programs.values() if found["kind"] == "peer"]
    return {name: min(peers) / found["median_ms"] for name, found in programs.items()} if peers else {}


def _of_device(programs: dict[str, Any], about: dict[str, Any]) -> dict[str, float]:
    key = "of_copy" if about["mode"] == "decode" else "of_matrix_product"
    return {name: found[key] for name, found in programs.items() if key in found}


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Colour and mark by name: kernels filled, `auto` a ring around its choice, peers grey lines without a body."""
    kinds = {name: found["kind"] for _, _, programs in rows for name, found in programs.items()}
    kernels = sorted(name for name, kind in kinds.items() if kind == "kernel" and name != AUTO)
    peers = sorted(name for name, kind in kinds.items() if kind == "peer")
    styles: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(peers):
        style = {"marker": _PEER_MARKS[place % len(_PEER_MARKS)], "markersize": 10, "markeredgewidth": 1.8, "zorder": 2}
        styles[name] = style | {"color": _PEER_COLOUR}
    for place, name in enumerate(kernels):
        style = {"marker": _MARKS[place % len(_MARKS)], "markersize": 8.5, "markeredgecolor": "white", "zorder": 3}
        styles[name] = style | {"color": _COLOURS[place % len(_COLOURS)]}
    if AUTO in kinds:
        ring = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgecolor": "black", "zorder": 4}
        styles[AUTO] = ring
    return styles


def _draw_row(axes: Any, place: int, values: dict[str, float], styles: dict[str, dict[str, Any]]) -> None:
    for name, value in values.items():
        axes.plot([value], [place], linestyle="none", **styles[name])


def _dress(axes: Any, rows: list[Row], title: str, empty: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{shape}  {which}" for shape, which, _ in rows])
    axes.grid(axis="x", color="#d8dce2", linewidth=0.8)
    axes.set_axisbelow(True)
    for place in range(len(rows)):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#f3f5f8", zorder=0)
    if empty:
        _as_ratios(axes, rows, empty)


def _as_ratios(axes: Any, rows: list[Row], empty: str) -> None:
    """A logarithmic axis with plain numbers: twice and half as fast lie equally far from 1."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    seen = [value for _, _, programs in rows for value in _against_best_peer(programs).values()]
    low, high = min([0.5, *seen]) / 1.25, max([2.0, *seen]) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [step * 10.0**power for power in range(-4, 5) for step in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.axvline(1, color="#3b4252", linewidth=1, linestyle="--")
    for place, (_, _, programs) in enumerate(rows):
        if not _against_best_peer(programs):
            axes.text(1.04, place, empty, va="center", color="#5c6370", fontsize="small", style="italic")


def _entitle(figure: Any, report: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    versions = report["versions"]
    said = ", ".join(f"{name} {versions[name]}" for name in ("jax", "kernelry", "tokamax") if name in versions)
    figure.suptitle(f"Attention on {report['device_kind']}, {report['date'][:10]}\n{said}; farther right is faster")
    handles = [Line2D([], [], linestyle="none", label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
