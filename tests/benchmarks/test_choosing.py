"""What the committed recordings of this repository's CPU contain, and how they are made."""

import json
import re
from pathlib import Path

import choosing
import jax
import pytest
import turns
from choosing import Case, Recording, grids

from kernelry.policy.shipped import SHIPPED_THRESHOLDS
from kernelry.request.target import Target

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_RECORDINGS = ("choosing-cpu", "choosing-cpu-held-out")
_CASES = [case for cases in grids("cpu").values() for case in cases]
_TIMES = {
    "blockwise": {"ms": [1.0, 2.0, 3.0], "turns": 9},
    "dot_product": {"ms": [2.0, 3.0, 4.0], "turns": 9},
}


@pytest.mark.parametrize("name", _RECORDINGS)
def test_every_kernel_that_serves_a_shape_was_timed(name):
    times = Recording(_RESULTS / f"{name}.json").times
    assert set(times) == set(_CASES)
    assert {case: set(told) for case, told in times.items() if set(told) != {"blockwise", "dot_product"}} == {}


@pytest.mark.parametrize("name", _RECORDINGS)
def test_a_recording_says_where_and_when(name):
    data = json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert {"jax", "jaxlib", "python"} <= data["versions"].keys()
    assert data["target"] == "cpu"
    assert data["date"]
    assert data["cpu"]["features"]


def test_the_held_out_recording_is_another_run_on_the_same_machine():
    one, other = (Recording(_RESULTS / f"{name}.json") for name in _RECORDINGS)
    assert {name: one.recorded[name] for name in choosing.SAME} == {
        name: other.recorded[name] for name in choosing.SAME
    }
    assert not [case for case in _CASES if one.times[case] == other.times[case]]


def test_the_page_has_the_thresholds_of_the_policy():
    page = (_RESULTS.parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    told = {name: int(value) for value, name in re.findall(r"\| (\d+) \| `(cpu_\w+)` \|", page)}
    assert told == {t.name: t.value for t in SHIPPED_THRESHOLDS if t.name.startswith("cpu_")}


def test_regret_is_the_median_over_the_least_median():
    assert [choosing.regret(_TIMES, kernel) for kernel in sorted(_TIMES)] == [1.0, 1.5]


def test_a_kernel_without_a_time_is_never_fast_enough():
    assert choosing.regret(_TIMES, "pallas_flash") == float("inf")


@pytest.mark.parametrize("target", ["cpu", "gpu:h100", "tpu:v6e"])
def test_every_case_of_a_platform_is_a_request_of_its_mode(target):
    target = Target.parse(target)
    for name, cases in grids(target.platform).items():
        assert len(set(cases)) == len(cases), name
        modes = {case.request(target).mode.value for case in cases}
        assert modes == {"decode"} if name == "decode" else modes <= {"prefill", "train"}, name


class _Device:
    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"
    client = type("Client", (), {"platform_version": "PJRT C API, cuda 13000"})()


def test_a_recording_on_an_accelerator_names_the_device_and_is_continued_on_its_kind_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "current_target", lambda: Target.parse("gpu:h100"))
    monkeypatch.setattr(jax, "devices", lambda: [_Device()])
    written = Recording(tmp_path / "choosing-h100.json")
    written.times[Case(1024, "causal", "forward", dtype="bfloat16")] = _TIMES
    written.write()
    again = Recording(tmp_path / "choosing-h100.json")
    again.check()
    assert again.target == Target("gpu", "h100")
    assert again.recorded["device"] == "NVIDIA H100 80GB HBM3, PJRT C API, cuda 13000"
    monkeypatch.setattr(choosing, "current_target", lambda: Target.parse("gpu:a100"))
    with pytest.raises(SystemExit, match="recorded with target gpu:h100, here it is gpu:a100"):
        Recording(tmp_path / "choosing-h100.json").check()


def test_a_kernel_that_fails_is_left_out_and_said(monkeypatch, capsys):
    def passes(case, kernel):
        return (_broken if kernel == "broken" else _quick), ()

    monkeypatch.setattr(choosing, "eligible", lambda _: ["broken", "dot_product"])
    monkeypatch.setattr(choosing, "jitted", passes)
    assert set(choosing.measure(Case(64, "causal", "forward"), repeats=3)) == {"dot_product"}
    assert "broken is left out: out of memory" in capsys.readouterr().out


def _quick():
    return 1.0


def _broken():
    raise RuntimeError("out of memory\nand more")


def test_a_recording_is_read_back(tmp_path):
    written = Recording(tmp_path / "r.json")
    case = Case(64, "window", "forward", 32, dtype="bfloat16")
    written.times[case] = _TIMES
    written.write()
    assert Recording(tmp_path / "r.json").times == {case: _TIMES}


def test_a_recording_of_another_machine_is_not_continued(tmp_path):
    written = Recording(tmp_path / "r.json")
    written.times[Case(64, "causal", "forward")] = _TIMES
    written.facts["cores"] = -1
    written.write()
    with pytest.raises(SystemExit, match="recorded with cores -1"):
        Recording(tmp_path / "r.json").check()


@pytest.mark.sweep
@pytest.mark.parametrize(
    "case",
    [
        Case(8, "packed", "forward", 4, heads=1, head_dim=8),
        Case(8, "packed", "forward+backward", 4, heads=1, head_dim=8),
        Case(1, "cache", "decode", 8, heads=2, kv_heads=1, head_dim=8, keys=8),
    ],
    ids=lambda case: case.which,
)
def test_both_kernels_serve_and_are_timed(case):
    times = choosing.measure(case, repeats=2)
    assert set(times) == {"blockwise", "dot_product"}
    assert all(0 < low <= median <= high for low, median, high in (told["ms"] for told in times.values()))


def test_ratios_are_of_times_that_were_taken_in_the_same_turns():
    assert turns.ratios([2.0, 6.0, 12.0], [1.0, 2.0, 3.0]) == (2.5, 3.0, 3.5)
