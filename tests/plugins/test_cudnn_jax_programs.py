"""cudnn_jax lowered for CUDA: which call with which operands and attributes each request becomes.

JAX's version check is patched; the programs run nowhere.
"""

import functools
import json
import re

import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

import kernelry
from kernelry import masks

BIAS = (1, 4, 128, 128)
LENGTHS = np.array([100, 7], np.int32)


@pytest.fixture(autouse=True)
def patched_cudnn():
    with cudnn_stand_in.cudnn():
        yield


@pytest.fixture
def arrays(make_arrays):
    return functools.partial(make_arrays, 128, dtype="bfloat16", heads=4, kv_heads=2, head_dim=64, batch=2)


def _attend(**options):
    def attend(query, key, value, *bias):
        extra = {"bias": bias[0]} if bias else {}
        return kernelry.attention(query, key, value, kernel="cudnn_jax", **extra, **options)

    return attend


def _bias(shape=BIAS, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def _gradient(function, operands=3):
    def loss(*arrays):
        out = function(*arrays)
        return getattr(out, "out", out).astype(jnp.float32).sum()

    return jax.grad(loss, tuple(range(operands)))


def _calls(lowered):
    """Each call of cuDNN: its name, its operands' types and its configuration, in the program's order."""
    found = re.findall(
        r'stablehlo\.custom_call @__cudnn\$(\w+)\(.*?backend_config = "((?:[^"\\]|\\.)*)".*? : \((.*?)\) ->',
        lowered.as_text(),
    )
    return [
        (name, types.replace("tensor<", "").replace(">", "").split(", "), _read(text)) for name, text, types in found
    ]


def _read(text):
    text = re.sub(r"\\([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), text)
    return json.loads(text.replace("\\", ""))["cudnn_fmha_backend_config"]


FORMS = [
    (masks.Full(), "NO_MASK", 0),
    (masks.Causal(), "CAUSAL", 0),
    (masks.Causal().at(query_offset=9, kv_offset=9), "CAUSAL", 0),
    (masks.SlidingWindow(40), "CAUSAL", 41),
    (masks.SlidingWindow(0), "CAUSAL", 1),
    (masks.SlidingWindow(127), "CAUSAL", 0),
    (masks.SlidingWindow(2**31 - 1), "CAUSAL", 0),
    (masks.Causal() & masks.SlidingWindow(40, 5), "CAUSAL", 41),
    (masks.Lengths(LENGTHS), "PADDING", 0),
    (masks.Lengths(LENGTHS, LENGTHS), "PADDING", 0),
    (masks.Lengths(50), "PADDING", 0),
    (masks.Lengths(LENGTHS) & masks.Lengths(50), "PADDING", 0),
    (masks.Causal() & masks.Lengths(LENGTHS), "PADDING_CAUSAL", 0),
    (masks.SlidingWindow(40) & masks.Lengths(LENGTHS), "PADDING_CAUSAL", 41),
]


@pytest.mark.parametrize(("mask", "mask_type", "window"), FORMS, ids=[str(mask) for mask, _, _ in FORMS])
def test_masks_reach_both_calls(mask, mask_type, window, arrays, lower):
    resolutions, lowered = lower(_gradient(_attend(mask=mask, scale=0.25)), arrays()[:3], "gpu:h100")
    resolutions[0].verify(lowered)
    calls = _calls(lowered)
    assert [name for name, _, _ in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, operands, configuration in calls:
        assert configuration["mask_type"] == mask_type
        assert configuration["sliding_window_length"] == window
        assert configuration["fmha_scale"] == 0.25
        assert configuration["dropout_rate"] == 0
        assert configuration["max_seg_per_batch"] == 1
        assert configuration["is_paged_attention"] is False
        assert operands.count("2xi32") == (2 if "PADDING" in mask_type else 0)


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal(), masks.SlidingWindow(40)], ids=str)
def test_masks_without_lengths_need_no_adapter(mask, arrays, lower):
    resolutions, _ = lower(_attend(mask=mask), arrays()[:3], "gpu:h100")
    assert resolutions[0].plan.steps == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_bias_of_every_breadth_reaches_both_calls(shape, dtype, arrays, lower):
    bias = _bias((*shape, 128, 128), dtype)
    operands = (*arrays(dtype=dtype)[:3], bias)
    resolutions, lowered = lower(_gradient(_attend(mask=masks.Causal()), 4), operands, "gpu:h100")
    resolutions[0].verify(lowered)
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    kind = f"{shape[0]}x{shape[1]}x128x128x{short}"
    calls = _calls(lowered)
    assert [name for name, _, _ in calls] == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    assert [operands.count(kind) for _, operands, _ in calls] == [1, 1]
    assert f"tensor<{kind}>" in re.search(r"fmhaScaleBiasSoftmaxBackward.*->(.*)", lowered.as_text())[1]


def test_a_constant_bias_has_no_gradient_where_the_backward_is_ours(arrays, lower):
    attend = _attend(mask=masks.Lengths(LENGTHS), gradients=("query", "key", "value"))
    bias = _bias()
    _, lowered = lower(_gradient(lambda *qkv: attend(*qkv, bias)), arrays()[:3], "gpu:h100")
    _, backward = re.search(r"fmhaScaleBiasSoftmaxBackward(.*)->(.*)", lowered.as_text()).groups()
    assert "4x128x128" not in backward


def test_sinks_need_one_forward_and_one_backward(arrays, lower):
    sinks = jnp.zeros(4, jnp.bfloat16)
    _, lowered = lower(_gradient(_attend(mask=masks.Causal(), sinks=sinks)), arrays()[:3], "gpu:h100")
    (_, forward, _), (_, backward, _) = _calls(lowered)
    assert len(forward) == 3
    assert backward[3] == "2x4x128xf32"  # the logsumexp


def test_statistics_stay_float32(arrays, lower):
    attend = _attend(mask=masks.Causal(), mode="prefill", return_partial=True)
    _, lowered = lower(attend, arrays()[:3], "gpu:h100")
    assert "tensor<2x4x128xf32>" in re.search(r"@__cudnn.*->(.*)", lowered.as_text())[1]
    assert lowered.out_info.lse.dtype == jnp.float32
    assert lowered.out_info.lse.shape == (2, 4, 128)


def test_prefill_asks_for_no_statistics(arrays, lower):
    _, lowered = lower(_attend(mask=masks.Causal(), mode="prefill"), arrays()[:3], "gpu:h100")
    assert "128xf32" not in re.search(r"@__cudnn.*->(.*)", lowered.as_text())[1]


DIRECT = [
    (masks.Full(), {}),
    (masks.Causal(), {"is_causal": True}),
    (masks.SlidingWindow(40), {"is_causal": True, "local_window_size": (40, 0)}),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("mask", "options"), DIRECT, ids=[str(mask) for mask, _ in DIRECT])
def test_program_equals_that_of_jax_nn(mask, options, with_bias, arrays, lower):
    operands = (*arrays()[:3], *([_bias()] if with_bias else []))
    direct = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", **options)

    def program(function):
        return lower(_gradient(function, len(operands)), operands, "gpu:h100")[1].as_text()

    assert program(_attend(mask=mask)) == program(direct)


def test_program_with_lengths_has_the_calls_of_jax_nn(arrays, lower):
    """Core's adapters stand around them, so the rest of the program differs."""
    direct = functools.partial(
        jax.nn.dot_product_attention,
        implementation="cudnn",
        is_causal=True,
        query_seq_lengths=jnp.asarray(LENGTHS),
        key_value_seq_lengths=jnp.asarray(LENGTHS),
    )
    ours = _attend(mask=masks.Causal() & masks.Lengths(LENGTHS, LENGTHS))
    found, wanted = (_calls(lower(_gradient(f), arrays()[:3], "gpu:h100")[1]) for f in (ours, direct))
    assert [name for name, _, _ in found] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert found == wanted


def test_latent_attention_has_the_calls_of_the_lower_level_function(arrays, lower):
    operands = arrays(head_dim=192, value_dim=128)[:3]
    direct = functools.partial(dot_product_attention, scale=192**-0.5, mask_type=MaskType.CAUSAL)

    def program(function):
        return lower(_gradient(function), operands, "gpu:h100")[1].as_text()

    assert program(_attend(mask=masks.Causal())) == program(direct)


def test_unequal_lengths_reach_the_call(arrays, lower):
    resolutions, lowered = lower(_attend(mask=masks.Full(), mode="prefill"), arrays(kv_len=256)[:3], "gpu:h100")
    (call,) = _calls(lowered)
    assert call[1] == ["2x128x4x64xbf16", "2x256x2x64xbf16", "2x256x2x64xbf16"]
    assert resolutions[0].plan.steps == ()
