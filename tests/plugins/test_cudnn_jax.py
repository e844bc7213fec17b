"""cudnn_jax: what it refuses, and its programs lowered for CUDA.

cuDNN has no interpret mode: no number of this kernel is tested here. The version check is patched
for lowering, which proves which call with which arguments the program holds.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks
from kernelry.environment import Environment
from kernelry.request import Request
from kernelry_cudnn_te.plugin import why_not_here

FUSED_ATTENTION = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.fixture
def patched_cudnn(monkeypatch):
    monkeypatch.setattr(f"{FUSED_ATTENTION}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{FUSED_ATTENTION}.check_compute_capability", lambda _: True)


def _attend(**options):
    def attend(query, key, value):
        return kernelry.attention(query, key, value, kernel="cudnn_jax", **options)

    return attend


def _configuration(lowered):
    """The call's configuration, as JSON in the program."""
    found = re.search(r'backend_config = "((?:[^"\\]|\\.)*)"', lowered.as_text())
    text = re.sub(r"\\([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), found[1])
    return json.loads(text.replace("\\", ""))["cudnn_fmha_backend_config"]


@pytest.mark.usefixtures("patched_cudnn")
@pytest.mark.parametrize(
    ("mask", "mask_type", "window"),
    [(masks.Full(), "NO_MASK", 0), (masks.Causal(), "CAUSAL", 0), (masks.SlidingWindow(40), "CAUSAL", 41)],
    ids=str,
)
def test_masks_reach_the_call(mask, mask_type, window, make_arrays, lower):
    arrays = make_arrays(dtype="bfloat16", heads=4, kv_heads=2)[:3]
    resolutions, lowered = lower(_attend(mask=mask, scale=0.25), arrays, "gpu:h100")
    resolutions[0].verify(lowered)
    configuration = _configuration(lowered)
    assert configuration["mask_type"] == mask_type
    assert configuration["sliding_window_length"] == window
    assert configuration["fmha_scale"] == 0.25
    assert resolutions[0].plan.steps == ()


@pytest.mark.usefixtures("patched_cudnn")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_is_the_backward_call(dtype, make_arrays, lower):
    def loss(*arrays):
        return _attend(mask=masks.Causal())(*arrays).astype(jnp.float32).sum()

    arrays = make_arrays(dtype=dtype, heads=4, kv_heads=2)[:3]
    _, lowered = lower(jax.grad(loss, (0, 1, 2)), arrays, "gpu:h100")
    text = lowered.as_text()
    assert text.count("stablehlo.custom_call @__cudnn$fmhaSoftmax(") == 1
    assert text.count("stablehlo.custom_call @__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.usefixtures("patched_cudnn")
def test_program_equals_the_direct_call(make_arrays, lower):
    def direct(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    arrays = make_arrays(dtype="bfloat16", head_dim=64)[:3]

    def program(function):
        gradient = jax.grad(lambda *arrays: function(*arrays).astype(jnp.float32).sum(), (0, 1, 2))
        return lower(gradient, arrays, "gpu:h100")[1].as_text()

    assert program(_attend(mask=masks.Causal())) == program(direct)


def _explained(environment=None, **options):
    facts = {"target": "gpu:h100", "q_len": 128, "head_dim": 64, "dtype": "bfloat16", **options}
    return str(kernelry.explain(Request(**facts), kernel="cudnn_jax", policy=NO_ADAPTERS, environment=environment))


def test_right_window_is_refused_with_its_values():
    assert "window(40, 3) looks right=3 > 0 keys ahead" in _explained(mask=masks.SlidingWindow(40, 3))


def test_float32_is_refused():
    assert "dtype=float32 is not bfloat16 or float16" in _explained(dtype="float32")


def test_unequal_lengths_are_refused():
    assert "q_len=128 differs from kv_len=256" in _explained(kv_len=256)


def test_head_dim_of_no_multiple_of_eight_is_refused():
    assert "head_dim=77 is not a multiple of 8" in _explained(head_dim=77)


def test_large_head_dim_is_refused_before_hopper():
    assert "head_dim=256 > 128 on gpu:a100" in _explained(target="gpu:a100", head_dim=256)


def test_large_head_dim_on_an_unnamed_gpu_asks_for_its_name():
    assert "name the device, e.g. gpu:h100" in _explained(target="gpu", head_dim=256)


def test_large_head_dim_is_served_on_hopper():
    assert "→ cudnn_jax" in _explained(head_dim=256)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"soft_cap": 2.0}, "soft_cap=2.0 is not supported"),
        ({"sinks": True}, "sinks=True is not supported"),
        ({"partial": True, "gradients": ()}, "return_partial needs statistics"),
        ({"value_dim": 32}, "value_dim=32 differs from head_dim=64"),
        ({"mode": "decode"}, "mode=decode is not prefill or train"),
    ],
)
def test_what_is_not_declared_is_refused(options, reason):
    assert reason in _explained(**options)


def test_cpu_is_refused_even_in_interpret_mode():
    assert "platform=cpu is not gpu" in _explained(target="cpu", interpret=True)


def test_missing_gpu_is_found_at_home():
    text = _explained(environment=Environment())
    assert "JAX sees no CUDA device; install JAX with its CUDA libraries" in text


def _no_cudnn():
    raise RuntimeError("cuDNN is not detected.")


def test_missing_cudnn_is_found_at_home(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda _: [object()])
    monkeypatch.setattr(f"{FUSED_ATTENTION}.check_cudnn_version", _no_cudnn)
    assert why_not_here() == "JAX finds no cuDNN"


@pytest.mark.usefixtures("patched_cudnn")
def test_nothing_is_missing_where_both_are(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda _: [object()])
    assert why_not_here() is None


def test_foreign_target_is_assumed_to_have_cudnn():
    assert "vendor: assumed" in _explained()
