"""The sums at the end of a run: what the project aims at, each computed from the times of that run alone.

A target names kernels and shapes; where one was not installed, not timed or wrong, the target is absent and says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, final

from on_device.calls import AbsentError
from on_device.kernels import AUTO
from on_device.peers import CUDNN, MHA
from on_device.shapes import FORWARD

FLASH, DECODE = "pallas_flash", "pallas_decode"
_AT_8K, _WINDOW, _AT_16K = "causal_8k", "window_1024_16k", "causal_16k"

Report = dict[str, Any]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Time:
    """The median of a program for a pass over a shape."""

    program: str
    shape: str
    which: str

    def of(self, report: Report) -> dict[str, Any]:
        """What was measured.

        Raises:
          AbsentError: nothing was, or it was wrong.
        """
        passes = report["shapes"].get(self.shape, {}).get("passes", {})
        if self.which not in passes:
            raise AbsentError("absent", f"{self.shape} {self.which} was not timed")
        found: dict[str, Any] | None = passes[self.which]["programs"].get(self.program)
        if found is None:
            raise AbsentError("absent", f"{self.program} is not installed, or was left out")
        if "median_ms" not in found:
            raise AbsentError("absent", f"{self.program}: {found['absent']}: {found['reason']}")
        if found["wrong"]:
            raise AbsentError("absent", f"{self.program} is wrong there: relative error {found['relative_error']}")
        return found


def targets(report: Report) -> list[dict[str, Any]]:
    """Each with its name, unit and value, or the reason why it is absent."""
    return [*_against_peers(report), *_window(report), *_decode(report), *_auto(report)]


def _against_peers(report: Report) -> Iterator[dict[str, Any]]:
    for which in _passes_of(report, _AT_8K):
        for peer in (MHA, CUDNN):
            name = f"{_AT_8K} {which}: {FLASH} against {peer}"
            yield _ratio(report, name, "times as fast", Time(peer, _AT_8K, which), Time(FLASH, _AT_8K, which))


def _window(report: Report) -> Iterator[dict[str, Any]]:
    for which in _passes_of(report, _WINDOW):
        name = f"{FLASH} {which}: {_AT_16K} against {_WINDOW}"
        full, window = Time(FLASH, _AT_16K, which), Time(FLASH, _WINDOW, which)
        yield _ratio(report, name, "times the time", full, window)


def _decode(report: Report) -> Iterator[dict[str, Any]]:
    for shape, about in report["shapes"].items():
        if about["mode"] == "decode":
            name = f"{shape}: {DECODE}, share of the copy's bandwidth"
            time = Time(DECODE, shape, FORWARD)
            yield _value(name, "of copy", lambda time=time: time.of(report)["of_copy"])


def _auto(report: Report) -> Iterator[dict[str, Any]]:
    for shape, about in report["shapes"].items():
        for which in about["passes"]:
            name = f"{shape} {which}: {AUTO} against the fastest installed kernel"
            try:
                yield {"target": name, **_auto_against_fastest(report, shape, which)}
            except AbsentError as error:
                yield {"target": name, "absent": str(error)}


def _auto_against_fastest(report: Report, shape: str, which: str) -> dict[str, Any]:
    chosen, best = Time(AUTO, shape, which).of(report), _fastest(report, shape, which)
    same = chosen.get("same_program_as") == best["kernel"]
    share = 1.0 if same else best["median_ms"] / chosen["median_ms"]  # one program timed twice differs by noise alone
    about = {"chosen": chosen["kernel"], "fastest": best["kernel"], "same_program": same}
    return {"value": round(share, 4), "unit": "of its speed", **about}


def _fastest(report: Report, shape: str, which: str) -> dict[str, Any]:
    programs = report["shapes"][shape]["passes"][which]["programs"]
    kernels = (found for name, found in programs.items() if name != AUTO and found["kind"] == "kernel")
    right = [found for found in kernels if "median_ms" in found and not found["wrong"]]
    if not right:
        raise AbsentError("absent", "no installed kernel ran and was right")
    return min(right, key=lambda found: found["median_ms"])


def _passes_of(report: Report, shape: str) -> tuple[str, ...]:
    return tuple(report["shapes"].get(shape, {}).get("passes", {})) or (FORWARD,)


def _ratio(report: Report, name: str, unit: str, slow: Time, fast: Time) -> dict[str, Any]:
    return _value(name, unit, lambda: slow.of(report)["median_ms"] / fast.of(report)["median_ms"])


def _value(name: str, unit: str, compute: Any) -> dict[str, Any]:
    try:
        return {"target": name, "value": round(compute(), 4), "unit": unit}
    except AbsentError as error:
        return {"target": name, "absent": str(error)}


def lines(found: list[dict[str, Any]]) -> list[str]:
    """For a terminal."""
    return [_line(each) for each in found]


def _line(each: dict[str, Any]) -> str:
    if "absent" in each:
        return f"       —  {each['target']}: absent, {each['absent']}"
    note = f" (chose {each['chosen']}; fastest {each['fastest']})" if "chosen" in each else ""
    return f"{each['value']:8.3f}  {each['unit']}: {each['target']}{note}"
