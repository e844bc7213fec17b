"""What all caches share: decoding with one is decoding without, gradients, refusals, and what a cache weighs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import WINDOW, B, D, Fed, H, K, N, attended, close, decoded, normal, rolling, two_part
from pairs import sweep_but

import kernelry
from kernelry import masks
from kernelry.cache import KVCache, PagedCache, RollingCache, SharedPrefix, TwoPartCache
from kernelry.errors import ArgumentError, KernelRefusedError, ShapeError
from kernelry.testing import reference_gradients

WINDOWED = masks.SlidingWindow(WINDOW - 1)
CACHES = [(two_part, masks.Causal()), (rolling, WINDOWED)]


@functools.cache
def fed_rows(make, tokens, counts=(1, 1, 1)):
    return Fed.new(make()).feed("prefill", 5, [5, 3, 0]).feed("append", tokens, counts)


# Decoding

VOCABULARY, FEATURES, LAYERS, PROMPT, STEPS = 17, 16, 2, 5, 6
LENGTHS = np.array([3, 5])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A language model of attention alone, with positions, so that a key at the wrong place is heard."""

    embedding: Any
    positions: Any
    project: Any
    output: Any

    @classmethod
    def random(cls):
        shapes = (VOCABULARY, FEATURES), (PROMPT + STEPS, FEATURES), (LAYERS, FEATURES, (N + 2 * K) * H)
        shapes = (*shapes, (LAYERS, N * H, FEATURES))
        return cls(*(normal(*shape, seed=seed) / shape[-2] ** 0.5 * 2 for seed, shape in enumerate(shapes)))

    def run(self, tokens, positions, attend):
        """Logits; `attend` takes the layer, query, key and value."""
        x = jnp.asarray(self.embedding)[tokens] + jnp.asarray(self.positions)[positions]
        for layer in range(LAYERS):
            qkv = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) * 2) @ self.project[layer]
            query, key, value = jnp.split(qkv.reshape(*x.shape[:2], -1, H), [N, N + K], axis=2)
            out = attend(layer, query, key, value)
            x = x + out.reshape(*out.shape[:2], -1) @ self.output[layer]
        return x @ self.embedding.T


MODEL = Model.random()
TEXT = np.random.default_rng(7).integers(0, VOCABULARY, (2, PROMPT))


@functools.cache
def decoded_without(mask):
    """Tokens and logits [STEPS, 2, …] of greedy decoding by full passes."""

    def attend(_layer, *qkv):
        return kernelry.attention(*qkv, mask=mask)

    @jax.jit
    def full(tokens):
        return MODEL.run(tokens, np.arange(PROMPT + STEPS)[None], attend)

    tokens, found, rows = np.zeros((2, PROMPT + STEPS), np.int32), [], np.arange(2)
    tokens[:, :PROMPT] = TEXT
    for step in range(STEPS):
        last = np.asarray(full(tokens))[rows, LENGTHS + step - 1]
        tokens[rows, LENGTHS + step] = last.argmax(-1)
        found.append((last.argmax(-1), last))
    return tuple(np.stack(arrays) for arrays in zip(*found, strict=True))


def decoded_with(make, mask, forced=None):
    """The same with a cache in each layer; `forced` are the tokens to go on with, else its own."""

    def attend_prompt(caches, layer, query, key, value):
        caches[layer] = make().prefill(key, value, lengths=LENGTHS)
        return kernelry.attention(query, key, value, mask=mask & masks.Lengths(LENGTHS), mode="prefill")

    def attend_step(caches, layer, *qkv):
        out, caches[layer] = caches[layer].decode(*qkv, mask=mask)
        return out

    @jax.jit
    def run(forced):
        caches = [None] * LAYERS
        logits = MODEL.run(TEXT, np.arange(PROMPT)[None], functools.partial(attend_prompt, caches))
        first = logits[np.arange(2), LENGTHS - 1]

        def step(carry, given):
            caches, logits = carry
            token = logits.argmax(-1) if given is None else given
            caches = list(caches)
            place = caches[0].lengths[:, None]
            after = MODEL.run(token[:, None], place, functools.partial(attend_step, caches))
            return (tuple(caches), after[:, 0]), (logits.argmax(-1), logits)

        (caches, _), found = jax.lax.scan(step, (tuple(caches), first), forced, length=STEPS)
        return found, [cache.overflowed for cache in caches]

    found, overflowed = run(forced)
    assert not any(overflowed)
    return found


