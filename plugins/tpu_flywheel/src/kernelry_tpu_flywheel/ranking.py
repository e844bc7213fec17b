"""The vote: `flywheel` first where the TPU compiler's own schedule says that it is faster. Nothing was measured.

`predictions.json` holds microseconds of one head by chip, pass, mask, length and head dims.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from kernelry.plugin import Environment, Ranking, Request
from kernelry_tpu_flywheel.dense.blocks import is_cut_as
from kernelry_tpu_flywheel.dense.geometry import Geometry
from kernelry_tpu_flywheel.installed import not_installed

_NAME = "flywheel"


def ranked(request: Request, candidates: Sequence[str]) -> Ranking | None:
    """Votes for flywheel, or abstains where no schedule of such a call is known.

    It abstains, too, where flywheel-tpu is not installed, though the call is for a machine elsewhere that may have it:
    the program could not be made here.
    """
    if _NAME not in candidates or request.target.platform != "tpu" or any(not_installed(Environment())):
        return None
    passes = ("forward", "backward") if request.gradients else ("forward",)
    rows = [_row(request, part) for part in passes]
    times = [row["kernels"] for row in rows if row is not None]
    if len(times) < len(passes) or not _is_fastest(times, candidates):
        return None
    return Ranking((_NAME,), f"predicted by {_table()['compiler']}, not measured")


def _is_fastest(times: Sequence[Mapping[str, float]], candidates: Sequence[str]) -> bool:
    """Whether all passes together take less than those of any other kernel of which all are known."""
    known = set.intersection(*(set(found) for found in times)) & set(candidates)
    totals = {name: sum(found[name] for found in times) for name in known}
    return len(totals) > 1 and min(totals, key=lambda name: totals[name]) == _NAME


def _row(request: Request, part: str) -> Mapping[str, Any] | None:
    """What is known of a pass: of the longest calls that are no longer, and of the next larger head dims."""
    known = [row for row in _table()["rows"] if row["pass"] == part and _is_like(row, request)]
    return min(known, key=lambda row: (row["head_dim"], row["value_dim"], -row["length"]), default=None)


def _is_like(row: Mapping[str, Any], request: Request) -> bool:
    if (row["target"], row["dtype"]) != (request.target.kind, request.dtype) or request.soft_cap is not None:
        return False
    if request.head_dim > row["head_dim"] or request.value_dim > row["value_dim"]:
        return False
    if min(request.q_len, request.kv_len) < row["length"] or row["mask"] not in _kinds(request, row["window"]):
        return False
    # Of other lengths blocks may be small: 128 of 8320, which fewer divide.
    return is_cut_as(request, row["length"])


def _kinds(request: Request, reach: int | None) -> Iterator[str]:
    """What the mask is called in the table; a window looks back at least so far."""
    geometry = Geometry.of(request)
    left, right = geometry.window
    if geometry.packed:
        return
    if left is None:
        yield "full" if right is None else "causal"
    elif right is not None and reach is not None and left + 1 >= reach:
        yield "window"


@functools.cache
def _table() -> Mapping[str, Any]:
    text = resources.files("kernelry_tpu_flywheel").joinpath("predictions.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return table
