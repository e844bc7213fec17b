"""jax.export: symbolic sizes go through, and what a function takes and returns can be written down."""

import functools
import json
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from mask_strategies import near

import kernelry
from kernelry import Request, masks
from kernelry._pytree import read_static, write_static
from kernelry.cache import PagedArray, PagedCache, QuantizedArray, RollingCache, SharedPrefix, TwoPartCache
from kernelry.errors import ArgumentError, ConfigError, KernelRefusedError, ShapeError
from kernelry.plugin import Mode, RefusalCode
from kernelry.testing import reference_attention, reference_gradients

pytestmark = pytest.mark.versions

B, T, N, K, H = 3, 24, 4, 2, 8
RNG = np.random.default_rng(0)
ARRAYS = {
    name: jnp.asarray(RNG.standard_normal((B, T, heads, H)), jnp.float32)
    for name, heads in (("query", N), ("key", K), ("value", K))
}
BIAS, SINKS = jnp.asarray(RNG.standard_normal((B, 1, T, T)), jnp.float32), jnp.asarray([-1.0, 0.0, 0.5, 1.0])


def every_third(query, kv):
    return (query - kv) % 3 != 1


def _ids(low, high, *shape):
    return jnp.asarray(RNG.integers(low, high, shape))


MASKS = {
    "causal": masks.Causal(),
    "packed": masks.Causal() & masks.Segments(_ids(0, 3, B, T)),
    "prefix": masks.PrefixLM(_ids(0, 9, B)),
    "dense": masks.Dense(jnp.asarray(RNG.random((B, N, T, T)) > 0.4)),
    "window at offsets": masks.SlidingWindow(5).at(query_offset=_ids(0, 5, B)),
}
MORE_MASKS = {
    "separate segments": masks.Segments(_ids(0, 3, B, T), _ids(0, 3, B, T)),
    "lengths": masks.Lengths(_ids(1, T, B), _ids(1, T, B)),
    "selection": masks.BlockSelection(jnp.asarray(RNG.random((B, K, T, 6)) > 0.4), 4) & masks.Causal(),
    "predicate": masks.Predicate(every_third),
    "predicate of arrays": masks.Predicate(near, _ids(1, 5, B, 1, 1, 1)),
    "spans": masks.Causal() | masks.BidirectionalSpans(_ids(-1, 3, B, T)),
    "not": ~masks.Causal() & ~masks.Segments(_ids(0, 3, B, T)),
    "or full": ~masks.Causal() | masks.Full(),
    "positions": masks.SlidingWindow(5).at(query_positions=_ids(0, 30, B, T), kv_positions=_ids(0, 30, B, T)),
    "chunks": masks.Chunked(7) & masks.BlockCausal(5),
}


def _symbolic(tree, names):
    """The shapes of arrays, their leading B and every T symbolic where `names` says so."""
    sizes = dict(zip(names.split(", "), export.symbolic_shape(names), strict=True))

    def of(array):
        batch, *rest = array.shape or (None,)
        shape = [sizes["b"] if batch == B else batch] if array.shape else []
        return jax.ShapeDtypeStruct((*shape, *(sizes.get("t", T) if n == T else n for n in rest)), array.dtype)

    return jax.tree.map(of, tree)


def _check_exported(function, *given, names="b"):
    """What is exported with symbolic sizes and called is what the function itself gives."""
    program = export.export(jax.jit(function))(*_symbolic(given, names))
    found, expected = program.call(*given), jax.jit(function)(*given)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), atol=1e-5)


def _with_gradients(kernel, arrays, mask):
    def loss(arrays):
        out = kernelry.attention(**arrays, mask=mask, kernel=kernel)
        return jnp.square(out).sum(), out

    gradients, out = jax.grad(loss, has_aux=True)(arrays)
    return out, gradients


def _in_tiles(kernel):
    return kernelry.use(tiling={"block_q": 8, "block_kv": 8} if kernel == "blockwise" else {})


