"""The sums at the end of a run, from reports that were made up."""

import pytest
from device_reports import absent, kernel, report, timed
from on_device.peers import CUDNN, MHA
from on_device.targets import lines, targets

FORWARD = "forward"


def _named(found, words):
    return next(each for each in found if words in each["target"])


def test_a_kernel_is_so_many_times_as_fast_as_a_peer():
    programs = {"pallas_flash": kernel("pallas_flash", 2.0), MHA: timed("peer", 5.0), CUDNN: timed("peer", 1.0)}
    found = targets(report({("causal_8k", FORWARD): programs}))
    assert _named(found, f"against {MHA}")["value"] == 2.5
    assert _named(found, f"against {CUDNN}")["value"] == 0.5


def test_a_window_is_compared_with_the_whole_triangle():
    cells = {
        ("window_1024_16k", FORWARD): {"pallas_flash": kernel("pallas_flash", 2.0)},
        ("causal_16k", FORWARD): {"pallas_flash": kernel("pallas_flash", 9.0)},
    }
    assert _named(targets(report(cells)), "causal_16k against window_1024_16k")["value"] == 4.5


def test_decode_is_a_share_of_the_copy():
    cells = {("decode_128k", FORWARD): {"pallas_decode": kernel("pallas_decode", 1.0, of_copy=0.75)}}
    assert _named(targets(report(cells)), "decode_128k: pallas_decode")["value"] == 0.75


def test_auto_is_compared_with_the_fastest_kernel_and_not_with_peers():
    programs = {"slow": kernel("slow", 4.0), "fast": kernel("fast", 1.0), MHA: timed("peer", 0.1)}
    programs["auto"] = kernel("slow", 4.0)
    found = _named(targets(report({("causal_8k", FORWARD): programs})), "auto")
    assert (found["value"], found["chosen"], found["fastest"]) == (0.25, "slow", "fast")


def test_auto_with_the_fastest_kernels_own_program_is_as_fast():
    programs = {"fast": kernel("fast", 1.0), "auto": kernel("fast", 1.1, same_program_as="fast")}
    assert _named(targets(report({("causal_8k", FORWARD): programs})), "auto")["value"] == 1.0


def test_a_wrong_kernel_cannot_look_fast():
    programs = {"wrong": kernel("wrong", 0.1, wrong=True), "right": kernel("right", 2.0), "auto": kernel("right", 2.0)}
    found = targets(report({("causal_8k", FORWARD): programs}))
    assert _named(found, "auto")["value"] == 1.0
    programs = {"pallas_flash": kernel("pallas_flash", 0.1, wrong=True), MHA: timed("peer", 5.0)}
    found = targets(report({("causal_8k", FORWARD): programs}))
    assert "pallas_flash is wrong there" in _named(found, MHA)["absent"]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({}, "causal_8k forward was not timed"),
        ({("causal_8k", FORWARD): {MHA: timed("peer", 1.0)}}, "pallas_flash is not installed"),
        (
            {("causal_8k", FORWARD): {MHA: timed("peer", 1.0), "pallas_flash": absent("kernel", "no such block")}},
            "pallas_flash: refused: no such block",
        ),
    ],
)
def test_what_cannot_be_computed_says_why(cells, reason):
    found = targets(report(cells))
    each = _named(found, f"against {MHA}")
    assert "value" not in each
    assert reason in each["absent"]
    assert any("absent" in line and reason in line for line in lines(found))
