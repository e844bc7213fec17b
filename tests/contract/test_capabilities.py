"""Every field of a Request is decided by one check, and declaring nothing refuses everything."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import Request, Target, masks
from kernelry.kernel.capabilities import CHECKS
from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Feature,
    Gradient,
    Mode,
    Operand,
    PositionKind,
    RefusalCode,
    Statistic,
)
from kernelry.request.request import NEUTRAL

LEAST = Capabilities(
    platforms=frozenset({"cpu"}),
    modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
    dtypes=frozenset({"float32"}),
    head_dims=Dims(),
    normalizations=frozenset({"softmax"}),
    gradient=Gradient.NATIVE,
    gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
)
"""Declares just enough for a plain request."""
PLAIN = Request(q_len=8, mode="train")
CAUSAL = masks.Causal()

# field: (a request that asks for it, what must be declared, the code of the refusal)
DEMANDS = {
    "target": ({"target": "gpu"}, {"platforms": {"gpu"}}, RefusalCode.PLATFORM),
    "interpret": ({"target": "tpu", "interpret": True}, {"platforms": {"tpu"}}, RefusalCode.PLATFORM),
    "mode": ({"mode": "decode"}, {"modes": {Mode.DECODE}}, RefusalCode.MODE),
    "dtype": ({"dtype": "bfloat16"}, {"dtypes": {"bfloat16"}}, RefusalCode.DTYPE),
    "value_dim": ({"value_dim": 32}, {"split_head_dim": True}, RefusalCode.SPLIT_HEAD_DIM),
    "q_heads": ({"q_heads": 4, "kv_heads": 2}, {"grouped_heads": True}, RefusalCode.HEAD_GROUPS),
    "kv_heads": ({"q_heads": 4, "kv_heads": 1}, {"grouped_heads": True}, RefusalCode.HEAD_GROUPS),
    "q_len": ({"kv_len": 16}, {"unequal_lengths": True}, RefusalCode.UNEQUAL_LENGTHS),
    "kv_len": (
        {"kv_len": 0},
        {"unequal_lengths": True, "empty_arrays": True, "empty_rows": True},
        RefusalCode.EMPTY_ARRAY,
    ),
    "batch": ({"batch": 0}, {"empty_arrays": True}, RefusalCode.EMPTY_ARRAY),
    "mask": ({"mask": CAUSAL}, {"atoms": {AtomKind.CAUSAL}}, RefusalCode.MASK_ATOM),
    "scale": ({"scale": 1.0}, {"features": {Feature.SCALE}}, RefusalCode.SCALE),
    "bias": (
        {"bias": (1, 1, 8, 8), "gradients": ["query"]},
        {"features": {Feature.BIAS}},
        RefusalCode.BIAS,
    ),
    "soft_cap": ({"soft_cap": 5.0}, {"features": {Feature.SOFT_CAP}}, RefusalCode.SOFT_CAP),
    "bias_after_cap": (
        {"bias_after_cap": True, "soft_cap": 5.0, "bias": (1, 1, 8, 8), "gradients": ["query"]},
        {"features": {Feature.BIAS, Feature.SOFT_CAP, Feature.BIAS_AFTER_CAP}},
        RefusalCode.BIAS_AFTER_CAP,
    ),
    "sinks": ({"sinks": True, "gradients": ["query"]}, {"features": {Feature.SINKS}}, RefusalCode.SINKS),
    "dropout_rate": ({"dropout_rate": 0.1}, {"features": {Feature.DROPOUT}}, RefusalCode.DROPOUT),
    "gradients": (
        {"gradients": ["bias"], "bias": (1, 1, 8, 8)},
        {"features": {Feature.BIAS}, "gradients": {Operand.BIAS}},
        RefusalCode.GRADIENT,
    ),
    "normalization": ({"normalization": "other"}, {"normalizations": {"other"}}, RefusalCode.NORMALIZATION),
    "logits_dtype": ({"logits_dtype": "bfloat16"}, {"features": {Feature.LOGITS_DTYPE}}, RefusalCode.LOGITS_DTYPE),
    "precision": ({"precision": "highest"}, {"features": {Feature.PRECISION}}, RefusalCode.PRECISION),
    "partial": ({"partial": True}, {"statistics": {Statistic.LSE}}, RefusalCode.STATISTICS),
    "max_logits": ({"max_logits": True}, {"features": {Feature.MAX_LOGITS}}, RefusalCode.MAX_LOGITS),
    "kv_quantization": (
        {"kv_quantization": "int8:head_dim"},
        {"kv_quantizations": {"int8:head_dim"}},
        RefusalCode.KV_QUANTIZATION,
    ),
    "context_parallel": (
        {"context_parallel": "ring:context:4"},
        {"context_parallel": {"ring"}},
        RefusalCode.CONTEXT_PARALLEL,
    ),
    "statistics": ({"statistics": True}, {"statistics": {Statistic.LSE}}, RefusalCode.STATISTICS),
    "page_size": ({"page_size": 4}, {"pages": True}, RefusalCode.PAGES),
    "kv_layout": ({"kv_layout": "value_in_key"}, {"kv_layouts": {"value_in_key"}}, RefusalCode.KV_LAYOUT),
    "head_dim": ({"head_dim": 48}, {"head_dims": Dims(multiple_of=16)}, RefusalCode.HEAD_DIM),
}
FIELDS = {field.name for field in dataclasses.fields(Request) if field.init}
OF_MESHES = {"sharding", "partitioned"}
"""No kernel is asked about a whole call that is cut; what XLA partitions is asked of kernels for TPUs alone."""


def _request(**facts):
    return Request(**{"q_len": 8, **facts})


def _with(declared):
    return dataclasses.replace(
        LEAST, **{name: frozenset(value) if isinstance(value, set) else value for name, value in declared.items()}
    )


def test_every_request_field_is_decided_by_exactly_one_check():
    decided = [field for check in CHECKS for field in check.fields]
    assert sorted(decided) == sorted(FIELDS)


def test_every_request_field_has_a_demand_below():
    assert set(DEMANDS) == FIELDS - OF_MESHES


def test_a_kernel_is_not_asked_about_a_whole_call_that_is_cut():
    [refusal] = LEAST.refusals(_request(batch=2, sharding="batch=d:2"))
    assert (refusal.code, refusal.detail) == (RefusalCode.SHARDING, "sharding=batch=d:2: ask about a shard of it")


def test_a_kernel_for_tpus_must_be_partitioned_by_xla_where_no_sharding_is_given():
    left_to_xla = _request(target="tpu", partitioned=True)
    alone = dataclasses.replace(LEAST, platforms=frozenset({"tpu"}))
    [refusal] = alone.refusals(left_to_xla)
    assert refusal.code is RefusalCode.SHARDING
    assert "kernelry.use(sharding=" in refusal.remedy
    assert dataclasses.replace(alone, partitioned_by_xla=True).refusals(left_to_xla) == ()
    anywhere = dataclasses.replace(
        LEAST, platforms=frozenset({"cpu", "tpu"})
    )  # XLA compiles it, for every device alike
    assert anywhere.refusals(left_to_xla) == ()


def test_neutral_values_are_listed_for_every_optional_field():
    assert all(getattr(PLAIN, name) == value for name, value in NEUTRAL.items())


def test_the_least_capabilities_serve_a_plain_request():
    assert LEAST.refusals(PLAIN) == ()


def test_declaring_nothing_refuses_a_plain_request():
    codes = {refusal.code for refusal in Capabilities().refusals(PLAIN)}
    wanted = {"PLATFORM", "MODE", "DTYPE", "HEAD_DIM", "NORMALIZATION", "GRADIENT"}
    assert codes == {RefusalCode[name] for name in wanted}


def test_a_kernel_of_caps_and_biases_must_declare_that_it_adds_the_bias_last():
    facts, declared, code = DEMANDS["bias_after_cap"]
    can = _with({"features": declared["features"] - {Feature.BIAS_AFTER_CAP}})
    [refusal] = can.refusals(_request(**facts))
    assert (refusal.code, refusal.detail) == (code, "bias_after_cap=True is not supported")
    for absent in ("bias", "soft_cap"):
        assert can.refusals(_request(**{**facts, absent: None})) == ()


@pytest.mark.parametrize("field", sorted(set(DEMANDS) - {"head_dim"}))
def test_an_undeclared_field_is_refused(field):
    facts, _, code = DEMANDS[field]
    assert code in {refusal.code for refusal in LEAST.refusals(_request(**facts))}


@pytest.mark.parametrize("field", sorted(DEMANDS))
def test_a_declared_field_is_served(field):
    facts, declared, _ = DEMANDS[field]
    assert _with(declared).refusals(_request(**facts)) == ()


@pytest.mark.parametrize(
    ("dims", "detail"),
    [
        (Dims(maximum=128), "head_dim=192 > 128"),
        (Dims(minimum=256), "head_dim=192 < 256"),
        (Dims(multiple_of=128), "head_dim=192 is not a multiple of 128"),
        (None, "no head_dim is declared"),
    ],
)
def test_head_dim_refusals_quote_values(dims, detail):
    [refusal] = dataclasses.replace(LEAST, head_dims=dims).refusals(_request(head_dim=192))
    assert refusal.detail == detail


def test_interpret_mode_must_be_declared():
    request = _request(interpret=True)
    gpu_only = dataclasses.replace(LEAST, platforms=frozenset({"gpu"}))
    assert RefusalCode.PLATFORM in {r.code for r in gpu_only.refusals(request)}
    assert dataclasses.replace(gpu_only, interpret=True).refusals(request) == ()


def test_a_platform_that_is_refused_has_no_generation():
    can = dataclasses.replace(LEAST, minimum_generation=(("gpu", 80),))
    refusals = can.refusals(dataclasses.replace(PLAIN, target=Target.parse("gpu:v100")))
    assert [refusal.code for refusal in refusals] == [RefusalCode.PLATFORM]


def test_an_old_device_generation_is_refused():
    can = dataclasses.replace(LEAST, platforms=frozenset({"gpu"}), minimum_generation=(("gpu", 80),))
    assert [r.code for r in can.refusals(_request(target="gpu:v100"))] == [RefusalCode.GENERATION]
    assert can.refusals(_request(target="gpu:h100")) == ()


@pytest.mark.parametrize(
    ("mask", "missing"),
    [
        (CAUSAL.at(query_offset=2), {RefusalCode.POSITIONS, RefusalCode.HIDDEN_SLOTS}),
        (CAUSAL.at(query_offset=-1), {RefusalCode.POSITIONS, RefusalCode.EMPTY_ROWS, RefusalCode.HIDDEN_SLOTS}),
        (
            CAUSAL.at(query_offset=jnp.int32(0)),
            {RefusalCode.POSITIONS, RefusalCode.EMPTY_ROWS, RefusalCode.HIDDEN_SLOTS},
        ),
        (~CAUSAL, {RefusalCode.MASK_ATOM, RefusalCode.EMPTY_ROWS, RefusalCode.HIDDEN_SLOTS}),
        (masks.Lengths(np.array([1])), {RefusalCode.MASK_ATOM, RefusalCode.EMPTY_ROWS, RefusalCode.HIDDEN_SLOTS}),
    ],
)
def test_what_a_mask_may_do_to_rows_and_slots_must_be_declared(mask, missing):
    kv_len = 10 if mask == CAUSAL.at(query_offset=2) else None
    can = dataclasses.replace(LEAST, atoms=frozenset({AtomKind.CAUSAL}), unequal_lengths=True)
    if missing == {RefusalCode.POSITIONS, RefusalCode.HIDDEN_SLOTS}:
        missing = {RefusalCode.POSITIONS}  # positions 2 … 9 over keys 0 … 9: all rows and slots are in use
    assert {r.code for r in can.refusals(_request(mask=mask, kv_len=kv_len))} == missing


def test_declared_positions_are_served():
    can = dataclasses.replace(
        LEAST,
        atoms=frozenset({AtomKind.CAUSAL}),
        positions=frozenset({PositionKind.TRACED}),
        empty_rows=True,
        clean_hidden_slots=True,
    )
    assert can.refusals(_request(mask=CAUSAL.at(query_offset=jnp.int32(1)))) == ()


def test_no_gradient_through_statistics_without_lse_cotangent():
    backward = dataclasses.replace(LEAST, gradient=Gradient.BACKWARD, statistics=frozenset({Statistic.LSE}))
    assert [r.code for r in backward.refusals(_request(partial=True))] == [RefusalCode.STATISTICS_GRADIENT]
    assert backward.refusals(_request(partial=True, mode="prefill")) == ()
    assert dataclasses.replace(backward, lse_cotangent=True).refusals(_request(partial=True)) == ()
