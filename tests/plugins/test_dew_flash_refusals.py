"""Every limit of dew_flash: refused with its value before anything is traced, or cured by an adapter."""

import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.plugin import RefusalCode, Request
from kernelry_gpu_flash_attn.dew_flash import devices
from kernelry_gpu_flash_attn.dew_flash.settings import seen_by_band
from kernelry_gpu_flash_attn.plugin import DEW_FLASH

FINE = (
    ("jax", "0.12.0"),
    ("dew-flash-attn-cu13", "0.3.6"),
    ("dew-flash-attn-cu12", None),
    ("jax-cuda13-plugin", "0.12.0"),
    ("jax-cuda12-plugin", None),
)


def _request(**options):
    return Request(**{"target": "gpu:a100", "q_len": 128, "head_dim": 64, "dtype": "bfloat16", **options})


def _explained(environment=None, policy=NO_ADAPTERS, **options):
    return kernelry.explain(_request(**options), kernel="dew_flash", policy=policy, environment=environment)


def _own(**options):
    """What the kernel adds, also where core has refused already and does not ask it."""
    return "; ".join(map(str, DEW_FLASH.refusals(_request(**options), Environment(Knowledge.ASSUMED))))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16 or float16"),
        ({"head_dim": 77}, "head_dim=77 is not a multiple of 8"),
        ({"head_dim": 264}, "head_dim=264 > 256"),
        ({"value_dim": 32}, "value_dim=32 differs from head_dim=64"),
        ({"target": "gpu:t4"}, "gpu:t4 is generation 75 < 80"),
        (
            {"target": "gpu:b200"},
            "gpu:b200 is generation 100; dew-flash-attn has code for 8.0 to 8.9, 9.0 and 12.0",
        ),
        ({"target": "gpu"}, "the generation of target gpu is not known, and they differ in their kernels; name it"),
        (
            {"target": "gpu:a10g"},
            "FlashAttention-2 needs buffers by the number of multiprocessors, which is not known of gpu:a10g; lower on",
        ),
        (
            {"target": "gpu:l40s", "head_dim": 200},
            "head_dim=200 > 192 on gpu:l40s with gradients; ask for none (gradients=()) or use gpu:a100 or gpu:h100",
        ),
        ({"target": "gpu:rtx5090", "head_dim": 256}, "head_dim=256 > 192 on gpu:rtx5090 with gradients"),
        ({"target": "cpu", "interpret": True}, "platform=cpu is not gpu"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 65536}, "batch=65536 > 65535, CUDA's limit of a grid"),
        ({"mode": "decode"}, "mode=decode is not prefill or train"),
    ],
)
def test_devices_sizes_and_dtypes_beyond_the_limits(options, reason):
    assert reason in str(_explained(**options)) + _own(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"mask": masks.Causal().at(query_offset=5)},
            "causal at query=5 aligns the first query with key 5; FlashAttention aligns the last with the last, which "
            "is kv_len - q_len = 0",
        ),
        (
            {"mask": masks.Causal().at(query_offset=0), "q_len": 64, "kv_len": 128},
            "aligns the first query with key 0; FlashAttention aligns the last with the last, which is "
            "kv_len - q_len = 64",
        ),
        (
            {"mask": masks.SlidingWindow(3, 130).at(kv_offset=172), "q_len": 300, "kv_len": 128},
            "looks ahead by more than kv_len=128 < q_len=300, where FlashAttention-2 stops",
        ),
        (
            {"mask": masks.SlidingWindow(3, 999).at(kv_offset=172), "q_len": 300, "kv_len": 128},
            "looks ahead by more than kv_len=128 < q_len=300, where FlashAttention-2 stops",
        ),
        ({"mask": masks.Causal().at(query_offset=np.int32([5, 7])), "batch": 2}, "has static positions"),
        (
            {"mask": masks.Causal() & masks.SlidingWindow(4).at(query_offset=1, kv_offset=1)},
            "is more than one band",
        ),
        (
            {"mask": masks.Causal() & masks.Lengths(3)},
            "mask=causal & lengths: FlashAttention would align the last query with the last key of each length",
        ),
        ({"mask": masks.Segments([0] * 128) & masks.Lengths(3)}, "is more than one of lengths and segments"),
        ({"mask": masks.Segments([0] * 128, [0] * 128)}, "mask atom segments_separate is not"),
        ({"mask": masks.Dense(np.ones((128, 128), bool))}, "mask atom dense is not causal or lengths or segments or"),
        ({"mask": masks.Chunked(16)}, "mask atom chunked(16) is not"),
        ({"mask": masks.Causal() | masks.Lengths(3)}, "is not causal or lengths or segments or window"),
        ({"mask": masks.Lengths(3)}, "mask=lengths may leave rows that see no key; empty_rows_from_lse would help"),
        ({"mask": masks.Lengths(3)}, "mask=lengths may hide slots that hold NaN or inf; clean_hidden_slots would help"),
    ],
)
def test_masks_that_would_mean_something_else(options, reason):
    assert reason in str(_explained(**options)) + _own(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"soft_cap": 2.0}, "soft_cap=2.0 is not supported"),
        ({"bias": (1, 1, 128, 128)}, "bias=(1, 1, 128, 128) is not supported"),
        ({"sinks": True}, "sinks=True is not supported; sinks_from_lse would help"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 is not supported"),
        ({"logits_dtype": "bfloat16"}, "logits_dtype=bfloat16 is not supported"),
        ({"precision": "highest"}, "precision=highest is not supported"),
        ({"max_logits": True}, "max_logits=True is not supported"),
        ({"partial": True}, "no gradient through the lse of a Partial; lse_gradient_column would help"),
        ({"kv_quantization": "int8:head_dim"}, "kv_quantization=int8:head_dim is not declared"),
        ({"page_size": 16}, "keys and values are in pages of page_size=16"),
        ({"context_parallel": "ring:x:2"}, "is not supported: it runs on one device"),
    ],
)
def test_what_is_not_declared(options, reason):
    assert reason in str(_explained(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"target": "gpu:h200", "head_dim": 256},
        {"head_dim": 256},
        {"target": "gpu:rtxpro6000", "head_dim": 192},
        {"target": "gpu:l40s", "head_dim": 256, "mode": "prefill"},
        {"target": "gpu:a10g", "mask": masks.Segments([0] * 128)},  # packed sequences' keys are never split
        {"mask": masks.Causal().at(query_offset=64), "q_len": 64, "kv_len": 128},
        {"mask": masks.SlidingWindow(3, 5).at(kv_offset=172), "q_len": 300, "kv_len": 128},
        {"mask": masks.SlidingWindow(999, 130).at(kv_offset=1), "q_len": 129, "kv_len": 128},
        {"mask": masks.Causal() & masks.SlidingWindow(7, 5)},
    ],
    ids=str,
)
def test_what_is_within_the_limits(options):
    assert _own(**options) == ""


