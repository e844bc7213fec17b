"""What kernelry.aot does without a compiler: work from requests, reasons from words, errors with what to do."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelry import Request, aot, masks
from kernelry.aot.reasons import Reason
from kernelry.errors import ConfigError

pytestmark = pytest.mark.versions

MASKS = st.sampled_from(
    [
        masks.Full(),
        masks.Causal(),
        masks.SlidingWindow(70, 9),
        masks.Chunked(100),
        masks.BlockCausal(48),
        ~masks.SlidingWindow(20, 20),
        masks.SlidingWindow(20) | masks.BlockCausal(128),
    ]
)


def _request(mask, **facts):
    return Request(**{"target": "tpu:v5e", "mode": "prefill", "q_len": 256, "dtype": "bfloat16", "mask": mask, **facts})


@given(MASKS, st.integers(1, 300))
def test_flops_are_those_of_the_visible_pairs(mask, length):
    request = _request(mask, q_len=length, q_heads=4, kv_heads=2, batch=3, head_dim=64, value_dim=32)
    visible = np.asarray(mask.materialize(length, length)).sum()
    wanted = 2 * 3 * 4 * visible * (64 + 32)
    # Blocks of which a part is hidden count half: the edge of a mask is counted to within its blocks.
    edge = 2 * 3 * 4 * (64 + 32) * length * -(-length // 128) * 4
    assert abs(aot.Work.of(request, mask).flops - wanted) <= edge


def test_work_of_training_counts_seven_products():
    forward, whole = (aot.Work.of(_request(masks.Full(), mode=mode), masks.Full()) for mode in ("prefill", "train"))
    assert whole.flops == 3.5 * forward.flops
    operand = 256 * 64 * 2
    assert (forward.bytes, whole.bytes) == (4 * operand, 12 * operand)


def test_arrays_of_a_mask_are_taken_to_hide_nothing():
    mask = masks.Causal() & masks.Segments(np.arange(256))
    assert aot.Work.of(_request(mask), mask).flops == aot.Work.of(_request(masks.Causal()), masks.Causal()).flops


def test_the_roofline_is_the_longer_of_the_two():
    decode = aot.Work.of(_request(masks.Full(), mode="decode", q_len=1, kv_len=4096), masks.Full())
    assert decode.seconds == pytest.approx(decode.bytes / 819e9)
    prefill = aot.Work.of(_request(masks.Full(), q_len=8192), masks.Full())
    assert prefill.seconds == pytest.approx(prefill.flops / 197e12)
    assert prefill.intensity == pytest.approx(prefill.flops / prefill.bytes)
    assert aot.Work.of(_request(masks.Full(), target="cpu"), masks.Full()).seconds is None


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
            "allocating on stack for %x. Scoped allocation with size 21.84M and limit 16.00M exceeded scoped vmem "
            "limit by 5.84M. It should not be",
            "Scoped allocation with size 21.84M and limit 16.00M exceeded scoped vmem limit by 5.84M; set smaller "
            "blocks",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (785.51G) "
            "exceeds available HBM (15.75G).",
            "Ran out of memory on HBM, the total memory required for HLO temporaries (785.51G) exceeds available HBM "
            "(15.75G); shorten the sequence, shard it, or choose a kernel that keeps no T×S logits",
        ),
        (
            "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 327680, available: 232448, context: []",
            "Shared memory size limit exceeded: requested 327680, available: 232448; set smaller blocks",
        ),
        ("INTERNAL: heading:\n  the  reason\nmore", "the reason"),
        ("", "ValueError"),
    ],
)
def test_reasons_are_one_line_with_what_to_change(words, wanted):
    assert str(Reason.of(ValueError(words))) == wanted


def test_smaller_blocks_are_half_of_those_that_were_too_large():
    reason = Reason.of(ValueError("Ran out of memory in memory space vmem"))
    said = reason.about("mine", {"block_kv": 2048, "block_q": 512, "q_layout": 1})
    assert said.remedy == "set smaller blocks, e.g. [attention.tilings] mine = { block_kv = 1024, block_q = 256 }"
    assert reason.about("mine", {}) == reason
    assert Reason("other").about("mine", {"block_q": 512}) == Reason("other")


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(ConfigError, match=r"needs libtpu, their compiler; pip install 'kernelry\[aot-tpu\]'"):
        aot.topology_of("tpu:v5e:9x9")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cpu", "compiled ahead of time for tpu:kind and gpu:kind, e.g. tpu:v5e:2x2 or gpu:h100"),
        ("tpu", "names no kind of TPU to compile for; known: .*tpu:v5e"),
        ("gpu", "names no kind of GPU to compile for; known: .*gpu:h100"),
        ("gpu:l40s", r"'gpu:l40s' names no kind of GPU to compile for.* \(gpu:a100, gpu:h100, gpu:h200, gpu:b200\)"),
    ],
)
def test_targets_without_a_compiler_are_errors(target, words):
    with pytest.raises(ConfigError, match=words):
        aot.topology_of(target)
