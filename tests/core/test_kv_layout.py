"""Values that are stored in the keys, and interleaved pages: the results of the same arrays apart, and the oracle's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Heads, arrays_of, cotangents_of
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks
from kernelry.cache import PagedArray, QuantizedArray, ValueInKey
from kernelry.errors import ArgumentError, KernelRefusedError, ShapeError
from kernelry.plugin import Capabilities, RefusalCode, Request
from kernelry.storage import QUANTIZATIONS
from kernelry.testing import interpret, reference_attention, reference_gradients
from kernelry_dot_product.plugin import DOT_PRODUCT

T, S, PAGE, D = 3, 12, 4, 8
MLA = Heads(4, 1, 12, D)
"""One key/value head, whose value is a part of it, as in absorbed multi-head latent attention."""

TABLE = np.array([[3, 6, 1], [5, 2, 4]], np.int32)
RAGGED = masks.Lengths(np.array([11, 3], np.int32))
NATIVE = ["dot_product", "blockwise"]
LAYOUTS = ["value_in_key", "interleaved"]


def pages_of(array):
    """Cuts [B, S, K, H] into the pages that the table names; what it does not name is NaN."""
    cut = np.asarray(array).reshape(*TABLE.shape, PAGE, *array.shape[2:])
    pages = np.full((8, *cut.shape[2:]), 0 if np.issubdtype(cut.dtype, np.integer) else np.nan).astype(cut.dtype)
    pages[TABLE] = cut
    return jnp.asarray(pages)


def alternating(key, value):
    """Interleaved pages, written from their definition: row 2k is a key head, row 2k + 1 its value."""
    pages = np.stack([pages_of(key), pages_of(value)], axis=3)
    return jnp.asarray(pages.reshape(*pages.shape[:2], -1, pages.shape[4]))


def assert_as_apart(found, query, key, value, mask=RAGGED, *, atol=2e-6):
    wanted = reference_attention(query, key, value, mask=mask).out
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=atol, rtol=atol)


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("mask", [masks.Full(), RAGGED, masks.Causal().at(query_offset=9)])
def test_values_in_the_keys_are_their_first_columns_and_the_gradient_of_the_keys_has_both_shares(kernel, mask):
    arrays = arrays_of(T, S, MLA)
    query, key = arrays["query"], arrays["key"]
    cotangent = cotangents_of(arrays)["out"]

    @jax.jit
    def run(query, key):
        out, pull = jax.vjp(lambda q, k: kernelry.attention(q, k, ValueInKey(D), mask=mask, kernel=kernel), query, key)
        return out, *pull(cotangent)

    out, d_query, d_key = run(query, key)
    assert_as_apart(out, query, key, key[..., :D], mask)
    wanted = reference_gradients(query, key, key[..., :D], mask=mask, d_out=cotangent, d_lse=None)
    both = np.array(wanted.key)
    both[..., :D] += wanted.value
    np.testing.assert_allclose(d_query, wanted.query, atol=2e-5)
    np.testing.assert_allclose(d_key, both, atol=2e-5)


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("how", ["int8", "int4:heads_and_head_dim"])
@pytest.mark.parametrize("paged", [False, True])
def test_of_quantised_keys_the_values_have_the_scale(kernel, how, paged):
    arrays = arrays_of(T, S, dataclasses.replace(MLA, kv=2))
    key = QuantizedArray.quantize(arrays["key"], how)
    plain = key.dequantize()
    held = PagedArray(jax.tree.map(pages_of, key), jnp.asarray(TABLE)) if paged else key
    out = jax.jit(lambda q, k: kernelry.attention(q, k, ValueInKey(D), mask=RAGGED, mode="decode", kernel=kernel))(
        arrays["query"], held
    )
    assert_as_apart(out, arrays["query"], plain, plain[..., :D])


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_both_layouts_equal_the_oracle_with_nan_in_hidden_slots(kernel, layout):
    arrays = arrays_of(T, S, dataclasses.replace(MLA, kv=2, value_dim=12))
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    hidden = np.arange(S) >= np.array([[11], [3]])
    poisoned = [np.where(hidden[..., None, None], np.nan, array) for array in (key, value)]
    table = jnp.where(jnp.array([[1, 1, 1], [1, 0, 0]]), TABLE, -1)
    if layout == "interleaved":
        held, width = PagedArray(alternating(*poisoned), table, interleaved=True), 12
    else:
        held, width, value = PagedArray(pages_of(poisoned[0]), table), D, key[..., :D]
    out = jax.jit(lambda q, k: kernelry.attention(q, k, ValueInKey(width), mask=RAGGED, mode="decode", kernel=kernel))(
        query, held
    )
    assert_as_apart(out, query, key, value)


def test_under_vmap_and_scan_layouts_are_as_apart():
    arrays = arrays_of(T, S, MLA)
    query, key = (jnp.stack([arrays[name], arrays[name][::-1]]) for name in ("query", "key"))

    def attend(query, key):
        return kernelry.attention(query, key, ValueInKey(D), mask=RAGGED)

    batched = jax.jit(jax.vmap(attend))(query, key)
    _, scanned = jax.jit(lambda *given: jax.lax.scan(lambda carry, one: (carry, attend(*one)), 0, given))(query, key)
    for one in range(2):
        assert_as_apart(batched[one], query[one], key[one], key[one][..., :D])
        assert_as_apart(scanned[one], query[one], key[one], key[one][..., :D])


def test_the_value_crosses_transformations_as_a_static_argument():
    arrays = arrays_of(T, S, MLA)
    attend = jax.jit(lambda query, key, value: kernelry.attention(query, key, value, mask=RAGGED))
    out = attend(arrays["query"], arrays["key"], ValueInKey(D))
    assert_as_apart(out, arrays["query"], arrays["key"], arrays["key"][..., :D])
    assert jax.tree.leaves(ValueInKey(D)) == []
    assert hash(ValueInKey(D)) == hash(ValueInKey(D)) != hash(ValueInKey(D + 1))
    held = PagedArray(jnp.zeros((2, 4, 4, 8)), jnp.zeros((1, 2), jnp.int32), interleaved=True)
    assert jax.tree.map(lambda leaf: leaf, held).interleaved


def test_second_derivatives_go_through_the_slice():
    arrays = arrays_of(2, 4, Heads(1, 1, 3, 2))
    query, key = arrays["query"], arrays["key"]

    def loss(key, value):
        return jnp.sin(kernelry.attention(query, key, value(key), kernel="dot_product")).sum()

    found = jax.hessian(lambda key: loss(key, lambda _: ValueInKey(2)))(key)
    wanted = jax.hessian(lambda key: loss(key, lambda key: key[..., :2]))(key)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def calls_of(layout, dtype):
    """Arrays that kernels for accelerators take: head dims of 128, in bfloat16 or float32."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((2, 1, 4, 128), (2, 256, 1, 128), (2, 256, 1, 128))
    )
    if layout == "value_in_key":
        return query, key, ValueInKey(128), key
    table = np.arange(4, dtype=np.int32).reshape(2, 2)[:, ::-1].copy()
    pairs = np.stack([np.asarray(array, np.float32) for array in (key, value)], axis=3).reshape(2, 2, 128, 2, 128)
    pages = np.zeros((4, 128, 2, 128), np.float32)
    pages[table] = pairs
    held = PagedArray(jnp.asarray(pages, dtype), jnp.asarray(table), interleaved=True)
    return query, held, ValueInKey(128), value