def sized(make, storage):
    """Makes a cache that just holds the text of the model."""
    if make is two_part:
        create = functools.partial(TwoPartCache.create, prefill=PROMPT, decode=STEPS)
    else:
        create = functools.partial(RollingCache.create, window=WINDOW)
    return functools.partial(create, batch=2, kv_heads=K, head_dim=H, dtype=jnp.float32, storage=storage)


@pytest.mark.parametrize(("make", "mask"), CACHES)
def test_greedy_decoding_with_a_cache_writes_the_same_tokens(make, mask):
    tokens, logits = decoded_with(sized(make, None), mask)
    want_tokens, want_logits = decoded_without(mask)
    np.testing.assert_array_equal(tokens, want_tokens)
    close(logits, want_logits, 1e-4)


ONE_SCALE = (rolling, WINDOWED, "int8:heads_and_head_dim", 0.02)
QUANTIZED = [
    (two_part, masks.Causal(), "int8", 0.02),
    (two_part, masks.Causal(), "float8_e4m3fn", 0.05),
    (two_part, masks.Causal(), "int4", 0.2),
    ONE_SCALE,
]
"""Tolerances are parts of the largest logit, 1.7 to 2 times what was measured on CPU."""


@pytest.mark.parametrize(("make", "mask", "storage", "tolerance"), sweep_but(QUANTIZED, QUANTIZED[0], ONE_SCALE))
def test_decoding_with_a_quantised_cache_has_logits_close_to_those_without(make, mask, storage, tolerance):
    tokens, want = decoded_without(mask)
    _, logits = decoded_with(sized(make, storage), mask, jnp.asarray(tokens))
    close(logits, want, tolerance * np.abs(want).max())
    close(logits[0], want[0], 1e-4)  # the prompt attended to what was not yet quantised


# Arguments of attend


def kernel_sees(cache, tokens, **options):
    """The atoms of the masks that kernels are asked for, part by part."""
    with kernelry.record() as resolutions:
        jax.eval_shape(functools.partial(cache.attend, **options), normal(B, tokens, N, H))
    return [[atom.kind.value for atom in resolution.request.mask.atoms] for resolution in resolutions]


def test_one_token_under_a_causal_mask_asks_for_lengths_only():
    assert kernel_sees(two_part(), 1) == [["lengths"]] * 2
    assert kernel_sees(two_part(), 2) == [["causal", "lengths"]] * 2


def test_the_default_mask_is_causal():
    fed = fed_rows(two_part, 3, (3, 2, 1))
    query, _, _ = fed.stream.piece(fed.starts, fed.counts, 3)
    close(attended(fed.cache, query, lengths=fed.counts), fed.oracle(masks.Causal()).out)


def test_no_mask_shows_every_token_to_every_query():
    fed = fed_rows(two_part, 3, (3, 2, 1))
    query, _, _ = fed.stream.piece(fed.starts, fed.counts, 3)
    close(attended(fed.cache, query, mask=None, lengths=fed.counts), fed.oracle(masks.Full()).out)


def test_no_mask_is_full_on_every_cache():
    paged, view, two, ring, prefix, _ = of_every_kind()
    query = jax.ShapeDtypeStruct((2, 3, 4, 8), jnp.float32)
    for cache in (paged, view, dataclasses.replace(view, shared_pages=1), two):
        for shared in (None, prefix) if getattr(cache, "shared_pages", 0) == 0 else (None,):
            seen = [requests_of(cache, query, mask=mask, prefix=shared) for mask in (None, masks.Full())]
            assert seen[0] == seen[1] != requests_of(cache, query, prefix=shared)
    with pytest.raises(ArgumentError, match=r"mask=Full\(\) may look further back"):
        requests_of(ring, query, mask=None)