@pytest.mark.parametrize(
    ("left", "right", "q_len", "kv_len"), [(3, 5, 9, 4), (0, 2, 12, 3), (2, 0, 4, 9), (99, 0, 5, 5), (1, 6, 3, 8)]
)
def test_what_a_band_leaves_visible_is_what_the_mask_says(left, right, q_len, kv_len):
    mask = masks.SlidingWindow(left, right).at(query_offset=kv_len - q_len)
    rows, slots = seen_by_band(_request(mask=mask, q_len=q_len, kv_len=kv_len))
    visible = np.broadcast_to(mask.materialize(q_len, kv_len), (1, 1, q_len, kv_len))[0, 0]
    np.testing.assert_array_equal(rows, visible.any(axis=1))
    np.testing.assert_array_equal(slots, visible.any(axis=0))


@pytest.mark.parametrize(
    ("versions", "code", "reason"),
    [
        (
            {"dew-flash-attn-cu13": None},
            RefusalCode.VENDOR_MISSING,
            "neither dew-flash-attn-cu13 nor dew-flash-attn-cu12 is installed",
        ),
        (
            {"dew-flash-attn-cu13": "0.4.0"},
            RefusalCode.VENDOR_VERSION,
            "dew-flash-attn-cu13 0.4.0 is not >=0.3.6,<0.4; pip install 'dew-flash-attn-cu13>=0.3.6,<0.4'",
        ),
        ({"dew-flash-attn-cu13": "0.3.5"}, RefusalCode.VENDOR_VERSION, "0.3.5 is not >=0.3.6,<0.4"),
        (
            {"jax-cuda13-plugin": None, "jax-cuda12-plugin": "0.12.0"},
            RefusalCode.VENDOR_MISSING,
            "dew-flash-attn-cu13 needs JAX for CUDA 13, and jax-cuda13-plugin is not installed; pip install "
            "'jax[cuda13]'",
        ),
        ({"jax": "0.10.2"}, RefusalCode.VENDOR_VERSION, "jax 0.10.2 < 0.11.2, which dew-flash-attn needs"),
    ],
)
def test_what_is_not_installed_or_of_another_release(versions, code, reason):
    environment = Environment(versions=tuple((dict(FINE) | versions).items()))
    found = DEW_FLASH.refusals(_request(), environment)
    assert [refusal.code for refusal in found] == [code]
    assert reason in str(found[0])
    assert found[0].remedy.startswith("pip install")


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"dew-flash-attn-cu13": "0.3.9"},
        {"dew-flash-attn-cu13": None, "dew-flash-attn-cu12": "0.3.6", "jax-cuda12-plugin": "0.11.2", "jax": "0.11.2"},
    ],
    ids=str,
)
def test_either_wheel_is_enough(versions):
    environment = Environment(versions=tuple((dict(FINE) | versions).items()))
    assert DEW_FLASH.refusals(_request(), environment) == ()