@functools.cache
def interpreted_kernels():
    return sorted(
        kernel.name
        for kernel in kernelry.kernels()
        if kernel.spec.capabilities.interpret or "cpu" in kernel.spec.capabilities.platforms
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kernel_that_runs_here_serves_every_layout(layout):
    """Whatever layout a kernel reads, adapters make it from the others."""
    lengths = masks.Lengths(np.array([200, 31], np.int32))
    served = []
    for name in interpreted_kernels():
        for mode, mask in (("decode", lengths), ("prefill", masks.Full())):
            query, held, value, apart = calls_of(layout, jnp.float32)
            facts = {"mask": mask, "mode": mode, "kernel": name}
            separate = (query, held.gather() if layout == "interleaved" else held, apart)
            with interpret():
                try:
                    wanted = kernelry.attention(*separate, **facts)
                except KernelRefusedError:
                    continue
                found = kernelry.attention(query, held, value, **facts)
            np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=f"{name} {mode}")
            served.append(name)
    assert {"dot_product", "blockwise", "ragged", "pallas_decode", "splash"} <= {*served}


# What is said


DENSE = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
NARROW = dataclasses.replace(
    DENSE,
    name="narrow",
    capabilities=dataclasses.replace(DENSE.capabilities, kv_quantizations=QUANTIZATIONS, pages=True),
)
"""It reads quantised keys and pages, of keys and values apart."""