def requests_of(cache, query, **options):
    with kernelry.record() as resolutions:
        jax.eval_shape(
            lambda cache, query, shared: cache.attend(query, **{**options, "prefix": shared}),
            cache,
            query,
            options.get("prefix"),
        )
    return [resolution.request for resolution in resolutions]


@pytest.mark.parametrize(("make", "mask"), CACHES)
def test_decode_is_append_then_attend(make, mask):
    before, after = Fed.new(make()).feed("prefill", 5, [5, 3, 0]), fed_rows(make, 1)
    out, cache = decoded(before.cache, *before.stream.piece(after.starts, after.counts, 1), mask=mask)
    close(out, after.attend(mask))
    jax.tree.map(np.testing.assert_array_equal, cache, after.cache)


@pytest.mark.parametrize(("make", "mask"), CACHES)
def test_nothing_of_unwritten_slots_or_of_queries_that_are_no_tokens_leaks(make, mask):
    """All of these are NaN in these tests; a cache without any tokens answers 0."""
    fed = fed_rows(make, 3, (3, 1, 0))
    assert all(np.isnan(array).any() for part in fed.cache.parts(mask, 1) for array in (part.key, part.value))
    out = fed.attend(mask)
    assert np.isfinite(out).all()
    assert not np.any(out[1, 1:])
    empty = make()
    out, largest = attended(empty, normal(B, 1, N, H), mask=mask, return_max_logits=True)
    assert not np.any(out)
    assert np.isneginf(largest).all()


def test_bfloat16_answers_in_bfloat16():
    cache = TwoPartCache.create(batch=B, prefill=2, decode=2, kv_heads=K, head_dim=H)
    new = jnp.ones((B, 1, K, H), jnp.bfloat16)
    out, _ = decoded(cache, jnp.ones((B, 1, N, H), jnp.bfloat16), new, new)
    assert out.dtype == jnp.bfloat16
    close(out, np.ones((B, 1, N, H)))


# Gradients


@pytest.mark.parametrize(
    ("make", "mask", "storage"),
    sweep_but(
        [(*case, storage) for case in CACHES for storage in (None, "int8")],
        (two_part, masks.Causal(), None),
        (rolling, WINDOWED, None),
    ),
)
def test_train_mode_gives_the_gradient_of_the_query(make, mask, storage):
    fed = Fed.new(make(storage), storage).feed("prefill", 5, [5, 3, 1]).feed("append", 3, [3, 2, 1])
    query, _, _ = fed.stream.piece(fed.starts, np.full(B, 3), 3)
    weights = normal(B, 3, N, D, seed=8)

    def loss(query):
        return (fed.cache.attend(query, mask=mask, lengths=fed.counts, mode="train") * weights).sum()

    seen = mask.at(query_offset=fed.starts, kv_offset=0) & masks.Lengths(fed.starts + fed.counts, fed.counts)
    want = reference_gradients(query, *fed.stream.kept(), mask=seen, d_out=weights)
    close(jax.jit(jax.grad(loss))(query), want.query, 2e-5)


def test_train_mode_gives_the_gradients_of_what_was_appended():
    before = Fed.new(two_part()).feed("prefill", 5, [5, 3, 1])
    query, key, value = before.stream.piece(before.counts, np.full(B, 3), 3)
    weights = normal(B, 3, N, D, seed=8)

    def loss(key, value):
        out, _ = before.cache.decode(query, key, value, mode="train")
        return (out * weights).sum()

    got = jax.jit(jax.grad(loss, (0, 1)))(key, value)
    seen = masks.Causal().at(query_offset=before.counts, kv_offset=0) & masks.Lengths(before.counts + 3)
    want = reference_gradients(query, *before.stream.kept(), mask=seen, d_out=weights)
    for mine, whole in zip(got, (want.key, want.value), strict=True):
        for row, start in enumerate(before.counts):
            close(mine[row], whole[row, start : start + 3], 2e-5)