def test_python_is_named_where_no_wheel_can_be_installed():
    environment = Environment(versions=(*FINE[2:], ("jax", "0.12.0"), ("dew-flash-attn-cu13", None)))
    with mock.patch.object(sys, "version_info", (3, 11, 9)):
        [refusal] = DEW_FLASH.refusals(_request(), environment)
    assert "they need jax 0.11.2 and so Python 3.12, found 3.11" in refusal.detail


@pytest.mark.parametrize(("capability", "served"), [("8.6", True), ("8.9", True), ("12.0", True), ("12.1", False)])
def test_a_gpu_without_a_name_here_is_asked_itself(capability, served):
    import jax

    device = mock.Mock(compute_capability=capability)
    with mock.patch.object(jax, "devices", return_value=[device]):
        reason = devices.why_not_on_this_device()
    assert reason == (None if served else f"this GPU is of compute capability {capability}")


def test_auto_chooses_it_only_where_it_is_named_or_experiments_are_wanted():
    explained = kernelry.explain(_request())
    assert explained.plan.kernel.name != "dew_flash"
    assert "dew_flash" in str(explained)
    assert "numbers on a GPU are unproven" in str(explained)
    assert _explained(policy=None).plan.kernel.name == "dew_flash"
    [reservation] = DEW_FLASH.reservations(_request())
    assert reservation.code is RefusalCode.EXPERIMENTAL


UNIMPORTED = """
import sys, kernelry
from kernelry.plugin import Request
assert "dew_flash" in {kernel.name for kernel in kernelry.kernels()}
print(kernelry.explain(Request(q_len=128, head_dim=64, dtype="bfloat16", target="gpu:a100"), kernel="dew_flash"))
assert not any(name.startswith(("dew_flash_attn", "fa4_jax", "cutejax")) for name in sys.modules)
"""


def test_listing_and_explaining_import_no_vendor():
    subprocess.run([sys.executable, "-c", UNIMPORTED], check=True, capture_output=True)
