"""fa4: every limit is refused with its value before anything is traced, or cured by an adapter; nothing is imported."""

import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks
from kernelry.kernel.spec import Environment, Knowledge, _answer
from kernelry.plugin import Operand, RefusalCode
from kernelry.request.request import Request
from kernelry_gpu_flash_attn.fa4 import spec
from kernelry_gpu_flash_attn.plugin import FA4, kernelry_rank

HERE = Environment(versions=(("fa4-jax", "0.1.0"),))


def ask(**options):
    return Request(**{"target": "gpu:h100", "q_len": 128, "head_dim": 64, "dtype": "bfloat16", **options})


def explained(policy=NO_ADAPTERS, environment=None, **options):
    return kernelry.explain(ask(**options), kernel="fa4", policy=policy, environment=environment)


def adapters(**options):
    plan = explained(policy=None, **options).plan
    return None if plan is None else {step.adapter.name for step in plan.steps}


def first_half(query_positions, kv_positions):
    return (kv_positions < 64) & (query_positions >= 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16 or float16"),
        ({"head_dim": 77}, "head_dim=77 is not a multiple of 8"),
        ({"head_dim": 264}, "head_dim=264 > 256"),
        ({"value_dim": 4}, "value_dim=4 < 8"),
        ({"head_dim": 136, "target": "gpu:b200"}, "head_dim=136 > 128 on gpu:b200"),
        ({"value_dim": 256, "target": "gpu:b200"}, "value_dim=256 > 128 on gpu:b200"),
        ({"target": "gpu:t4"}, "gpu:t4 is generation 75 < 80"),
        (
            {"target": "gpu"},
            "the generation of target gpu is not known, and each has a kernel of its own; name it, e.g.",
        ),
        ({"target": "cpu"}, "platform=cpu is not gpu"),
        ({"target": "tpu:v5e"}, "platform=tpu is not gpu"),
        ({"mode": "decode"}, "mode=decode is not prefill or train"),
        ({"soft_cap": 20.0}, "soft_cap=20.0 is not supported"),
        ({"sinks": True}, "sinks=True is not supported"),
        ({"bias": (1, 1, 128, 128)}, "bias=(1, 1, 128, 128) is not supported"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 is not supported"),
        ({"max_logits": True}, "max_logits=True is not supported"),
        ({"q_len": 0, "kv_len": 128}, "q_len=0"),
        ({"partial": True}, "no gradient through the lse of a Partial"),
        ({"mask": masks.Predicate(first_half)}, "mask atom predicate"),
        ({"mask": masks.Causal().at(query_offset=-5)}, "may leave rows that see no key"),
        ({"mask": masks.Lengths(np.asarray([3]))}, "may hide slots that hold NaN or inf"),
    ],
)
def test_limits(options, reason):
    assert reason in str(explained(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "gpu:a100", "head_dim": 256},
        {"target": "gpu:l4"},
        {"target": "gpu:a10g", "dtype": "float16"},
        {"target": "gpu:h200", "head_dim": 192, "value_dim": 128},
        {"target": "gpu:b200", "head_dim": 128, "value_dim": 64},
        {"q_len": 77, "kv_len": 131},
        {"q_heads": 12, "kv_heads": 4, "scale": 0.3},
        {"mask": masks.Causal()},
        {"mode": "prefill", "gradients": frozenset(), "partial": True},
    ],
)
def test_what_it_serves_as_it_is(options):
    assert adapters(**options) == set()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"mask": masks.SlidingWindow(9)}, set()),
        ({"mask": masks.SlidingWindow(9).at(query_offset=64), "kv_len": 192}, {"clean_hidden_slots"}),
        ({"mask": masks.Segments(np.zeros(128, int))}, {"clean_hidden_slots", "empty_rows_from_lse"}),
        (
            {"mask": masks.Causal() & masks.Predicate(first_half)},
            {"dense_mask", "clean_hidden_slots", "empty_rows_from_lse"},
        ),
        ({"sinks": True}, {"sinks_from_lse"}),
        ({"head_dim": 77}, {"pad_head_dim"}),
        ({"partial": True}, {"lse_gradient_column"}),
    ],
)
def test_what_adapters_cure(options, wanted):
    assert adapters(**options) == wanted


