"""Quantised and paged keys through kernels that want plain ones, beside the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Answer, Heads, arrays_of, assert_twins, cotangents_of, oracle_answer
from pairs import sweep_but
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks
from kernelry.errors import KernelRefusedError
from kernelry.execution.adapters.base import CURED_ON_KEYS, Cost
from kernelry.execution.adapters.order import ADAPTERS, DequantizeKV, GatherPages
from kernelry.plugin import Capabilities, Dims, Feature, Policy, Refusal, RefusalCode, Request
from kernelry.storage import QUANTIZATIONS, PagedArray, QuantizedArray

DENSE = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
WAYS = sorted(QUANTIZATIONS)
HEADS = Heads(4, 2, 8, 8)
FAST = {"xla_backend_optimization_level": 0}  # to compile; arrays are tiny
PAGE = 4
T, S = 3, 12
TABLE = np.array([[3, 6, 1], [5, 2, 4]], np.int32)
RAGGED = masks.Lengths(np.array([11, 3], np.int32))
"""Row 1 sees nothing of its second and third page."""


def plain(**narrowed):
    """A kernel like dot_product that takes plain keys, and less where said."""
    narrow = {"kv_quantizations": frozenset(), "pages": False, **narrowed}
    refusals = narrow.pop("refusals", DENSE.refusals)
    can = dataclasses.replace(DENSE.capabilities, **narrow)
    return dataclasses.replace(DENSE, name="plain", capabilities=can, signature=lambda _: (), refusals=refusals)


def pages_of(array, table=TABLE):
    """Cuts [B, S, K, H] into the pages that a table names; what it does not name is NaN."""
    cut = np.asarray(array).reshape(*table.shape, PAGE, *array.shape[2:])
    pages = np.full((8, *cut.shape[2:]), 0 if np.issubdtype(cut.dtype, np.integer) else np.nan).astype(cut.dtype)
    pages[table] = cut
    return jnp.asarray(pages)


def held(array, how=None, table=None):
    """An array as it is given, its table left out."""
    stored = array if how is None else QuantizedArray.quantize(array, how)
    return stored if table is None else jax.tree.map(pages_of, stored)


def as_oracle_reads(array, how):
    return array if how is None else held(array, how).dequantize()


def served(kernel, mask, arrays, cotangents, table=None, policy=None, **arguments):
    """Runs a call forward and backward to the query; also the adapters it went through."""

    def forward(query, arrays, table):
        key, value = arrays["key"], arrays["value"]
        if table is not None:
            key, value = PagedArray(key, table), PagedArray(value, table)
        others = {"mask": mask, "kernel": "plain", "sinks": arrays.get("sinks")}
        result = kernelry.attention(query, key, value, gradients=("query",), **others, **arguments)
        is_partial = isinstance(result, kernelry.Partial)
        return {"out": result.out, "lse": result.lse} if is_partial else {"out": result, "lse": None}

    def run(arrays, table, cotangents):
        returned, pull = jax.vjp(lambda query: forward(query, arrays, table), arrays["query"])
        return returned["out"], returned["lse"], None, {"query": pull(cotangents)[0]}

    with kernelry.use(kernels=[kernel], policy=policy), kernelry.record() as resolutions:
        answer = Answer(*jax.jit(run, compiler_options=FAST)(arrays, table, cotangents))
    return answer, [step.adapter.name for step in resolutions[0].plan.steps]


def assert_served(
    kernel, adapters, mask, how=None, table=None, heads=HEADS, *, dtype=np.float32, atol=2e-6, **arguments
):
    arrays = arrays_of(T, S, heads, dtype=dtype, sinks=arguments.pop("sinks", False))
    kv = {name: held(arrays[name], how, table) for name in ("key", "value")}
    cotangents = cotangents_of(arrays, lse=arguments.get("return_partial", False))
    found, names = served(kernel, mask, arrays | kv, cotangents, table, **arguments)
    assert names == adapters
    known = {name: as_oracle_reads(arrays[name], how) for name in ("key", "value")}
    expected = oracle_answer(mask, arrays | known, cotangents)
    assert_twins(found, expected, atol=atol, gradient_atol=10 * atol)


@pytest.mark.parametrize(
    ("how", "partial"),
    sweep_but(
        [(how, partial) for how in WAYS for partial in (False, True)],
        *((how, place % 2 == 0) for place, how in enumerate(WAYS)),
    ),
)
def test_quantised_keys_are_dequantised_in_train_mode_with_the_gradient_of_the_query(how, partial):
    assert_served(plain(), ["dequantize_kv"], masks.Causal().at(query_offset=9), how, return_partial=partial)


@pytest.mark.parametrize("mask", [masks.Full(), RAGGED, masks.SlidingWindow(3).at(query_offset=jnp.array([9, 0]))])
def test_pages_are_gathered(mask):
    assert_served(plain(), ["gather_pages"], mask, table=TABLE)


@pytest.mark.parametrize("how", sweep_but(WAYS, "int8:head_dim", "float8_e4m3fn:heads_and_head_dim"))
def test_quantised_pages_are_gathered_first_and_then_dequantised(how):
    assert_served(plain(), ["gather_pages", "dequantize_kv"], RAGGED, how, TABLE)


@pytest.mark.parametrize("how", [None, "int8"])
def test_a_kernel_that_reads_quantised_keys_gets_gathered_ones_as_they_are(how):
    reads = plain(kv_quantizations=QUANTIZATIONS)
    request = Request(q_len=T, kv_len=S, page_size=PAGE, kv_quantization=how, mode="decode")
    plan = kernelry.explain(request, kernel="plain", kernels=(reads,)).plan
    assert [step.adapter.name for step in plan.steps] == ["gather_pages"]
    assert plan.steps[0].after.kv_quantization == (how and "int8:head_dim")


@pytest.mark.parametrize("how", sweep_but([None, "int8", "float8_e4m3fn:heads_and_head_dim"], None, "int8"))
def test_absent_pages_that_no_row_sees_do_not_leak(how):
    arrays, cotangents = arrays_of(T, S), cotangents_of(arrays_of(T, S))
    kv = {name: held(arrays[name], how, TABLE) for name in ("key", "value")}
    absent = TABLE.copy()
    absent[1, 1:] = -1
    for clean, more in ((True, []), (False, ["clean_hidden_slots"])):
        kernel = plain(clean_hidden_slots=clean)
        found, names = served(kernel, RAGGED, arrays | kv, cotangents, jnp.asarray(absent))
        known = {name: as_oracle_reads(arrays[name], how) for name in ("key", "value")}
        assert_twins(found, oracle_answer(RAGGED, arrays | known, cotangents))
        assert names == ["gather_pages", *(["dequantize_kv"] if how else []), *more]


def test_an_absent_page_that_a_row_sees_shows_as_nan():
    arrays, cotangents = arrays_of(T, S), cotangents_of(arrays_of(T, S))
    kv = {name: held(arrays[name], None, TABLE) for name in ("key", "value")}
    absent = TABLE.copy()
    absent[1, 0] = -1
    found, _ = served(plain(), RAGGED, arrays | kv, cotangents, jnp.asarray(absent))
    assert np.isfinite(found.out[0]).all()
    assert np.isnan(found.out[1]).all()


FOLLOWING = {
    "pad_head_dim": {"head_dims": Dims(multiple_of=128)},
    "repeat_kv_heads": {"grouped_heads": False},
    "pad_sequence": {"unequal_lengths": False},
    "sinks_from_lse": {"features": frozenset(Feature) - {Feature.SINKS}},
}


@pytest.mark.parametrize(
    ("adapter", "how", "paged"),
    sweep_but(
        [
            (adapter, *held)
            for adapter in FOLLOWING
            for held in (("int8", False), (None, True), ("int4:heads_and_head_dim", True))
        ],
        ("pad_head_dim", "int8", False),
        ("repeat_kv_heads", None, True),
        ("pad_sequence", "int4:heads_and_head_dim", True),
        ("sinks_from_lse", "int8", False),
    ),
)
def test_other_adapters_follow_on_plain_keys(adapter, how, paged):
    table = TABLE if paged else None
    first = ["gather_pages"] * (table is not None) + ["dequantize_kv"] * (how is not None)
    arrays = arrays_of(T, S, HEADS, sinks=adapter == "sinks_from_lse")
    kv = {name: held(arrays[name], how, table) for name in ("key", "value")}
    cotangents = cotangents_of(arrays)
    found, names = served(plain(**FOLLOWING[adapter]), RAGGED, arrays | kv, cotangents, table)
    known = {name: as_oracle_reads(arrays[name], how) for name in ("key", "value")}
    assert_twins(found, oracle_answer(RAGGED, arrays | known, cotangents))
    assert set(names) == {*first, adapter}
    assert [name for name in names if name in first] == first


def test_dequantised_keys_have_the_dtype_of_the_query_that_the_kernel_gets():
    kernel = plain(dtypes=frozenset({"float32"}))
    adapters = ["dequantize_kv", "cast_inputs"]
    assert_served(kernel, adapters, masks.Full(), "int8", dtype=jnp.bfloat16, atol=2e-2)
    assert_served(plain(), ["dequantize_kv"], masks.Full(), "int8", dtype=jnp.bfloat16, atol=2e-2)


def test_a_kernel_that_reads_both_needs_no_adapter():
    reads = plain(kv_quantizations=QUANTIZATIONS, pages=True)
    request = Request(q_len=T, kv_len=S, page_size=PAGE, kv_quantization="int4", mode="decode")
    assert kernelry.explain(request, kernel="plain", kernels=(reads,)).plan.steps == ()


@pytest.mark.parametrize(
    ("facts", "code", "words"),
    [
        ({"kv_quantization": "int8"}, RefusalCode.KV_QUANTIZATION, "kv_quantization=int8:head_dim is not declared"),
        ({"page_size": PAGE}, RefusalCode.PAGES, "keys and values are in pages of page_size=4"),
    ],
)
def test_without_adapters_a_kernel_that_declares_neither_refuses(facts, code, words):
    request = Request(q_len=T, kv_len=S, mode="decode", **facts)
    explained = kernelry.explain(request, kernel="plain", kernels=(plain(),), policy=NO_ADAPTERS)
    [refusal] = explained.candidates[0].refusals
    assert (refusal.code, refusal.detail) == (code, words)
    assert "would help, which the policy forbids" in str(refusal)


def test_a_forbidden_adapter_refuses_the_call():
    arrays = arrays_of(T, S)
    kv = {name: QuantizedArray.quantize(arrays[name]) for name in ("key", "value")}
    policy = Policy.shipped(forbidden_adapters=["dequantize_kv"])
    with pytest.raises(KernelRefusedError, match="dequantize_kv would help, which the policy forbids"):
        served(plain(), masks.Full(), arrays | kv, cotangents_of(arrays), policy=policy)


def test_a_kernel_that_reads_other_quantizations_says_which():
    request = Request(q_len=4, kv_quantization="int4")
    can = Capabilities(kv_quantizations=frozenset({"int8:head_dim", "int8:heads_and_head_dim"}))
    details = [refusal.detail for refusal in can.refusals(request) if refusal.code is RefusalCode.KV_QUANTIZATION]
    assert details == ["kv_quantization=int4:head_dim is not int8:head_dim or int8:heads_and_head_dim"]


REQUEST = Request(batch=2, q_len=3, kv_len=12, q_heads=4, kv_heads=2, head_dim=8, value_dim=4, dtype="bfloat16")
ELEMENTS = 2 * 12 * 2 * (8 + 4)


@pytest.mark.parametrize(("how", "itemsize"), [(None, 2), ("int8", 1), ("float8_e4m3fn", 1)])
def test_gathering_costs_a_copy_of_what_is_held(how, itemsize):
    paged = dataclasses.replace(REQUEST, page_size=4, kv_quantization=how, gradients=None)
    gathered = dataclasses.replace(paged, page_size=None)
    assert GatherPages().cost(paged, gathered) == Cost(extra_bytes=ELEMENTS * itemsize)


def test_dequantising_costs_plain_arrays_and_a_product_for_each_element():
    quantised = dataclasses.replace(REQUEST, kv_quantization="int8", gradients=None)
    after = dataclasses.replace(quantised, kv_quantization=None)
    assert DequantizeKV().cost(quantised, after) == Cost(extra_bytes=2 * ELEMENTS, extra_flops=ELEMENTS)


def test_adapters_leave_alone_what_is_plain():
    refusals = (Refusal(RefusalCode.HEAD_DIM, "too small"),)
    assert GatherPages().rewrite(REQUEST, Capabilities(), refusals) is None
    assert DequantizeKV().rewrite(REQUEST, Capabilities(), refusals) is None


def test_pages_are_gathered_before_they_are_dequantised():
    both = dataclasses.replace(REQUEST, page_size=4, kv_quantization="int8", gradients=None)
    assert DequantizeKV().rewrite(both, Capabilities(), ()) is None


def test_what_is_cured_on_keys_is_what_the_adapters_that_rewrite_keys_cure():
    assert frozenset().union(*(adapter.cures for adapter in ADAPTERS if adapter.on_keys)) == CURED_ON_KEYS