def _check_oracle(kernel, names, mask, **more):
    """What is exported with symbolic sizes gives float64's results, forward and backward."""
    arrays = ARRAYS | more
    with _in_tiles(kernel):
        function = jax.jit(functools.partial(_with_gradients, kernel))
        out, gradients = export.export(function)(*_symbolic((arrays, mask), names)).call(arrays, mask)
    expected = reference_attention(**arrays, mask=mask)
    np.testing.assert_allclose(np.asarray(out), expected.out, atol=1e-5)
    wanted = reference_gradients(**arrays, mask=mask, d_out=2 * expected.out)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(np.asarray(gradient), getattr(wanted, name), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_blockwise_with_a_symbolic_batch_forward_and_backward(name):
    _check_oracle("blockwise", "b", MASKS[name])


@pytest.mark.parametrize("name", MASKS)
def test_dot_product_with_a_symbolic_batch_and_lengths_forward_and_backward(name):
    _check_oracle("dot_product", "b, t", MASKS[name])


@pytest.mark.sweep
@pytest.mark.parametrize(("kernel", "names"), [("blockwise", "b"), ("dot_product", "b"), ("dot_product", "b, t")])
@pytest.mark.parametrize("name", [*MASKS, *MORE_MASKS])
def test_every_mask_with_symbolic_sizes(name, kernel, names):
    _check_oracle(kernel, names, (MASKS | MORE_MASKS)[name])


@pytest.mark.parametrize(("kernel", "names"), [("blockwise", "b"), ("dot_product", "b, t")])
def test_bias_and_sinks_with_symbolic_sizes(kernel, names):
    _check_oracle(kernel, names, MASKS["window at offsets"], bias=BIAS, sinks=SINKS)


@pytest.mark.parametrize(("kernel", "names"), [("blockwise", "b"), ("dot_product", "b, t")])
def test_partials_merge_with_symbolic_sizes(kernel, names):
    def call(arrays):
        return kernelry.attention(
            **arrays, mask=masks.Causal(), kernel=kernel, return_partial=True, return_max_logits=True
        )

    with _in_tiles(kernel):
        _check_exported(call, ARRAYS, names=names)


@pytest.mark.parametrize(
    ("mode", "slots", "kernel"),
    [
        ("train", 32, "dot_product"),
        ("train", 768, "blockwise"),
        ("prefill", 768, "blockwise"),
        ("decode", 32, "dot_product"),
        ("decode", 2048, "blockwise"),
    ],
)
def test_auto_chooses_as_for_a_batch_that_is_a_number(mode, slots, kernel):
    [batch] = export.symbolic_shape("b")
    queries = 1 if mode == "decode" else slots
    query, key = (jax.ShapeDtypeStruct((batch, length, 1, 8), jnp.float32) for length in (queries, slots))
    mask = masks.Lengths(slots - 1)
    with kernelry.record() as made:
        program = export.export(jax.jit(lambda q, k: kernelry.attention(q, k, k, mask=mask, mode=mode)))(query, key)
    assert program.out_avals[0].shape == query.shape
    [resolution] = made
    assert (resolution.kernel, str(resolution.request.batch)) == (kernel, "b")


def test_auto_with_a_symbolic_length_chooses_a_kernel_that_takes_it_and_others_say_why_not():
    request = Request(q_len="t", kv_len="t", head_dim=8, mask=masks.Causal())
    resolution = kernelry.explain(request)
    assert resolution.kernel == "dot_product"
    refusals = {c.name: c.refusals for c in resolution.candidates}
    assert [str(r) for r in refusals["blockwise"]] == [
        "q_len=t is symbolic; export the program for a number",
        "kv_len=t is symbolic; export the program for a number",
    ]
    with pytest.raises(KernelRefusedError, match="splash: batch=2\\*b is symbolic; export the program for a number"):
        kernelry.resolve(Request(q_len=128, batch="b*2", head_dim=128, target="tpu:v5e"), kernel="splash")


def test_shapes_alone_are_found_for_a_symbolic_batch_as_functional_interfaces_ask():
    query = jax.ShapeDtypeStruct(export.symbolic_shape("b, 800, 2, 8"), jnp.float32)
    assert jax.eval_shape(lambda q: kernelry.attention(q, q, q, mask=masks.Causal()), query).shape == query.shape


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ("b, 16, n, 8", r"query may have a symbolic batch and length, not heads and head dim, got \(b, 16, n, 8\)"),
        ("b, 16, 2, h", "not heads and head dim"),
    ],
)
def test_heads_and_head_dims_are_numbers(shape, complaint):
    query = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    with pytest.raises(ShapeError, match=complaint):
        export.export(jax.jit(lambda q: kernelry.attention(q, q, q)))(query)


