"""Every limit of cudnn_jax: refused with its value before anything is traced, or cured by an adapter."""

import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks
from kernelry.kernel.spec import Environment, Knowledge, _answer
from kernelry.plugin import RefusalCode
from kernelry.request.request import Request
from kernelry_cudnn_te.cudnn_jax import probes
from kernelry_cudnn_te.plugin import CUDNN_JAX

FUSED_ATTENTION = "jax._src.cudnn.fused_attention_stablehlo"


def _explained(environment=None, policy=NO_ADAPTERS, **options):
    return kernelry.explain(_request(**options), kernel="cudnn_jax", policy=policy, environment=environment)


def _request(**options):
    return Request(**{"target": "gpu:h100", "q_len": 128, "head_dim": 64, "dtype": "bfloat16", **options})


def _own(**options):
    """What the kernel adds, also where core has refused already and does not ask it."""
    return "; ".join(map(str, CUDNN_JAX.refusals(_request(**options), Environment(Knowledge.ASSUMED))))


def _adapters(**options):
    plan = _explained(policy=None, **options).plan
    return None if plan is None else {step.adapter.name for step in plan.steps}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16 or float16"),
        ({"head_dim": 77}, "head_dim=77 is not a multiple of 8"),
        ({"head_dim": 264}, "head_dim=264 > 256"),
        ({"head_dim": 4}, "head_dim=4 < 8"),
        (
            {"head_dim": 256, "target": "gpu:a100"},
            "head_dim=256 > 128 on gpu:a100; larger ones need compute capability",
        ),
        (
            {"head_dim": 136, "target": "gpu"},
            "head_dim=136 > 128 on gpu; larger ones need compute capability 9.0; name",
        ),
        ({"head_dim": 136, "target": "gpu:rtx5090", "gradients": frozenset()}, "head_dim=136 > 128 on gpu:rtx5090;"),
        (
            {"head_dim": 192, "value_dim": 128, "target": "gpu:rtxpro6000"},
            "value_dim=128 differs from head_dim=192 on gpu:rtxpro6000; that needs compute capability 9.0",
        ),
        ({"head_dim": 136, "target": "gpu:b200"}, "head_dim=136 > 128 on gpu:b200, with gradients; ask for none"),
        ({"target": "gpu:t4"}, "gpu:t4 is generation 75 < 80"),
        (
            {"value_dim": 32},
            "value_dim=32 differs from head_dim=64, and (head_dim, value_dim) = (192, 128) is the only",
        ),
        (
            {"head_dim": 192, "value_dim": 128, "target": "gpu:a100"},
            "value_dim=128 differs from head_dim=192 on gpu:a100; that needs compute capability 9.0",
        ),
        ({"q_len": 127}, "odd q_len=127, kv_len=127 with gradients; pad to 128, 128"),
        ({"kv_len": 65}, "odd kv_len=65 with gradients; pad to 66"),
    ],
)
def test_sizes_and_dtypes_beyond_the_limits(options, reason):
    assert reason in str(_explained(**options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": masks.SlidingWindow(40, 3)}, "window(40, 3) does not end at the query itself: right=3, not 0"),
        (
            {"mask": masks.Causal().at(query_offset=5)},
            "causal at query=5: cuDNN's diagonal starts at the first query and the first key; its lower-right form",
        ),
        ({"mask": masks.Causal().at(query_offset=np.int32([5, 7])), "batch": 2}, "has static positions"),
        (
            {"mask": masks.SlidingWindow(3).at(query_offset=0), "q_len": 256, "kv_len": 128},
            "q_len=256 > kv_len=128 under window(3, 0)",
        ),
        (
            {"mask": masks.Causal() & masks.SlidingWindow(4).at(query_offset=2, kv_offset=1)},
            "is more than one band",
        ),
        ({"mask": masks.Segments(np.zeros(128, int))}, "mask atom segments is not causal or lengths or window"),
        ({"mask": masks.Dense(np.ones((128, 128), bool))}, "mask atom dense is not causal or lengths or window"),
        ({"mask": masks.Chunked(16)}, "mask atom chunked(16) is not causal or lengths or window"),
        ({"mask": masks.Causal() | masks.Lengths(3)}, "is not causal or lengths or window"),
        ({"mask": masks.Lengths(3)}, "mask=lengths may leave rows that see no key; empty_rows_from_lse would help"),
        ({"mask": masks.Lengths(3)}, "mask=lengths may hide slots that hold NaN or inf; clean_hidden_slots would help"),
    ],
)
def test_masks_that_would_mean_something_else(options, reason):
    assert reason in str(_explained(**options)) + _own(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": (1, 1, 1, 128)}, "bias=(1, 1, 1, 128) lacks T or S; broadcast it to (1, 1, 128, 128)"),
        ({"bias": (1, 1, 128, 1)}, "bias=(1, 1, 128, 1) lacks T or S"),
        ({"bias": (1, 1, 127, 127), "q_len": 127}, "odd q_len=127, kv_len=127 with gradients"),
        (
            {"bias": (1, 1, 127, 128), "q_len": 127, "kv_len": 128, "mask": masks.Lengths(3), "gradients": ("key",)},
            "odd q_len=127 with gradients",
        ),
        (
            {"bias": (1, 1, 128, 128), "mask": masks.Lengths(3)},
            "no gradient of bias with lengths (mask=lengths); leave bias out of gradients= where it is constant",
        ),
    ],
)
def test_biases_that_cudnn_cannot_read(options, reason):
    assert reason in _own(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"soft_cap": 2.0}, "soft_cap=2.0 is not supported"),
        ({"sinks": True}, "sinks=True is not supported; sinks_from_lse would help"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 is not supported"),
        ({"logits_dtype": "bfloat16"}, "logits_dtype=bfloat16 is not supported"),
        ({"precision": "highest"}, "precision=highest is not supported"),
        ({"max_logits": True}, "max_logits=True is not supported"),
        ({"partial": True}, "no gradient through the lse of a Partial; lse_gradient_column would help"),
        ({"mode": "decode"}, "mode=decode is not prefill or train"),
        ({"target": "cpu", "interpret": True}, "platform=cpu is not gpu"),
        ({"kv_quantization": "int8:head_dim"}, "kv_quantization=int8:head_dim is not declared"),
        ({"page_size": 16}, "keys and values are in pages of page_size=16"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_what_is_not_declared(options, reason):
    assert reason in str(_explained(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 256},
        {"head_dim": 256, "target": "gpu:b200", "mode": "prefill"},
        {"head_dim": 192, "value_dim": 128},
        {"head_dim": 192, "value_dim": 128, "target": "gpu:b200"},
        {"target": "gpu:a100", "head_dim": 128},
        {"target": "gpu"},
        {"q_len": 127, "mode": "prefill"},
        {"kv_len": 256},
        {"kv_len": 256, "mask": masks.Causal().at(query_offset=0)},
        {"kv_len": 256, "mask": masks.SlidingWindow(3).at(query_offset=0), "mode": "prefill"},
        {"mask": masks.Causal().at(query_offset=7, kv_offset=7)},
        {"bias": (1, 1, 128, 128), "mask": masks.Causal()},
        {"q_heads": 8, "kv_heads": 2},
        {"partial": True, "mode": "prefill"},
    ],
)
def test_what_is_within_the_limits_needs_no_adapter(options):
    adapters = _adapters(**options)
    assert adapters is not None
    assert adapters <= {"clean_hidden_slots"}  # keys behind the last query, where S > T


@pytest.mark.parametrize(
    ("options", "adapters"),
    [
        ({"value_dim": 32}, {"pad_head_dim"}),
        ({"value_dim": 96}, {"pad_head_dim"}),
        ({"head_dim": 77}, {"pad_head_dim"}),
        ({"q_len": 127}, {"pad_sequence"}),
        ({"mask": masks.Lengths(3)}, {"empty_rows_from_lse", "clean_hidden_slots"}),
        ({"mask": masks.Lengths(3), "q_len": 127}, {"empty_rows_from_lse", "clean_hidden_slots"}),
        ({"sinks": True}, {"sinks_from_lse"}),
        ({"partial": True}, {"lse_gradient_column", "pad_head_dim"}),
    ],
)
def test_adapters_cure_the_rest(options, adapters):
    found = _adapters(**options)
    assert found is not None
    assert found >= adapters


def _refusal(code, **options):
    environment = options.pop("environment", Environment())
    refusals = CUDNN_JAX.refusals(_request(**options), environment)
    return str(next(refusal for refusal in refusals if refusal.code is code))


@pytest.fixture
def forgetful():
    """Nothing is remembered of the machine, before and after."""
    _answer.cache_clear()
    yield
    _answer.cache_clear()


@pytest.fixture
def device(monkeypatch, forgetful):
    """A GPU with the cuDNN that the function returned is given."""

    def set_version(version):
        def check():
            if version is None:
                raise RuntimeError("cuDNN is not detected.")
            return version

        monkeypatch.setattr(jax, "devices", lambda *_: [object()])
        monkeypatch.setattr(f"{FUSED_ATTENTION}.check_cudnn_version", check)

    return set_version


@pytest.mark.usefixtures("forgetful")
def test_jax_without_cuda_is_told_what_to_install():
    without = Environment(versions=(("jax-cuda12-plugin", None), ("jax-cuda13-plugin", None)))
    found = _refusal(RefusalCode.VENDOR_MISSING, environment=without)
    assert found == (
        "JAX sees no CUDA device: neither jax-cuda12-plugin nor jax-cuda13-plugin is installed; "
        'pip install "jax[cuda12]" (or "jax[cuda13]")'
    )


@pytest.mark.usefixtures("forgetful")
def test_cuda_without_a_device_is_told_where_to_look():
    installed = Environment(versions=(("jax-cuda12-plugin", "0.10.2"), ("jax-cuda13-plugin", None)))
    assert _refusal(RefusalCode.DRIVER, environment=installed) == (
        "JAX sees no CUDA device; run where nvidia-smi lists a GPU, and look at JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
    )


def test_missing_cudnn_is_told_what_brings_it(device):
    device(None)
    found = _refusal(RefusalCode.VENDOR_MISSING)
    assert found == 'JAX finds no cuDNN; pip install "jax[cuda12]" (or "jax[cuda13]"), which brings it'


@pytest.mark.parametrize(
    ("version", "options", "reason"),
    [
        (
            90800,
            {"head_dim": 192, "value_dim": 128},
            "value_dim=128 differs from head_dim=192, and cuDNN 9.8.0 < 9.10.0",
        ),
        (
            91000,
            {"bias": (1, 1, 128, 128), "mask": masks.SlidingWindow(3)},
            "bias with mask=window(3, 0), and cuDNN 9.10.0 < 9.10.2; pip install --upgrade nvidia-cudnn-cu12",
        ),
    ],
)
def test_old_cudnn_is_named_with_what_it_lacks(version, options, reason, device):
    device(version)
    assert reason in _refusal(RefusalCode.VENDOR_VERSION, **options)


def test_b300_with_an_old_cudnn_is_refused(device, monkeypatch):
    device(91002)
    monkeypatch.setattr(f"{FUSED_ATTENTION}.is_cuda_compute_capability_equal", lambda capability: capability == "10.3")
    assert "cuDNN 9.10.2 < 9.11.0 on compute capability 10.3" in _refusal(RefusalCode.VENDOR_VERSION)


@pytest.mark.parametrize(
    "options",
    [{}, {"head_dim": 192, "value_dim": 128}, {"bias": (1, 1, 128, 128), "mask": masks.SlidingWindow(3)}],
)
def test_nothing_is_missing_where_all_is_new(options, device):
    device(91800)
    assert CUDNN_JAX.refusals(_request(**options), Environment()) == ()


def test_foreign_target_is_assumed_to_have_cudnn():
    assert "vendor: assumed" in str(_explained())


def test_a_kernel_that_is_not_chosen_is_not_probed():
    with mock.patch.object(probes, "why_no_device", side_effect=AssertionError("probed")):
        request = Request(q_len=128, head_dim=64, dtype="bfloat16")
        assert kernelry.explain(request, environment=Environment()).kernel != "cudnn_jax"


def test_listing_explaining_and_refusing_import_no_vendor():
    code = (
        "import sys, kernelry, kernelry_cudnn_te.plugin\n"
        "kernelry.kernels()\n"
        "kernelry.explain(kernelry.Request(target='gpu:a100', q_len=128, head_dim=256, dtype='bfloat16'))\n"
        "assert 'kernelry_cudnn_te.cudnn_jax._vendor' not in sys.modules\n"
        "assert 'kernelry_cudnn_te.cudnn_jax.kernel' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
