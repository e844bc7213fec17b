"""cudnn_te without transformer-engine: what it refuses, with which values, and what choosing costs.

What it computes and calls is tested beside the real transformer-engine: tests/plugins/cudnn_te, `make test-te`.
"""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks
from kernelry.kernel.spec import Environment
from kernelry.parallel import load_balanced_order
from kernelry.request.request import Request
from kernelry_cudnn_te.cudnn_te.settings import TeSettings

SEGMENTS = masks.Segments(jnp.asarray([0, 0, 1, 1]))
LENGTHS = masks.Lengths(jnp.asarray([3]))


def _request(**facts):
    return Request(**{"target": "gpu:h100", "q_len": 128, "head_dim": 64, "dtype": "bfloat16", **facts})


def _explained(environment=None, policy=NO_ADAPTERS, **facts):
    return str(kernelry.explain(_request(**facts), kernel="cudnn_te", policy=policy, environment=environment))


def _reasons(environment=None, **facts):
    """Why not, without adapters; and what the kernel itself says once they have done what they can."""
    return _explained(environment, **facts) + _explained(environment, None, **facts)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"mask": masks.Causal()},
        {"mask": masks.SlidingWindow(40, 3)},
        {"mask": masks.Causal().at(query_offset=128), "kv_len": 256},
        {"value_dim": 128, "head_dim": 192},
        {"value_dim": 128, "head_dim": 192, "target": "gpu:b200"},
        {"q_heads": 8, "kv_heads": 2, "sinks": True, "mask": masks.Causal()},
        {"bias": (1, 1, 1, 128)},
        {"dropout_rate": 0.1},
        {"partial": True, "gradients": ()},
        {"max_logits": True, "batch": 4, "mask": masks.Causal()},
        {"context_parallel": "ring:context:4", "mask": masks.Causal()},
        {"mode": "prefill", "dtype": "float16"},
    ],
    ids=str,
)
def test_served(facts):
    if "bias" in facts:
        facts = {**facts, "gradients": ["query"]}
    assert "→ cudnn_te" in _explained(**facts)