def test_positional_masks_ask_where_the_queries_of_another_length_stand():
    query = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    key = jax.ShapeDtypeStruct(export.symbolic_shape("1, s, 2, 8"), jnp.float32)
    with pytest.raises(ShapeError, match=r"T=4 and key has S=s: .* mask.at\(query_offset=s - 4\)"):
        export.export(jax.jit(lambda q, k: kernelry.attention(q, k, k, mask=masks.Causal())))(query, key)


def test_a_request_with_symbolic_sizes_is_a_value_and_survives_json():
    request = Request(
        batch="b", q_len="t + 1", kv_len="s", bias=("b", 1, 1, "s"), mask=masks.Causal().at(query_offset=1)
    )
    data = json.loads(json.dumps(request.to_json()))
    assert (data["batch"], data["q_len"], data["kv_len"], data["bias"]) == ("b", "t + 1", "s", ["b", 1, 1, "s"])
    for again in (Request.from_json(data), pickle.loads(pickle.dumps(request))):
        assert again == request
        assert hash(again) == hash(request)
    assert "B=b T=t + 1 S=s" in str(request)
    assert request.symbolic_sizes == ("batch", "q_len", "kv_len")
    assert request not in (Request(q_len=1), Request(batch="c", q_len="t + 1", kv_len="s"))
    assert Request(batch="b", q_len=8) != Request(batch=1, q_len=8)
    assert Request(batch=1, q_len=8).symbolic_sizes == ()


@pytest.mark.parametrize("size", ["", "b c", "4", "b, c", "(", 1.0, True])
def test_what_is_no_size_is_an_error(size):
    with pytest.raises(ArgumentError, match="must be an integer"):
        Request(q_len=8, batch=size)
    with pytest.raises(ConfigError):
        Request.from_json({"q_len": 8, "kv_len": size})


@pytest.mark.parametrize("name", ["head_dim", "q_heads"])
def test_other_sizes_of_a_request_are_numbers(name):
    with pytest.raises(ArgumentError, match=f"{name} must be an integer, got 'n'"):
        Request(**{"q_len": 8, name: "n"})


def test_rules_about_a_size_do_not_hold_where_it_is_symbolic():
    [within] = [
        rule.when
        for rule in kernelry.plugin.Policy.shipped().defaults
        if rule.when.platform == ("cpu",)
        and rule.when.mode == (Mode.TRAIN,)
        and not (rule.when.mask or rule.when.head_dim)
        and rule.when.kv_len
    ]
    assert within.matches(Request(q_len=768))
    assert not within.matches(Request(q_len="t"))


def test_masks_over_symbolic_lengths_claim_only_what_holds_for_all():
    request = Request(q_len="t", mask=masks.Causal())
    assert not request.mask.may_have_empty_rows(request.q_len, request.kv_len)
    assert not request.mask.may_hide_slots(request.q_len, request.kv_len)
    for q_len, kv_len in (("t", 8), (8, "s"), ("t", "s")):
        request = Request(q_len=q_len, kv_len=kv_len, mask=masks.SlidingWindow(2).at(query_offset=1))
        assert request.mask.may_have_empty_rows(request.q_len, request.kv_len)
        assert request.mask.may_hide_slots(request.q_len, request.kv_len)


def test_declaring_nothing_refuses_symbolic_sizes():
    spec = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "blockwise")
    refusals = spec.capabilities.refusals(Request(batch="b", q_len="t", kv_len=8))
    assert [refusal.detail for refusal in refusals if refusal.code is RefusalCode.SYMBOLIC_SIZE] == [
        "q_len=t is symbolic"
    ]