def test_differentiating_in_decode_mode_is_an_error():
    cache = two_part()
    with pytest.raises(ArgumentError, match=r"the gradient of query was not asked for: .* mode='train'"):
        jax.grad(lambda query: cache.attend(query).sum())(normal(B, 1, N, H))


# What is refused


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (masks.Causal() & masks.Lengths(3), ArgumentError, "about the slots of one array"),
        (masks.Segments(np.zeros(3, np.int32)), ArgumentError, "about the slots of one array"),
        (masks.Causal() | ~masks.Dense(np.ones((1, 3), bool)), ArgumentError, "about the slots of one array"),
        (masks.Causal().at(kv_offset=3), ArgumentError, "gives the keys' positions"),
        (np.ones((1, 3), bool), ShapeError, "got bool of shape .* slots of a cache move: use masks of positions"),
    ],
)
def test_masks_about_slots_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        two_part().attend(normal(B, 1, N, H), mask=mask)


@pytest.mark.parametrize("shape", [(B, N, H), (B + 1, 1, N, H)])
def test_a_query_of_another_shape_is_refused(shape):
    with pytest.raises(ShapeError, match=r"query must be \[B, T, N, H\]"):
        two_part().attend(normal(*shape))


def test_lengths_that_mean_nothing_are_refused():
    attend = functools.partial(two_part().attend, normal(B, 2, N, H))
    with pytest.raises(ShapeError, match=r"lengths must be integers \[B\] = \[3\]"):
        attend(lengths=np.ones((B, 1), np.int32))
    with pytest.raises(ArgumentError, match=r"lengths must lie in \[0, 2\]"):
        attend(lengths=jnp.array([3, 0, 0]))


def test_sinks_of_a_partial_are_refused():
    with pytest.raises(ArgumentError, match=r"pass them to kernelry\.finalize"):
        two_part().attend(normal(B, 1, N, H), sinks=np.zeros(N, np.float32), return_partial=True)


def test_a_query_of_another_dtype_is_refused():
    with pytest.raises(ShapeError, match="key must have query's dtype bfloat16, got float32"):
        two_part().attend(jnp.zeros((B, 1, N, H), jnp.bfloat16))


def test_a_kernel_that_cannot_is_refused_by_name():
    with pytest.raises(KernelRefusedError, match="cudnn_jax"):
        two_part().attend(normal(B, 1, N, H), kernel="cudnn_jax")


# What a cache is


@pytest.mark.parametrize(
    ("storage", "numbers", "scales"),
    [(None, 4, 0), ("int8", 1, K), ("int4", 0.5, K), ("int8:heads_and_head_dim", 1, 1)],
)
def test_bytes_are_those_of_all_arrays(storage, numbers, scales):
    slots = B * 15
    values = slots * K * (H + D) * numbers
    lengths = 2 * B * 4 + 1
    assert two_part(storage).bytes == values + slots * 2 * scales * 2 + lengths


@pytest.mark.parametrize(("make", "mask"), CACHES)
def test_a_cache_is_a_pytree_of_arrays(make, mask):
    cache = make("int8")
    leaves, tree = jax.tree.flatten(cache)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    after = jax.eval_shape(type(cache).append, cache, normal(B, 1, K, H), normal(B, 1, K, D))
    assert jax.tree.structure(after) == tree
    assert KVCache in type(cache).__mro__
    assert cache.check() is cache
    with pytest.raises(TypeError, match="unhashable"):
        hash(cache)


@pytest.mark.parametrize("make", [two_part, rolling])
def test_more_queries_than_tokens_are_refused(make):
    cache = fed_rows(make, 1).cache
    with pytest.raises(ArgumentError, match=r"7 queries|\[7, 7, 7\] queries are the last tokens of each row"):
        cache.attend(normal(B, 7, N, H), mask=WINDOWED if make is rolling else masks.Causal())


