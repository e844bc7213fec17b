"""Requests are values: equal, hashable, serialisable, and strict about what they are given."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelry import Mode, Request, Target, masks
from kernelry.errors import ArgumentError, ConfigError
from kernelry.request.request import Operand

MASKS = [
    masks.Full(),
    masks.Causal().at(query_offset=3),
    masks.SlidingWindow(2).at(query_offset=3) & masks.Lengths(np.array([1])),
    ~masks.Causal().at(query_offset=1) | masks.Full(),
]
requests = st.builds(
    Request,
    target=st.sampled_from(["cpu", "gpu:h100", "tpu:v5e:2x2"]),
    mode=st.sampled_from(Mode),
    batch=st.integers(0, 4),
    q_len=st.integers(0, 4096),
    kv_len=st.none() | st.integers(0, 4096),
    q_heads=st.sampled_from([1, 8]),
    kv_heads=st.sampled_from([None, 1]),
    head_dim=st.integers(1, 256),
    value_dim=st.none() | st.integers(1, 256),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    mask=st.sampled_from(MASKS),
    scale=st.none() | st.floats(0.1, 2),
    bias=st.none() | st.just((1, 1, 1, 1)),
    soft_cap=st.none() | st.floats(1, 50),
    bias_after_cap=st.booleans(),
    gradients=st.none() | st.sets(st.sampled_from(["query", "key"])),
)


@given(requests, st.sampled_from([{}, {"sinks": True}, {"partial": True}]))
def test_requests_survive_json(request, more):
    request = dataclasses.replace(request, **more)
    again = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert again == request
    assert hash(again) == hash(request)


def test_missing_facts_follow_from_the_others():
    request = Request(q_len=8, q_heads=4, head_dim=16)
    assert (request.kv_len, request.kv_heads, request.value_dim, request.scale) == (8, 4, 16, 0.25)


CAPPED_BIAS = {"soft_cap": 5.0, "bias": (1, 1, 1, 1), "bias_after_cap": True}


@pytest.mark.parametrize("absent", ["soft_cap", "bias"])
def test_without_cap_or_bias_there_is_no_order_of_the_two(absent):
    assert Request(q_len=8, **CAPPED_BIAS).bias_after_cap
    request = Request(q_len=8, **{**CAPPED_BIAS, absent: None})
    assert not request.bias_after_cap
    assert request == Request(q_len=8, **{**CAPPED_BIAS, absent: None, "bias_after_cap": False})
    assert not dataclasses.replace(Request(q_len=8, **CAPPED_BIAS), **{absent: None}, gradients=()).bias_after_cap


@pytest.mark.parametrize("value", ["yes", 1, None, np.True_])
def test_the_order_of_cap_and_bias_must_be_a_bool_whether_it_matters_or_not(value):
    for facts in ({}, CAPPED_BIAS):
        with pytest.raises(ArgumentError, match="bias_after_cap must be True or False, got"):
            Request(q_len=8, **{**facts, "bias_after_cap": value})


def test_json_written_before_a_field_was_added_is_read():
    request = Request(q_len=8, **{**CAPPED_BIAS, "bias_after_cap": False})
    written = request.to_json()
    assert written.pop("bias_after_cap") is False
    assert Request.from_json(written) == request


@pytest.mark.parametrize(
    ("facts", "gradients"),
    [
        ({}, {"query", "key", "value"}),
        ({"sinks": True, "bias": (1, 1, 1, 1)}, {"query", "key", "value", "bias", "sinks"}),
        ({"mode": "prefill"}, set()),
        ({"mode": "autoregressive"}, set()),
        ({"gradients": ["bias"]}, {"bias"}),
    ],
)
def test_gradients_default_by_mode(facts, gradients):
    assert {operand.value for operand in Request(q_len=8, **facts).gradients} == gradients


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"mode": "trian"}, "did you mean 'train'"),
        ({"gradients": ["querry"]}, "did you mean 'query'"),
        ({"mask": "causal"}, "mask must be a kernelry mask"),
        ({"q_heads": 3, "kv_heads": 2}, "kv_heads=2 must divide q_heads=3"),
        ({"kv_len": -1}, "must not be negative"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(facts, complaint):
    with pytest.raises(ArgumentError, match=complaint):
        Request(q_len=8, **facts)


def test_json_with_an_unknown_field_is_an_error():
    with pytest.raises(ConfigError, match="did you mean 'q_len'"):
        Request.from_json({"q_ln": 3})


def test_text_shows_every_unusual_field():
    text = str(Request(q_len=8, soft_cap=5.0, sinks=True, q_heads=4, kv_heads=2, scale=1.0, gradients={Operand.KEY}))
    for part in ("soft_cap=5.0", "sinks=True", "K=2", "scale=1.0", "gradients=key", "mask=full"):
        assert part in text
    assert "soft_cap=5.0 bias_after_cap=True" in str(Request(q_len=8, **CAPPED_BIAS))
    assert "bias_after_cap" not in text


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("cpu", Target("cpu")),
        ("cuda:h100", Target("gpu", "h100")),
        ("gpu:NVIDIA H100 80GB HBM3", Target("gpu", "h100")),
        ("tpu:TPU v5 lite", Target("tpu", "v5e")),
        ("tpu:v5e:2x2", Target("tpu", "v5e", "2x2")),
        ("tpu:TPU v4", Target("tpu", "v4")),
    ],
)
def test_targets_are_read_with_aliases(text, target):
    assert Target.parse(text) == target


@pytest.mark.parametrize("target", ["cpu", "gpu:a100", "tpu:v6e", "tpu:v5p:2x2x1"])
def test_targets_print_as_they_are_read(target):
    assert str(Target.parse(target)) == target


@pytest.mark.parametrize(
    ("kind", "name", "generation"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100", 80),
        ("NVIDIA H200", "h200", 90),
        ("NVIDIA B200", "b200", 100),
        ("NVIDIA L40S", "l40s", 89),
        ("NVIDIA GeForce RTX 5090", "rtx5090", 120),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", "nvidia-geforce-rtx-5090-laptop-gpu", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000", 120),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtxpro6000", 120),
        ("NVIDIA RTX 6000 Ada Generation", "nvidia-rtx-6000-ada-generation", None),
        ("Tesla V100-SXM2-16GB", "v100", 70),
        ("Tesla T4", "t4", 75),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090", None),
    ],
)
def test_gpus_are_recognised_by_jaxs_names(kind, name, generation):
    target = Target.of_device("gpu", kind)
    assert (target.kind, target.generation) == (name, generation)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)
def test_tpus_are_recognised_by_jaxs_names(kind, name):
    assert Target.of_device("tpu", kind).kind == name


@pytest.mark.parametrize(("text", "near"), [("gpux", "'gpu'"), ("gpu:h10", "'h100'"), ("tpu:v5x", "'v5")])
def test_unknown_targets_name_the_nearest(text, near):
    with pytest.raises(ConfigError, match=near):
        Target.parse(text)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"dropout_rate": 2.0}, r"dropout_rate must be in \[0, 1\)"),
        ({"dropout_rate": -0.1}, r"dropout_rate must be in \[0, 1\)"),
        ({"soft_cap": 0.0}, "soft_cap must be positive"),
        ({"soft_cap": float("nan")}, "soft_cap must be a finite number"),
        ({"sinks": True, "partial": True}, "pass them to kernelry.finalize"),
        ({"page_size": 3}, "page_size must be a positive integer that divides kv_len=8, got 3"),
        ({"page_size": 0}, "got 0"),
        ({"page_size": 4.0}, "got 4.0"),
        ({"page_size": True}, "got True"),
        ({"kv_quantization": "int3"}, "unknown dtype 'int3'"),
        ({"kv_quantization": 8}, "written like 'int8'"),
        ({"kv_quantization": "int8", "gradients": ["key"]}, "gradients names key, but keys and values are quantised"),
        (
            {"page_size": 4, "gradients": ["value", "key"]},
            "gradients names key, value, but keys and values are in pages",
        ),
    ],
)
def test_facts_that_mean_nothing_are_errors(facts, message):
    with pytest.raises(ArgumentError, match=message):
        Request(q_len=8, **facts)


HELD = [
    {"kv_quantization": "int8:head_dim"},
    {"kv_quantization": "int4:heads_and_head_dim", "page_size": 4},
    {"page_size": 8, "mode": Mode.DECODE},
]


@pytest.mark.parametrize("facts", HELD)
def test_held_keys_survive_json_and_tell_requests_apart(facts):
    request = Request(q_len=8, q_heads=4, **facts)
    again = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert (again, hash(again)) == (request, hash(request))
    assert request != Request(q_len=8, q_heads=4, mode=request.mode)
    for name in facts.keys() - {"mode"}:
        assert f"{name}={facts[name]}" in str(request)


@pytest.mark.parametrize("facts", HELD[:2])
def test_held_keys_have_no_gradient_by_default(facts):
    request = Request(q_len=8, q_heads=4, bias=(1, 1, 1, 1), **facts)
    assert request.gradients == {Operand.QUERY, Operand.BIAS}
    assert not request.has_plain_kv


def test_a_quantization_is_kept_in_full_and_with_one_head_under_one_name():
    assert Request(q_len=8, kv_heads=2, q_heads=2, kv_quantization="int8").kv_quantization == "int8:head_dim"
    for way in ("int8", "int8:heads_and_head_dim"):
        assert Request(q_len=8, kv_heads=1, kv_quantization=way).kv_quantization == "int8:head_dim"


@pytest.mark.parametrize("name", ["dtype", "logits_dtype"])
@pytest.mark.parametrize("text", ["many", "f4", "", "("])
def test_what_is_no_name_of_a_dtype_is_an_error(name, text):
    instead = "; write 'float32'" if text == "f4" else ""
    with pytest.raises(ArgumentError) as caught:
        Request(q_len=8, **{name: text})
    assert str(caught.value) == f"{name} must be the name of a dtype, e.g. bfloat16, got {text!r}{instead}."


def test_a_plain_request_is_written_without_what_it_does_not_ask_for():
    assert str(Request(q_len=8, q_heads=2, head_dim=4, target="cpu")) == (
        "platform=cpu mode=train B=1 T=8 S=8 N=2 H=4 dtype=float32 mask=full"
    )


@pytest.mark.parametrize("runs", [[3], [[3]], [["a", "b"]], [[[0, 5]]]])
def test_json_with_static_positions_that_are_none_is_an_error(runs):
    data = Request(q_len=8, mask=masks.Causal().at(query_positions=np.arange(8)[::-1])).to_json()
    data["mask"][0]["query"]["value"] = runs
    with pytest.raises(ConfigError, match="cannot be read from"):
        Request.from_json(data)