@pytest.mark.parametrize(
    "mask", [SEGMENTS, masks.Causal() & SEGMENTS, LENGTHS, masks.SlidingWindow(3) & LENGTHS], ids=str
)
def test_masks_with_arrays_want_hidden_slots_cleaned(mask):
    plan = kernelry.resolve(_request(mask=mask, q_len=4), kernel="cudnn_te").plan
    assert [step.adapter.name for step in plan.steps] == ["clean_hidden_slots"]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16 or float16"),
        ({"head_dim": 77}, "head_dim=77 is not a multiple of 8"),
        ({"head_dim": 264}, "head_dim=264 > 256"),
        ({"head_dim": 256, "target": "gpu:a100"}, "head_dim=256 > 128 on gpu:a100"),
        ({"head_dim": 192, "value_dim": 128, "target": "gpu:rtx5090"}, "head_dim=192 > 128 on gpu:rtx5090"),
        ({"head_dim": 192, "target": "gpu:b200"}, "head_dim=192 > 128 on gpu:b200, with gradients"),
        ({"target": "gpu:t4"}, "gpu:t4 is generation 75 < 80"),
        ({"mode": "decode"}, "mode=decode is not prefill or train"),
        ({"soft_cap": 30.0}, "soft_cap=30.0 is not supported"),
        ({"logits_dtype": "bfloat16"}, "logits_dtype=bfloat16 is not supported"),
        ({"mask": masks.Chunked(64)}, "mask atom chunked(64) is not causal or lengths or segments or window"),
        ({"mask": masks.Dense(jnp.ones((1, 1, 128, 128), bool))}, "mask atom dense"),
        ({"mask": ~masks.Causal()}, "mask atom ~(causal) is not causal"),
        (
            {"mask": masks.Segments(jnp.zeros(128, int), jnp.zeros(128, int))},
            "mask atom segments_separate is not",
        ),
        ({"mask": LENGTHS & SEGMENTS}, "mask=lengths & segments is more than one of lengths and segments"),
        (
            {"mask": masks.Causal() & masks.SlidingWindow(3).at(query_offset=7)},
            "is more than one band",
        ),
        (
            {"mask": masks.Causal().at(query_offset=5), "kv_len": 256},
            "with key 5; served are key 0 and, aligning the last with the last, kv_len - q_len = 128",
        ),
        (
            {"mask": masks.SlidingWindow(3, 2).at(query_offset=0), "kv_len": 256},
            "looks ahead, and q_len=128 differs from kv_len=256",
        ),
        (
            {"mask": masks.Causal().at(query_offset=128) & LENGTHS, "kv_len": 256},
            "is shifted by 128 and not only causal",
        ),
        (
            {"mask": masks.Causal().at(query_positions=np.arange(128)[::-1])},
            "has static positions, without context_parallel",
        ),
        ({"mask": masks.Causal().at(query_offset=jnp.int32(0))}, "has traced positions"),
        (
            {"bias": (2, 1, 128, 128), "batch": 2},
            "bias=(2, 1, 128, 128) has a gradient only where it is [1, N, T, S] with N=1",
        ),
        ({"bias": (1, 1, 128, 128), "mask": SEGMENTS}, "bias=(1, 1, 128, 128) with segments"),
        ({"max_logits": True, "sinks": True}, "max_logits might contain the sinks"),
        (
            {"max_logits": True, "batch": 4, "mask": LENGTHS},
            "transformer-engine's max_logits is one for batch=4 > 1 rows with mask=lengths",
        ),
        ({"dropout_rate": 0.1, "partial": True, "gradients": ()}, "dropout_rate=0.1 with partial"),
        ({"partial": True}, "no gradient through the lse of a Partial"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_its_value(facts, reason):
    assert reason in _reasons(**facts)
    assert "→ cudnn_te" not in _explained(**facts)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"bias": (1, 1, 128, 128)}, "context_parallel=ring:context:4 with bias=(1, 1, 128, 128)"),
        ({"dropout_rate": 0.5}, "context_parallel=ring:context:4 with dropout_rate=0.5"),
        ({"sinks": True}, "context_parallel=ring:context:4 with sinks=True"),
        ({"partial": True, "gradients": ()}, "context_parallel=ring:context:4 with partial=True"),
        ({"kv_len": 256}, "with q_len=128 that differs from kv_len=256"),
        ({"q_len": 130}, "q_len=130 is not a multiple of 4"),
        ({"mask": masks.SlidingWindow(8)}, "context_parallel=ring:context:4 with mask=window(8, 0)"),
        ({"mask": LENGTHS}, "context_parallel=ring:context:4 with mask=lengths"),
        ({"mask": SEGMENTS}, "context_parallel=ring:context:4 with mask=segments"),
        (
            {"mask": masks.Causal() & SEGMENTS},
            "needs tokens in striped order where rows are packed; mask=causal & segments; give the mask "
            ".at(query_positions=p, kv_positions=p), p = load_balanced_order(T, size, 'striped')",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_across_devices(facts, reason):
    assert reason in _reasons(context_parallel="ring:context:4", **facts)


def test_packed_rows_are_passed_around_and_not_gathered():
    order = load_balanced_order(128, 4, "striped")
    mask = masks.Causal().at(query_positions=order, kv_positions=order) & SEGMENTS
    text = _reasons(context_parallel="all_gather:context:4", mask=mask)
    assert "context_parallel=all_gather:context:4 with mask=" in text
    assert "say strategy='ring'" in text


@pytest.mark.parametrize("order", ["dual_chunk", "striped"])
def test_the_order_of_tokens_is_read_from_their_positions(order):
    places = load_balanced_order(64, 4, order)
    mask = masks.Causal().at(query_positions=places, kv_positions=places)
    assert TeSettings.of(_request(q_len=64, mask=mask, context_parallel="ring:context:4")).shared.order == order


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "transformer-engine is not installed; pip install 'kernelry-cudnn-te[te]'"),
        ("2.10.0", "transformer-engine 2.10.0 < 2.11; pip install 'kernelry-cudnn-te[te]'"),
        ("2.10rc1", "transformer-engine 2.10rc1 < 2.11"),
        ("2.13rc1+abc", "transformer-engine 2.13rc1+abc: its from_segment_ids_and_pos needs is_thd"),
        ("2.12.0", "transformer-engine 2.12.0: its from_segment_ids_and_pos needs is_thd and is_segment_ids_reordered"),
        ("2.13.0", "transformer-engine 2.13.0: its from_segment_ids_and_pos needs is_thd and is_segment_ids_reordered"),
    ],
)
def test_releases_that_are_refused(version, reason):
    environment = Environment(versions=(("transformer_engine", version),))
    assert reason in _explained(environment)


def test_what_an_older_release_lacks_is_refused():
    environment = Environment(versions=(("transformer_engine", "2.14.0"),))
    text = _explained(environment, max_logits=True)
    assert "max_logits=True needs transformer-engine 2.20, found 2.14.0" in text
    order = load_balanced_order(128, 4, "striped")
    mask = masks.Causal().at(query_positions=order, kv_positions=order) & SEGMENTS
    text = _reasons(environment, context_parallel="ring:context:4", mask=mask)
    assert "packed rows in a ring need transformer-engine 2.20, found 2.14.0" in text


@pytest.mark.parametrize("version", ["2.14.1", "2.21rc1", "2.21.0.dev1+abc", "3"])
def test_releases_that_are_not(version):
    assert (
        "transformer-engine" not in _explained(Environment(versions=(("transformer_engine", version),))).split(";")[0]
    )


def test_a_missing_device_is_found_at_home():
    text = _explained(Environment(versions=(("transformer_engine", "2.20.2"),)))
    assert "JAX sees no CUDA device" in text
    assert "on a machine with an NVIDIA GPU and its driver" in text


def test_listing_and_refusing_imports_no_transformer_engine():
    program = (
        "import sys, kernelry; from kernelry.request.request import Request; kernelry.kernels();"
        "print(kernelry.explain(Request(target='gpu:h100', q_len=128, dtype='bfloat16'), kernel='cudnn_te'));"
        "assert not any(name.startswith('transformer_engine') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "→ cudnn_te" in done.stdout


def test_segments_of_a_row_are_a_tunable():
    mask = masks.Causal() & masks.Segments(jnp.zeros(128, int))
    plan = kernelry.resolve(_request(mask=mask), kernel="cudnn_te").plan
    assert plan.tiling["max_segments"] == 32