def test_a_newer_generation_is_refused_by_name():
    [refusal] = FA4.refusals(ask(target="gpu:rtx5090"), HERE.without_probing())
    assert refusal.code is RefusalCode.GENERATION
    assert "is generation 120, not one of 80, 86, 89, 90, 100" in refusal.detail


def missing(version, found=(3, 12)):
    environment = Environment(versions=(("fa4-jax", version),))
    with mock.patch.object(sys, "version_info", found), mock.patch.object(spec, "why_no_compiler", return_value=None):
        return "; ".join(map(str, FA4.refusals(ask(), environment)))


def test_an_absent_vendor_is_a_refusal_with_the_remedy():
    remedy = "pip install 'kernelry-gpu-flash-attn[fa4-cu13]' (or [fa4-cu12])"
    assert missing(None) == f"fa4-jax is not installed; {remedy}"
    assert missing(None, (3, 11)) == f"fa4-jax needs Python 3.12 or later, and this is 3.11; with Python 3.12: {remedy}"


def test_another_release_is_refused():
    wanted = "fa4-jax 0.2.1 is not 0.1, whose private functions this kernel calls; pip install 'fa4-jax==0.1.*'"
    assert missing("0.2.1") == wanted
    assert missing("0.1.7") == ""


def test_a_vendor_that_cannot_be_imported_is_a_refusal():
    def broken():
        return "fa4_jax.kernels cannot be imported: no libcute.so"

    with mock.patch.object(spec, "why_no_compiler", broken):
        [refusal] = FA4.refusals(ask(), HERE)
    _answer.cache_clear()
    assert (refusal.code, refusal.detail) == (RefusalCode.VENDOR_MISSING, broken())
    assert FA4.refusals(ask(), HERE.without_probing()) == ()


def test_of_a_foreign_target_the_vendor_is_assumed():
    assert Environment(Knowledge.ASSUMED).vendor("fa4-jax").missing is False
    assert explained().plan is not None


def test_every_request_has_the_reservation():
    for mode in ("train", "prefill"):
        [reservation] = FA4.reservations(ask(mode=mode))
        assert reservation.code is RefusalCode.EXPERIMENTAL
        assert "unproven" in reservation.detail
    assert "fa4: passed over: first release of fa4-jax" in str(kernelry.explain(ask()))
    assert kernelry.explain(ask(), policy=kernelry.plugin.Policy()).plan.kernel.name != "fa4"


def test_gradients_are_those_of_query_key_and_value():
    assert FA4.capabilities.gradients == {Operand.QUERY, Operand.KEY, Operand.VALUE}
    assert "no gradient of bias" in str(explained(gradients=frozenset(Operand), bias=(1, 1, 128, 128)))


@pytest.mark.parametrize(
    ("options", "candidates", "votes"),
    [
        ({"target": "gpu:b200"}, ("cudnn_jax", "dot_product", "fa4"), True),
        ({"target": "gpu:b200"}, ("dot_product", "fa4"), False),
        ({"target": "gpu:b200"}, ("cudnn_jax",), False),
        ({"target": "gpu:b200", "dtype": "float16"}, ("cudnn_jax", "fa4"), False),
        ({"target": "gpu:h100"}, ("cudnn_jax", "fa4"), False),
    ],
)
def test_it_votes_where_numbers_are_published(options, candidates, votes):
    found = kernelry_rank(request=ask(**options), candidates=candidates)
    assert (found is not None) is votes
    if votes:
        assert found.kernels == ("fa4",)
        assert "published" in found.source


IMPORTS = """
import sys, kernelry
from kernelry import masks
from kernelry.request.request import Request

names = [spec.name for spec in kernelry.kernels()]
assert "fa4" in names, names
for mask in (masks.Causal(), masks.SlidingWindow(9) & masks.Lengths(5)):
    request = Request(target="gpu:h100", q_len=128, head_dim=64, dtype="bfloat16", mask=mask)
    found = str(kernelry.explain(request, kernel="fa4"))
    assert "fa4 [kernelry-gpu-flash-attn" in found and "chosen" in found, found
    kernelry.explain(request)
vendors = {"fa4_jax", "cutejax", "cutlass", "jax_tvm_ffi", "tvm_ffi", "dew_flash_attn"}
assert not {name.partition(".")[0] for name in sys.modules} & vendors
"""


@pytest.mark.versions
def test_listing_and_explaining_import_no_vendor():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
