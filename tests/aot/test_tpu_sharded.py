"""Calls cut over the chips of a slice, through the real TPU compiler, as `kernelry check --sharding` compiles them."""

import dataclasses

import pytest

from kernelry import ModelShape, aot
from kernelry.config import AttentionConfig

pytestmark = pytest.mark.aot

SHAPE = ModelShape(q_len=2048, max_len=2048, batch=4, q_heads=8, kv_heads=4, head_dim=128)
SHARDINGS = (
    "batch=d:4",
    "heads=t:4",
    "batch=d:2 heads=t:2",
    "batch=d:2 sequence=c:2 ring",
    "sequence=c:4 ring dual",
    "sequence=c:4 ring striped",
    "heads=t:2 sequence=c:2 all_gather",
    "sequence=c:4 ulysses",
    "sequence=c:2,u:2 ulysses=u:2 usp",
)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_every_phase_compiles_for_a_slice(sharding):
    shape = dataclasses.replace(SHAPE, sharding=sharding)
    reports = aot.check_layers(AttentionConfig(), shape, "tpu:v5e:2x2")
    assert {report.name: report.verdict for report in reports} == dict.fromkeys(("train", "prefill", "decode"), "ok")
    assert {report.resolution.kernel for report in reports[:2]} == {"splash"}


def test_a_million_tokens_fit_into_sixteen_chips():
    long = {"q_len": 2**20, "max_len": 2**20, "batch": 1, "kv_heads": 1, "sharding": "sequence=c:16 ring dual"}
    shape = dataclasses.replace(SHAPE, **long)
    train, *_ = aot.check_layers(AttentionConfig(), shape, "tpu:v5e:4x4")
    assert train.verdict == "ok"