CACHES = {
    "two parts": TwoPartCache.create(batch=B, prefill=16, decode=8, kv_heads=K, head_dim=H, dtype=jnp.float32),
    "rolling": RollingCache.create(batch=B, window=8, kv_heads=K, head_dim=H, dtype=jnp.float32),
    "paged": PagedCache.create(rows=B, pages=30, page_size=4, max_length=16, kv_heads=K, head_dim=H, dtype=jnp.float32),
}


def _step(cache, query, key, value):
    return cache.decode(query[:, :1], key[:, :1], value[:, :1], mask=masks.SlidingWindow(7))


@pytest.mark.parametrize("name", CACHES)
def test_caches_with_a_symbolic_batch(name):
    _check_exported(_step, CACHES[name], *ARRAYS.values())


@pytest.mark.parametrize("name", ["two parts", "rolling"])
def test_caches_of_slots_take_lengths_that_are_numbers(name):
    def prefill(cache, key):
        return cache.append(key, key)

    with pytest.raises(ShapeError, match=r"key must have a length that is a number, got shape .*3, t, 2, 8"):
        export.export(jax.jit(prefill))(
            CACHES[name], jax.ShapeDtypeStruct(export.symbolic_shape(f"{B}, t, {K}, {H}"), jnp.float32)
        )


def test_blocks_are_selected_of_lengths_that_are_numbers():
    def select(query, key):
        return kernelry.moba.select_blocks(query, key, chunk_size=4, top_k=2, query_positions=jnp.arange(T)).mask.keep

    _check_exported(select, ARRAYS["query"], ARRAYS["key"])
    with pytest.raises(ShapeError, match="key must have a length that is a number"):
        export.export(jax.jit(select))(*_symbolic((ARRAYS["query"], ARRAYS["key"]), "b, t"))


QUANTIZED = QuantizedArray(jnp.ones((B, T, K, H), jnp.int8), jnp.ones((B, T, K, 1), jnp.bfloat16))
WRITTEN = {
    **MASKS,
    **MORE_MASKS,
    "static positions": masks.Causal().at(query_positions=np.arange(T)[::-1], kv_offset=3),
    "static offsets": masks.Causal().at(query_offset=np.arange(B)),
    **CACHES,
    "view": CACHES["paged"].view(),
    "quantised": QUANTIZED,
    "paged array": PagedArray(jnp.ones((5, 4, K, H)), jnp.zeros((B, 2), jnp.int32)),
    "prefix": SharedPrefix(ARRAYS["key"][0], ARRAYS["value"][0]),
    "partial": kernelry.Partial(ARRAYS["query"], lse=jnp.ones((B, N, T)), dtype="bfloat16"),
}


def _both(tree):
    return tree, jax.tree.map(lambda array: array.sum(), tree)


@pytest.mark.parametrize("name", WRITTEN)
def test_exported_functions_take_and_return_masks_caches_and_partials_after_being_written_down(name):
    pytest.importorskip("flatbuffers", reason="JAX serialises exported functions with flatbuffers")
    tree = WRITTEN[name]
    program = export.deserialize(export.export(jax.jit(_both))(tree).serialize())
    found, expected = program.call(tree), _both(tree)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize(
    "static", [(), (None, 0), (True, "float32", 0.5), (((0, 3), (7, 2)), ((1, -1),)), (every_third,)]
)
def test_what_is_static_in_a_pytree_survives_being_written(static):
    assert read_static("Mask", write_static("Mask", static)) == static


def test_functions_that_are_not_importable_and_other_objects_cannot_be_written():
    with pytest.raises(ArgumentError, match=r"^Predicate cannot be serialised: .* is not importable by name; define"):
        write_static("Predicate", (lambda query, kv: query < kv,))
    with pytest.raises(ArgumentError, match=r"^Mine cannot be serialised: .* is not a number, a text or a function"):
        write_static("Mine", (object(),))
    with pytest.raises(
        ArgumentError, match=r"^Predicate cannot be deserialised: no.such is not imported, or has no f:"
    ):
        read_static("Predicate", b'[{"function": "no.such:f"}]')


def test_the_examples_of_the_documentation_run(caplog):
    text = (Path(__file__).parents[2] / "docs" / "transformations.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["out"].shape == (5, 128, 4, 32)
    assert names["program"].platforms == ("tpu",)
    assert "is lowered for" not in caplog.text
