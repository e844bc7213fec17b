"""flywheel: what it is told of masks, its blocks, what it refuses, and where it is preferred. No vendor is needed."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernelry
from kernelry import masks
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.plugin import Operand, RefusalCode
from kernelry.request.request import Request
from kernelry_tpu_flywheel import ranking
from kernelry_tpu_flywheel.dense.blocks import backward_blocks, forward_blocks
from kernelry_tpu_flywheel.dense.geometry import Geometry
from kernelry_tpu_flywheel.dense.packed import Sequences, as_rows, most_runs
from kernelry_tpu_flywheel.plugin import FLYWHEEL, FLYWHEEL_PAGED, kernelry_rank

HERE = Environment(versions=(("flywheel-tpu", "0.3.0"),))
PACKED = np.repeat([3, -1, 0, 5], 64)


def _request(**options):
    known = {"target": "tpu:v6e", "mode": "prefill", "q_len": 256, "head_dim": 64, "dtype": "bfloat16"}
    return Request(**{**known, **options})


def _said(environment=HERE, **options):
    """All refusals, but for hidden slots, which an adapter cures."""
    request = _request(**options)
    found = (*FLYWHEEL.capabilities.refusals(request), *FLYWHEEL.refusals(request, environment))
    return "; ".join(str(refusal) for refusal in found if refusal.code is not RefusalCode.HIDDEN_SLOTS)


LENGTHS = st.integers(1, 40)
BOUNDS = st.none() | st.integers(0, 50)


@given(LENGTHS, LENGTHS, BOUNDS, BOUNDS, st.integers(-45, 45), st.integers(-9, 9))
def test_a_band_is_what_the_mask_shows(q_len, kv_len, left, right, offset, kv_offset):
    window = masks.Full() if right is None else masks.Causal().at(query_offset=offset + right, kv_offset=kv_offset)
    if left is not None:
        window = window & masks.SlidingWindow(left, 2**31 - 1).at(query_offset=offset, kv_offset=kv_offset)
    mask = window if (left, right) != (None, None) else masks.Full()
    geometry = Geometry.of(_request(q_len=q_len, kv_len=kv_len, mask=mask))
    seen = np.broadcast_to(np.asarray(mask.materialize(q_len, kv_len)), (1, 1, q_len, kv_len))[0, 0]
    # As the vendor reads it, with the slots that fill blocks.
    back, ahead = geometry.window
    query, key = np.ogrid[:q_len, : geometry.keys]
    shown = np.ones((q_len, geometry.keys), bool)
    shown &= back is None or key >= query + geometry.offset - back
    shown &= ahead is None or key <= query + geometry.offset + ahead
    if not seen.any():
        assert "shows no key" in _said(q_len=q_len, kv_len=kv_len, mask=mask)
        return
    np.testing.assert_array_equal(shown[:, :kv_len], seen[:, : geometry.keys])
    assert not seen[:, geometry.keys :].any()
    np.testing.assert_array_equal(geometry.empty_rows, ~seen.any(axis=1))
    fills = shown[:, kv_len:].any()
    assert not fills or geometry.shows_all_rows_behind
    assert ("does not hide" in _said(q_len=q_len, kv_len=kv_len, mask=mask)) == geometry.shows_all_rows_behind
    assert geometry.rows % 128 == geometry.keys % 128 == 0
    assert geometry.rows >= q_len


def test_bands_at_different_offsets_are_one_band():
    mask = masks.SlidingWindow(9).at(query_offset=4) & masks.SlidingWindow(30, 2)
    geometry = Geometry.of(_request(mask=mask))
    assert (geometry.low, geometry.high) == (-5, 2)
    assert geometry.is_window


@pytest.mark.parametrize("most", [1, 3, 8])
def test_runs_of_ids_are_counted_row_by_row(most):
    ids = np.random.default_rng(0).integers(-2, 3, (200, 7))
    ids[::2].sort(axis=1)
    starts, in_order, live = jax.jit(lambda ids: _runs(ids, most))(ids)
    wanted, right = [], []
    for place, row in enumerate(np.where(ids < 0, -1, ids)):
        begins = [slot for slot in range(7) if slot == 0 or row[slot] != row[slot - 1]]
        wanted += [7 * place + begin for begin in (begins + [7] * 7)[: min(most, 7)]]
        runs = [row[slot] for slot in begins if row[slot] >= 0]
        right.append(len(begins) <= most and len(runs) == len(set(runs)))
    assert starts.tolist() == [*wanted, 7 * len(ids)]
    assert in_order.tolist() == right
    assert any(right) == (most > 1)
    assert not all(right)
    np.testing.assert_array_equal(live, ids >= 0)


def _runs(ids, most):
    found = Sequences.of(as_rows(ids, len(ids)), most)
    return found.starts, found.in_order, found.live


def test_ids_that_are_known_are_counted_and_checked():
    assert most_runs(np.asarray([[1, 1, 0], [-1, 2, -1]]), 128, movable=False) == 3
    assert most_runs(np.asarray([[1, 0, 1, 0], [0, 0, 0, -2]]), 128, movable=True) == 2
    assert most_runs(jnp.asarray([1, 0, 1]), 5, movable=True) == 5
    with pytest.raises(KernelRefusedError, match=r"id 1 of row 1 .* more than one run; sort the tokens"):
        most_runs(np.asarray([[0, 0, 0], [1, 0, 1]]), 128, movable=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16"),
        ({"head_dim": 60}, "head_dim=60 is not a multiple of 8"),
        ({"value_dim": 264}, "value_dim=264 > 256"),
        ({"mode": "decode", "q_len": 1, "kv_len": 128}, "mode=decode is not prefill or train"),
        ({"q_len": 200}, "kv_len=200 is not a multiple of 128, and mask=full does not hide what would fill it up"),
        (
            {"q_len": 100, "kv_len": 200, "mask": masks.Causal().at(query_offset=101)},
            "kv_len=200 is not a multiple of 128, and mask=causal at query=101 does not hide",
        ),
        ({"mask": masks.Causal().at(query_offset=-256)}, "shows no key to any of q_len=256 queries"),
        ({"mask": masks.Chunked(64)}, r"mask atom chunked(64) is not causal or segments or window"),
        ({"mask": masks.Causal().at(query_positions=np.arange(256)[::-1].copy())}, "has static positions"),
        ({"mask": masks.Segments(PACKED, PACKED)}, "mask atom segments_separate is not"),
        ({"mask": masks.Segments(PACKED) & masks.Causal().at(query_offset=-1)}, "the keys at their own places"),
        ({"mask": masks.Segments(PACKED) & masks.Segments(PACKED + 1)}, "has 2 arrays of ids"),
        ({"mode": "train", "mask": masks.SlidingWindow(40)}, "mask=window(40, 0) is a window, and has no gradient"),
        ({"mode": "train", "mask": masks.Segments(PACKED)}, "mask=segments has segments, and no gradient"),
        ({"mode": "train", "soft_cap": 5.0}, "soft_cap=5.0 has no gradient"),
    ],
)
def test_a_refusal_says_the_value(options, message):
    assert message in _said(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "train"},
        {"mode": "train", "q_len": 200, "mask": masks.Causal()},
        {"mode": "train", "mask": masks.SlidingWindow(255)},
        {"q_len": 100, "kv_len": 200, "mask": masks.Causal().at(query_offset=100)},
        {"q_len": 100, "kv_len": 200, "mask": masks.Causal().at(query_offset=-7), "mode": "train"},
        {"soft_cap": 5.0, "mask": masks.SlidingWindow(40, 3)},
        {"q_len": 77, "mask": masks.Segments(PACKED[:77]) & masks.SlidingWindow(40, 3)},
        {"mode": "train", "soft_cap": 5.0, "gradients": ()},
    ],
)
def test_what_is_served_is_not_refused(options):
    assert _said(**options) == ""


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            "0.2.9",
            "flywheel-tpu 0.2.9 is not one of 0.3 … 0.4, the latter excluded; pip install",
        ),
        ("0.4.0", "flywheel-tpu 0.4.0 is not one of"),
        ("0.3.1", ""),
    ],
)
def test_releases_that_are_not_known_are_refused(version, message):
    said = _said(Environment(versions=(("flywheel-tpu", version),)))
    assert message in said
    assert bool(message) == bool(said)


OLD_PYTHON = (
    "flywheel-tpu needs Python 3.12, and this is Python 3.11; with Python 3.12 or later, "
    "pip install 'kernelry-tpu-flywheel[flywheel]'"
)


@pytest.mark.parametrize(
    "environment",
    [
        Environment(versions=(("flywheel-tpu", None),)),
        Environment(Knowledge.ASSUMED),
        Environment(Knowledge.NOT_PROBED),
    ],
    ids=["looked_for", "of_another_machine", "of_a_loser"],
)
@pytest.mark.parametrize("spec", [FLYWHEEL, FLYWHEEL_PAGED], ids=["flywheel", "flywheel_paged"])
def test_an_older_python_is_told_which_it_needs(spec, environment, monkeypatch):
    """Of another machine, too, nothing is assumed: this Python could not make the program."""
    monkeypatch.setattr(sys, "version_info", (3, 11, 4))
    (refusal,) = spec.refusals(_request(), environment)
    assert refusal.code is RefusalCode.VENDOR_MISSING
    assert str(refusal) == OLD_PYTHON


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this Python may have flywheel-tpu")
@pytest.mark.parametrize("kernel", ["flywheel", "flywheel_paged"])
def test_a_program_for_a_tpu_elsewhere_is_refused_on_an_older_python(kernel):
    pages = {"kv_layout": "interleaved", "page_size": 128, "q_len": 1, "kv_len": 256, "mode": "decode"}
    request = _request(head_dim=128, **(pages if kernel == "flywheel_paged" else {}))
    found = kernelry.explain(request, kernel=kernel)
    assert found.kernel is None
    assert OLD_PYTHON in str(found)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this Python may have flywheel-tpu")
def test_a_call_for_a_tpu_elsewhere_is_refused_on_an_older_python_and_not_broken():
    arrays = [jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)] * 3
    with kernelry.use(target="tpu:v6e"), pytest.raises(KernelRefusedError, match=r"flywheel-tpu needs Python 3\.12"):
        jax.eval_shape(lambda *a: kernelry.attention(*a, kernel="flywheel", mode="prefill"), *arrays)


def test_a_missing_vendor_is_told_what_brings_it(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    (refusal,) = FLYWHEEL.refusals(_request(), Environment(versions=(("flywheel-tpu", None),)))
    assert refusal.code is RefusalCode.VENDOR_MISSING
    assert str(refusal) == "flywheel-tpu is not installed; pip install 'kernelry-tpu-flywheel[flywheel]'"
    assert FLYWHEEL.refusals(_request(), Environment(Knowledge.ASSUMED)) == ()


@pytest.mark.versions
@pytest.mark.skipif(importlib.util.find_spec("flywheel_tpu") is not None, reason="flywheel-tpu is installed")
def test_without_the_vendor_a_call_is_refused_and_not_broken():
    arrays = [jnp.zeros((1, 128, 2, 64), jnp.bfloat16)] * 3
    with kernelry.testing.interpret(), pytest.raises(KernelRefusedError, match=r"flywheel-tpu (is not|needs Python)"):
        kernelry.attention(*arrays, kernel="flywheel", mode="prefill")


SIZES = (1, 100, 128, 640, 2048, 2176, 3072, 8192)


def test_every_tiling_of_the_search_space_is_one_the_kernel_takes():
    for length in SIZES:
        for mask in (masks.Causal(), masks.SlidingWindow(400), masks.Causal() & masks.Segments(np.zeros(length, int))):
            train = not Geometry.of(_request(q_len=length, mask=mask)).packed and mask == masks.Causal()
            request = _request(q_len=length, mask=mask, batch=3, mode="train" if train else "prefill")
            tilings = FLYWHEEL.tilings(request)
            assert len(set(tilings)) == len(tilings)
            for tiling in tilings:
                assert len(forward_blocks(request, tiling)) == len(backward_blocks(request, tiling)) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_q": 192}, "block_q=192 of flywheel is not a multiple of 128 that divides q_len, padded to 256"),
        ({"block_kv": 384}, "block_kv=384 of flywheel is not a multiple of 128 that divides kv_len"),
        (
            {"block_kv_compute": 96},
            "block_kv_compute=96 of flywheel is not a multiple of 128 that divides block_kv=256",
        ),
        ({"block_q_compute": 256}, r"block_q_compute=256 of flywheel .* into two or more parts"),
    ],
)
def test_blocks_that_do_not_fit_are_errors(values, message):
    request = _request(mask=masks.Causal())
    with pytest.raises(ConfigError, match=message):
        forward_blocks(request, FLYWHEEL.tilings(request)[0].replace(values, "flywheel"))


def test_blocks_of_the_backward_pass_that_do_not_fit_are_errors():
    request = _request(mask=masks.Causal())
    with pytest.raises(ConfigError, match=r"block_q_compute_bwd=96 of flywheel .* divides block_q_bwd=256"):
        backward_blocks(request, FLYWHEEL.tilings(request)[0].replace({"block_q_compute_bwd": 96}, "flywheel"))


def test_parts_and_segments_are_served_only_where_the_kernel_is_named():
    codes = {
        RefusalCode.STATISTICS: [{"partial": True}, {"statistics": True}],
        RefusalCode.MASK_ATOM: [{"mask": masks.Segments(PACKED)}],
    }
    for code, asked in codes.items():
        for options in asked:
            (found,) = FLYWHEEL.reservations(_request(**options))
            assert found.code is code
    assert FLYWHEEL.reservations(_request(mode="train", mask=masks.Causal())) == ()


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(ranking, "Environment", lambda: HERE)


def _voted(**options):
    long = {"q_len": 8192, "head_dim": 128, "mask": masks.Causal(), **options}
    found = kernelry_rank(_request(**long), ["splash", "flywheel", "blockwise"])
    return found and found.kernels


@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v6e", "tpu:tpu7x"])
@pytest.mark.usefixtures("installed")
def test_long_calls_of_which_a_schedule_is_known_get_a_vote(target):
    window = masks.SlidingWindow(1024)
    assert _voted(target=target) == ("flywheel",)
    assert _voted(target=target, mode="train", q_len=16384) == ("flywheel",)
    assert _voted(target=target, q_len=12200, kv_len=12288, mask=masks.Causal().at(query_offset=88)) == ("flywheel",)
    assert _voted(target=target, q_len=16384, mask=window) == ("flywheel",)


@pytest.mark.usefixtures("installed")
def test_passes_are_added_up():
    """On v5e and TPU7x tokamax's backward pass is predicted faster; on TPU7x the forward pass makes up for it."""
    candidates = ["splash", "tokamax_splash", "flywheel"]
    for target, vote in (("tpu:v5e", None), ("tpu:v6e", ("flywheel",)), ("tpu:tpu7x", ("flywheel",))):
        request = _request(target=target, mode="train", q_len=8192, head_dim=128, mask=masks.Causal())
        found = kernelry_rank(request, candidates)
        assert (found and found.kernels) == vote


