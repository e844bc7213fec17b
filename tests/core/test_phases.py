"""Training, prefill and decode of one model, resolved together."""

import dataclasses
import json

import pytest

import kernelry
from kernelry import ModelShape, resolve_phases
from kernelry.config import AttentionConfig, MoBA
from kernelry.errors import ArgumentError, ConfigError
from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Feature,
    Gradient,
    Kernel,
    KernelSpec,
    Mode,
    Operand,
    PositionKind,
    Statistic,
)

SHAPE = ModelShape(q_len=64, max_len=128, batch=2, q_heads=4, kv_heads=2, head_dim=32, dtype="float32")
PLAIN = Capabilities(
    platforms=frozenset({"cpu"}),
    modes=frozenset(Mode),
    dtypes=frozenset({"float32"}),
    head_dims=Dims(maximum=128),
    atoms=frozenset({AtomKind.CAUSAL}),
    normalizations=frozenset({"softmax"}),
    gradient=Gradient.NATIVE,
    gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
    features=frozenset({Feature.SCALE}),
)
STEP = {
    "atoms": frozenset({AtomKind.CAUSAL, AtomKind.LENGTHS}),
    "positions": frozenset(PositionKind),
    "unequal_lengths": True,
    "empty_rows": True,
    "clean_hidden_slots": True,
}


def _spec(name, **changes):
    return KernelSpec(
        name=name, capabilities=dataclasses.replace(PLAIN, **changes), load=Kernel, signature=lambda _: ("x",)
    )


def test_the_three_phases_ask_what_a_model_asks():
    phases = resolve_phases(AttentionConfig(dropout_rate=0.5, sinks=True), SHAPE)
    train, prefill, decode = (resolution.request for resolution in phases.all)
    assert [(r.mode, r.q_len, r.kv_len) for r in (train, prefill, decode)] == [
        (Mode.TRAIN, 64, 64),
        (Mode.PREFILL, 64, 64),
        (Mode.DECODE, 1, 128),
    ]
    assert (train.dropout_rate, prefill.dropout_rate, decode.dropout_rate) == (0.5, 0.0, 0.0)
    assert Operand.SINKS in train.gradients
    assert not prefill.gradients | decode.gradients
    assert {atom.kind for atom in decode.mask.atoms} == {AtomKind.CAUSAL, AtomKind.LENGTHS}
    assert "traced" in str(decode.mask)


def test_a_plain_model_agrees():
    assert resolve_phases(AttentionConfig(), SHAPE).disagreements == ()


def test_a_phase_that_no_kernel_serves_is_named_with_reasons():
    trained = _spec("trained", modes=frozenset({Mode.TRAIN, Mode.PREFILL}))
    phases = resolve_phases(AttentionConfig(kernel="trained"), SHAPE, kernels=(trained,))
    assert phases.decode.plan is None
    assert len(phases.disagreements) == 1
    assert phases.disagreements[0].startswith("decode: no kernel serves it (trained: mode=decode")


def test_a_cache_that_decode_repeats_and_prefill_does_not_is_named():
    grouped = _spec("grouped", modes=frozenset({Mode.TRAIN, Mode.PREFILL}), grouped_heads=True)
    single = _spec("single", modes=frozenset({Mode.DECODE}), **STEP)
    phases = resolve_phases(AttentionConfig(), SHAPE, kernels=(grouped, single))
    assert phases.decode.kernel == "single"
    [text] = phases.disagreements
    assert "prefill reads kv_heads=2 (grouped)" in text
    assert "decode kv_heads=4 (single through repeat_kv_heads" in text


def test_parts_of_a_cache_return_statistics_and_leave_sinks_to_the_end():
    phases = resolve_phases(AttentionConfig(sinks=True), dataclasses.replace(SHAPE, two_part=True))
    assert phases.train.request.sinks
    for resolution in (phases.prefill, phases.decode):
        assert (resolution.request.partial, resolution.request.sinks) == (True, False)
        assert Statistic.LSE in resolution.plan.kernel.capabilities.statistics
    assert phases.disagreements == ()


def test_a_kernel_without_statistics_does_not_serve_parts():
    phases = resolve_phases(AttentionConfig(), dataclasses.replace(SHAPE, two_part=True), kernels=(_spec("bare"),))
    assert any(text.startswith("prefill: no kernel serves it (bare: return_partial") for text in phases.disagreements)


@pytest.mark.parametrize("options", [{"type": "full"}, {"type": "block_diffusion", "block_size": 8}])
def test_masks_that_look_ahead_mean_something_else_in_decode(options):
    found = resolve_phases(AttentionConfig(**options), SHAPE).disagreements
    assert any(text.startswith("mask meaning") and options["type"] in text for text in found)


def test_chosen_blocks_are_asked_for_in_every_phase():
    phases = resolve_phases(AttentionConfig(moba=MoBA(16, 2)), SHAPE)
    for resolution in phases.all:
        assert AtomKind.BLOCK_SELECTION in {atom.kind for atom in resolution.request.mask.atoms}


def test_another_target_is_answered_for():
    assert str(resolve_phases(AttentionConfig(), SHAPE, target="tpu:v5e").train.request.target) == "tpu:v5e"
    with kernelry.use(target="gpu:h100"):
        assert str(resolve_phases(AttentionConfig(), SHAPE).decode.request.target) == "gpu:h100"
    with pytest.raises(ConfigError, match="unknown platform"):
        resolve_phases(AttentionConfig(), SHAPE, target="tqu")


def test_phases_are_text_and_json():
    phases = resolve_phases(AttentionConfig(type="full"), SHAPE)
    assert "disagreement: mask meaning" in str(phases)
    data = json.loads(json.dumps(phases.to_json()))
    assert sorted(data) == ["decode", "disagreements", "prefill", "train"]


def test_a_prompt_must_fit_into_the_cache():
    with pytest.raises(ArgumentError, match="max_len=8 slots cannot hold the prompt of q_len=9"):
        ModelShape(q_len=9, max_len=8)
