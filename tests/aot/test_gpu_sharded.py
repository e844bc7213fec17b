"""Calls cut over the GPUs of a host, through the real compilers, as `kernelry check --sharding` compiles them."""

import dataclasses

import pytest

from kernelry import ModelShape, aot
from kernelry.config import AttentionConfig

pytestmark = pytest.mark.aot

SHAPE = ModelShape(q_len=2048, max_len=2048, batch=4, q_heads=8, kv_heads=4, head_dim=128)


@pytest.mark.parametrize("sharding", ["batch=d:2 heads=t:2", "sequence=c:4 ring dual", "sequence=c:4 ulysses"])
def test_training_and_prefill_compile_for_a_host(sharding):
    shape = dataclasses.replace(SHAPE, sharding=sharding)
    train, prefill, _ = aot.check_layers(AttentionConfig(kernel="pallas_flash"), shape, "gpu:h100:4")
    assert (train.verdict, prefill.verdict) == ("ok", "ok")


def test_what_auto_chooses_compiles_as_far_as_can_be_said():
    shape = dataclasses.replace(SHAPE, sharding="sequence=c:4 ring")
    reports = aot.check_layers(AttentionConfig(), shape, "gpu:h100:4")
    assert {str(report.outcome) for report in reports} <= {"ok", "unchecked"}