def explained(policy=None, **facts):
    request = Request(q_len=T, kv_len=S, mode="decode", **facts)
    return kernelry.explain(request, kernel="narrow", kernels=(NARROW,), policy=policy)


@pytest.mark.parametrize(
    ("facts", "adapters"),
    [
        ({"kv_layout": "value_in_key", "value_dim": 32}, ["separate_kv"]),
        ({"kv_layout": "value_in_key", "kv_quantization": "int8"}, ["separate_kv"]),
        ({"kv_layout": "value_in_key", "page_size": 4}, ["gather_pages", "separate_kv"]),
        ({"kv_layout": "interleaved", "page_size": 4}, ["gather_pages"]),
    ],
)
def test_the_adapters_are_shown_with_their_cost(facts, adapters):
    resolution = explained(**facts)
    assert [step.adapter.name for step in resolution.plan.steps] == adapters
    size = 1 if "kv_quantization" in facts else 4
    gathered = (64 if facts["kv_layout"] == "value_in_key" else 128) if "page_size" in facts else 0
    sliced = facts.get("value_dim", 64) if "separate_kv" in adapters else 0
    assert resolution.plan.cost.extra_bytes == S * size * (gathered + sliced)
    assert f"kv_layout={facts['kv_layout']}" in str(resolution.request)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kernel_that_does_not_declare_a_layout_refuses_it_where_adapters_are_forbidden(layout):
    facts = {"kv_layout": layout, "page_size": 4}
    resolution = explained(NO_ADAPTERS, **facts)
    [refusal] = resolution.candidates[0].refusals
    assert (refusal.code, refusal.detail) == (RefusalCode.KV_LAYOUT, f"kv_layout={layout} is not separate")
    assert "gather_pages would help, which the policy forbids" in str(refusal)
    declared = Capabilities(kv_layouts=frozenset({layout}), pages=True)
    assert "kv_layout" not in {refusal.code.value for refusal in declared.refusals(Request(q_len=T, kv_len=S, **facts))}


PAGES_TOGETHER = dataclasses.replace(
    DOT_PRODUCT.capabilities, kv_layouts=frozenset({"interleaved"}), pages=True, dtypes=frozenset({"bfloat16"})
)
KEEP = "kv_layout={} is not interleaved; keep them in PagedCache.create(layout='interleaved')"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"kv_layout": "interleaved", "page_size": 4, "dtype": "float32"}, []),
        ({"page_size": 4}, [KEEP.format("separate")]),
        ({}, [KEEP.format("separate")]),
        ({"kv_layout": "value_in_key", "page_size": 4}, [KEEP.format("value_in_key")]),
        ({"kv_layout": "value_in_key", "value_dim": 32}, ["kv_layout=value_in_key is not interleaved"]),
        ({"kv_quantization": "int8"}, ["kv_layout=separate is not interleaved"]),
        ({"value_dim": 32}, ["kv_layout=separate is not interleaved"]),
    ],
)
def test_a_kernel_of_interleaved_pages_alone_says_of_the_layout_asked_what_can_be_done(facts, said):
    """It is not asked for arrays that adapters would make and it does not read."""
    kernel = dataclasses.replace(DOT_PRODUCT, name="together", capabilities=PAGES_TOGETHER)
    request = Request(**{"q_len": T, "kv_len": S, "mode": "decode", "dtype": "bfloat16", "mask": RAGGED} | facts)
    found = kernelry.explain(request, kernels=[kernel], kernel="together").candidates[0].refusals
    assert [str(refusal) for refusal in found if refusal.code is RefusalCode.KV_LAYOUT] == said


