"""The shipped policy for CPUs chooses what the committed recording says is fastest; how it was recorded."""

import json
import re
import statistics
from pathlib import Path

import choosing
import pytest
import turns
from choosing import GOAL, Case, Recording

from kernelry.policy.shipped import SHIPPED_THRESHOLDS

_RECORDING = Path(__file__).parents[2] / "benchmarks" / "results" / "choosing-cpu.json"
_WORST_ELSEWHERE = 1.3
_CASES = Recording(_RECORDING).times
_MAIN = list(choosing.main_grid())
_TIMES = {
    "blockwise": {"ms": [1.0, 2.0, 3.0], "turns": 9},
    "dot_product": {"ms": [2.0, 3.0, 4.0], "turns": 9},
}


def _regret(case):
    return choosing.regret(_CASES[case], choosing.chosen(case.request))


@pytest.mark.parametrize("case", _MAIN, ids=str)
def test_auto_is_at_most_five_percent_behind_on_the_main_grid(case):
    assert _regret(case) <= GOAL


@pytest.mark.parametrize("grid", sorted(set(choosing.GRIDS) - {"main"}))
def test_auto_is_hardly_behind_on_other_shapes(grid):
    lost = {case: _regret(case) for case in choosing.GRIDS[grid]() if case in _CASES}
    assert {case: regret for case, regret in lost.items() if regret > _WORST_ELSEWHERE} == {}
    assert statistics.geometric_mean(lost.values()) <= GOAL


def test_every_kernel_that_serves_a_shape_was_timed():
    assert {case: set(times) for case, times in _CASES.items() if set(times) != {"blockwise", "dot_product"}} == {}


def test_the_recording_says_where_and_when():
    data = json.loads(_RECORDING.read_text(encoding="utf-8"))
    assert {"jax", "jaxlib", "python"} <= data["versions"].keys()
    assert data["date"]
    assert data["cpu"]["features"]


def test_the_page_has_the_thresholds_of_the_policy():
    page = (_RECORDING.parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    told = {name: int(value) for value, name in re.findall(r"\| (\d+) \| `(cpu_\w+)` \|", page)}
    assert told == {t.name: t.value for t in SHIPPED_THRESHOLDS if t.name.startswith("cpu_")}


def test_regret_is_the_median_over_the_least_median():
    assert [choosing.regret(_TIMES, kernel) for kernel in sorted(_TIMES)] == [1.0, 1.5]


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
@pytest.mark.parametrize("which", choosing.PASSES)
def test_both_kernels_serve_and_are_timed(which):
    times = choosing.measure(Case(8, "packed", which, 4, heads=1, head_dim=8), repeats=2)
    assert set(times) == {"blockwise", "dot_product"}
    assert all(0 < low <= median <= high for low, median, high in (told["ms"] for told in times.values()))


def test_turns_alternate_and_are_counted():
    calls = []
    programs = [turns.Program(name, lambda name=name: calls.append(name), once=2 * turns.SAMPLE_MS) for name in "ab"]
    turns.take_turns(programs, 2)
    assert calls[:2] == ["a", "b"]
    assert [len(program.times) for program in programs] == [2, 2]
    assert turns.ratios([2.0, 6.0, 12.0], [1.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
