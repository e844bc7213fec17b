"""A pass over a small shape: who is timed, and who is absent and why."""

import pytest
from on_device import peers
from on_device.calls import AbsentError, Contender
from on_device.cells import Cell
from on_device.clock import Clock
from on_device.kernels import contender
from on_device.shapes import FORWARD, Shape
from on_device.timing import check_room
from on_device.truth import expected

pytestmark = pytest.mark.sweep

SHAPE = Shape(q_len=32, kv_len=32, q_heads=2, kv_heads=1, head_dim=8, dtype="float32")
CAPPED = Shape(q_len=32, kv_len=32, q_heads=2, kv_heads=1, head_dim=8, window=8, soft_cap=5.0, dtype="float32")


def _run(contenders, clock=Clock(), shape=SHAPE):  # noqa: B008
    arrays = shape.arrays()
    return Cell(shape, FORWARD, arrays, expected(shape, arrays), clock).run(contenders, 3)["programs"]


def _broken(how):
    def lower(shape, which, arrays):
        del shape, which, arrays
        raise how

    return Contender("broken", "kernel", lower)


def test_auto_shares_the_program_of_the_kernel_that_it_chose():
    found = _run([contender("dot_product"), contender("auto")])
    assert found["auto"]["kernel"] == "dot_product"
    assert found["auto"]["same_program_as"] == "dot_product"
    assert found["dot_product"]["samples"] == 3
    assert found["dot_product"]["relative_error"]["out"] < 1e-5


def test_a_failure_is_one_line_and_the_others_are_timed():
    found = _run([_broken(RuntimeError("out of\nmemory")), contender("dot_product")])
    assert found["broken"] == {"kind": "kernel", "absent": "failed", "reason": "RuntimeError: out of; memory"}
    assert "median_ms" in found["dot_product"]


def test_a_kernel_refuses_in_its_own_words():
    found = _run([contender("pallas_mha")])["pallas_mha"]
    assert found["absent"] == "refused"
    assert found["reason"].startswith("pallas_mha: platform=cpu is not gpu")


def test_when_the_minutes_are_over_nothing_more_is_compiled():
    assert _run([contender("dot_product")], Clock(0.0))["dot_product"]["absent"] == "not reached"


def test_a_program_that_wants_too_much_memory_is_not_run(monkeypatch):
    arrays = SHAPE.arrays()
    compiled = contender("dot_product").lower(SHAPE, FORWARD, arrays)[0].compile()
    check_room(compiled)
    monkeypatch.setattr("on_device.timing._free_bytes", lambda: 1000.0)
    with pytest.raises(AbsentError, match="are free"):
        check_room(compiled)


@pytest.mark.parametrize(
    ("peer", "reason"),
    [(peers.XLA, "no soft cap"), (peers.CUDNN, "needs an NVIDIA GPU"), (peers.TOKAMAX_TRITON, "NVIDIA GPU|installed")],
)
def test_a_peer_that_cannot_express_a_shape_says_why(peer, reason):
    chosen = next(each for each in peers.contenders() if each.name == peer)
    with pytest.raises(AbsentError, match=reason):
        chosen.lower(CAPPED, FORWARD, CAPPED.arrays())


def test_mha_is_not_asked_for_what_it_has_no_argument_for():
    mha = next(each for each in peers.PEERS if each.name == peers.MHA)
    assert "no window" in mha.why_not(CAPPED)
    assert mha.why_not(SHAPE) is None
    assert mha.notes(SHAPE) == ["keys and values are repeated 2 times inside the call"]