def test_no_cache_is_advised_where_a_gradient_is_needed():
    [refusal] = (r for r in PAGES_TOGETHER.refusals(Request(q_len=T)) if r.code is RefusalCode.KV_LAYOUT)
    assert refusal.remedy is None


@pytest.mark.parametrize(
    "facts",
    [
        {"kv_layout": "value_in_key", "head_dim": 576, "value_dim": 512},
        {"kv_layout": "value_in_key", "kv_quantization": "int8", "page_size": 4},
        {"kv_layout": "interleaved", "page_size": 4, "mode": "decode"},
    ],
)
def test_requests_cross_json(facts):
    request = Request(q_len=4, kv_len=8, **facts)
    assert Request.from_json(request.to_json()) == request
    assert request != dataclasses.replace(Request(q_len=4, kv_len=8, **{**facts, "kv_layout": "separate"}))
    assert f"kv_layout={facts['kv_layout']}" in str(request)


def test_by_default_the_keys_are_differentiated_and_the_values_with_them():
    request = Request(q_len=4, kv_layout="value_in_key")
    assert {operand.value for operand in request.gradients} == {"query", "key"}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kv_layout": "value_in_keys"}, "unknown kv_layout 'value_in_keys'; did you mean 'value_in_key'"),
        ({"kv_layout": "value_in_key", "value_dim": 65}, "value_dim=65 must be 1 … head_dim=64"),
        ({"kv_layout": "interleaved"}, "interleaved needs page_size, no kv_quantization, and value_dim = head_dim"),
        ({"kv_layout": "interleaved", "page_size": 4, "kv_quantization": "int8"}, "kv_quantization=int8:head_dim"),
        ({"kv_layout": "interleaved", "page_size": 4, "value_dim": 32}, "value_dim=32"),
        ({"kv_layout": "value_in_key", "gradients": ["value"]}, "name key, whose gradient has both shares"),
    ],
)
def test_a_layout_that_means_nothing_is_refused(facts, message):
    with pytest.raises(ArgumentError, match=message):
        Request(q_len=4, **facts)


def wrong_calls():
    query, key = jnp.zeros((2, 3, 4, 12)), jnp.zeros((2, 12, 2, 12))
    table = jnp.asarray(TABLE)
    pages = PagedArray(jnp.zeros((8, 4, 2, 12)), table)
    paired = PagedArray(jnp.zeros((8, 4, 4, 12)), table, interleaved=True)
    return {
        "wider than the keys": ((query, key, ValueInKey(13)), r"ValueInKey\(width=13\).*only head dim H=12"),
        "interleaved, of another width": ((query, paired, ValueInKey(8)), r"pass ValueInKey\(12\) as value, got"),
        "interleaved, with values": ((query, paired, pages), r"holds the values, too: pass ValueInKey\(12\)"),
        "interleaved values": ((query, pages, paired), "holds keys, too: pass it as key"),
        "as the key": ((query, ValueInKey(8), key), "pass it as value, and the keys as key"),
    }


@pytest.mark.parametrize("case", list(wrong_calls()))
def test_what_does_not_go_together_is_an_error(case):
    arguments, message = wrong_calls()[case]
    with pytest.raises(ShapeError, match=message):
        kernelry.attention(*arguments, mode="decode")


def test_what_cannot_be_held_is_an_error():
    table = jnp.asarray(TABLE)
    with pytest.raises(ShapeError, match="positive integer, got 0"):
        ValueInKey(0)
    with pytest.raises(ShapeError, match=r"even number of rows, got float32\[8, 4, 3, 12\]"):
        PagedArray(jnp.zeros((8, 4, 3, 12)), table, interleaved=True)
    with pytest.raises(ShapeError, match="interleaved pages cannot be quantised, got QuantizedArray"):
        PagedArray(QuantizedArray.quantize(jnp.ones((8, 4, 4, 12))), table, interleaved=True)
    with pytest.raises(ShapeError, match="True or False, got 1"):
        PagedArray(jnp.zeros((8, 4, 4, 12)), table, interleaved=1)


def test_the_gradient_of_a_value_in_the_key_cannot_be_named():
    arrays = arrays_of(T, S, MLA)
    with pytest.raises(ArgumentError, match="name key"):
        kernelry.attention(arrays["query"], arrays["key"], ValueInKey(D), gradients=("value",))