@pytest.mark.parametrize(
    "options",
    [
        {"target": "tpu:v5p"},
        {"target": "cpu"},
        {"q_len": 4096},
        {"q_len": 8320},  # whose blocks are of 128
        {"q_len": 8200},
        {"q_len": 8192, "kv_len": 9216, "mask": masks.Causal().at(query_offset=1024)},
        {"q_len": 16384, "mask": masks.SlidingWindow(512)},
        {"mask": masks.SlidingWindow(1024)},
        {"mask": masks.Causal() & masks.Segments(np.zeros(8192, int))},
        {"soft_cap": 5.0},
        {"head_dim": 264},
        {"mode": "train", "mask": masks.SlidingWindow(1024), "gradients": [Operand.QUERY]},
    ],
)
@pytest.mark.usefixtures("installed")
def test_of_other_calls_nothing_is_known(options):
    assert _voted(**options) is None


@pytest.mark.usefixtures("installed")
def test_a_vote_needs_something_that_was_compared():
    request = _request(q_len=8192, head_dim=128, mask=masks.Causal())
    assert kernelry_rank(request, ["flywheel", "blockwise"]) is None
    assert kernelry_rank(request, ["splash", "blockwise"]) is None
    assert "predicted by libtpu" in kernelry_rank(request, ["flywheel", "splash"]).source


def test_without_the_vendor_nothing_is_preferred_that_could_not_be_made_here(monkeypatch):
    monkeypatch.setattr(ranking, "Environment", lambda: Environment(versions=(("flywheel-tpu", None),)))
    assert _voted() is None