@pytest.mark.parametrize("make", [two_part, rolling])
def test_what_is_no_array_or_prefix_is_a_shape_error(make):
    cache, query = make(), normal(B, 1, N, H)
    mask = WINDOWED if make is rolling else masks.Causal()
    with pytest.raises(ShapeError, match="query must be an array, got list"):
        cache.attend([[1.0]], mask=mask)
    with pytest.raises(ShapeError, match=r"prefix must be a .*SharedPrefix, got"):
        cache.attend(query, prefix=query, mask=mask)


@pytest.mark.parametrize(("dtype", "words"), [("flot32", "got 'flot32'"), (jnp.int32, "got int32; to quantise keys")])
def test_caches_hold_floating_numbers(dtype, words):
    with pytest.raises(ArgumentError, match=words):
        TwoPartCache.create(batch=1, prefill=2, decode=1, kv_heads=1, head_dim=4, dtype=dtype)


def test_recovered_forgets_that_something_did_not_fit():
    full = dataclasses.replace(two_part(), overflowed=jnp.ones((), bool))
    assert not full.recovered().overflowed


def test_lengths_that_are_known_may_be_closed_over_under_jit():
    fed = fed_rows(two_part, 1)
    query, lengths = jnp.asarray(normal(B, 1, N, H)), jnp.asarray([1, 0, 1])

    def attend(cache, query):
        return cache.attend(query, lengths=lengths)

    np.testing.assert_array_equal(jax.jit(attend)(fed.cache, query), attended(fed.cache, query, lengths=lengths))
    more = lengths + 1
    with pytest.raises(ArgumentError, match=r"lengths must lie in \[0, 1\]"):
        jax.jit(lambda cache, query: cache.attend(query, lengths=more))(fed.cache, query)


# What a cache looks like in a debugger


def of_every_kind():
    kinds = {"kv_heads": 2, "head_dim": 8, "storage": "int8"}
    paged = PagedCache.create(rows=2, pages=9, page_size=4, max_length=32, layers=2, **kinds)
    return (
        paged,
        paged.view(layer=1),
        TwoPartCache.create(batch=2, prefill=64, decode=64, **kinds),
        RollingCache.create(batch=2, window=64, **kinds),
        SharedPrefix(jnp.zeros((64, 2, 8)), jnp.zeros((64, 2, 8))),
        kernelry.Partial(jnp.zeros((2, 6, 4, 8)), jnp.zeros((2, 4, 6))),
    )


def test_caches_are_shown_by_shapes_and_counts():
    held = "2 x QuantizedArray(int8:head_dim, shape=[9, 4, 2, 8], scale=bfloat16)"
    assert repr(of_every_kind()[0]) == (
        f"PagedCache(keys={held}, values={held}, table=[[-1, -1, -1, -1, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1, -1, "
        "-1]], lengths=[0, 0], references=[0, 0, 0, 0, 0, 0, 0, 0, 0], overflowed=False, max_length=32, "
        "layout='separate', value_width=None)"
    )
    assert repr(of_every_kind()[-1]) == (
        "Partial(out=float32[2, 6, 4, 8], lse=float32[2, 4, 6], max=None, sum=None, max_logits=None, dtype='float32', "
        "lse_rest=None)"
    )
    assert [shown for shown in of_every_kind() if len(repr(shown)) > 600 or "Array([" in repr(shown)] == []


def test_caches_are_shown_whatever_stands_in_their_fields():
    shown = []
    jax.eval_shape(lambda caches: shown.extend(map(repr, caches)), of_every_kind())
    shown.extend(map(repr, jax.tree.map(lambda _: None, of_every_kind())))
    assert [len(text) for text in shown if len(text) > 700] == []
    assert "lengths=int32[2]" in shown[0]
    assert "keys=2 x QuantizedArray(None, None)" in shown[6]
