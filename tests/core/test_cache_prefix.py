"""SharedPrefix: one Partial over tokens that all rows share is as good as a copy of them in every row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import PREFIX, WINDOW, B, D, Fed, H, K, N, close, normal, prefix_of, rolling, two_part
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry import masks
from kernelry.cache import SharedPrefix
from kernelry.errors import ArgumentError, ShapeError

MASKS = {
    two_part: [masks.Causal(), masks.SlidingWindow(6), masks.Chunked(4), masks.PrefixLM(3), masks.Full()],
    rolling: [masks.SlidingWindow(WINDOW - 1), masks.Chunked(WINDOW)],
}
OPTIONS = [{}, {"sinks": normal(N, seed=9)}, {"soft_cap": 2.0}]


def counts(most):
    return st.lists(st.integers(0, most), min_size=B, max_size=B)


# Laws


@pytest.mark.parametrize(
    ("make", "mask", "shared", "options"),
    [
        (two_part, masks.Causal(), "int4", OPTIONS[1]),
        (two_part, masks.SlidingWindow(6), None, OPTIONS[2]),
        (rolling, masks.Chunked(WINDOW), None, OPTIONS[0]),
    ],
)
@given(prompt=counts(5), chunk=counts(3))
@settings(max_examples=5, deadline=None)
def test_a_shared_prefix_is_a_prefix_of_every_row(make, mask, shared, options, prompt, chunk):
    """Queries of one number, so that all examples share their programs."""
    check = functools.partial(Fed.check, mask=mask, prefix=prefix_of(shared), **options)
    fed = Fed.new(make()).feed("prefill", 5, prompt)
    check(fed.last(3))
    check(fed.feed("append", 3, chunk))


@pytest.mark.sweep
@pytest.mark.parametrize("make", [two_part, rolling])
@given(
    data=st.data(),
    storage=st.sampled_from([None, "int8"]),
    shared=st.sampled_from([None, "int4"]),
    options=st.sampled_from(OPTIONS),
    prompt=counts(5),
    chunk=counts(3),
    step=counts(1),
)
@settings(max_examples=5, deadline=None)
def test_a_shared_prefix_of_any_storage_is_a_prefix_of_every_row(
    make, data, storage, shared, options, prompt, chunk, step
):
    check = functools.partial(
        Fed.check, mask=data.draw(st.sampled_from(MASKS[make])), prefix=prefix_of(shared), **options
    )
    fed = Fed.new(make(storage), storage).feed("prefill", 5, prompt)
    check(fed.last(3))
    fed = check(fed.feed("append", 3, chunk))
    check(fed.feed("append", 1, step))


@pytest.mark.sweep
@pytest.mark.parametrize("mask", MASKS[two_part], ids=repr)
@pytest.mark.parametrize("tokens", [1, 3])
def test_it_equals_the_prefix_copied_into_every_row(mask, tokens):
    """Without lengths: every row is full, and the queries of all rows are joined as they are."""
    prefix, ones = prefix_of(), np.ones(B, np.int32)
    fed = Fed.new(two_part()).feed("prefill", 3, 3 * ones).feed("append", tokens, tokens * ones)
    query, _, _ = fed.stream.piece(fed.starts, fed.counts, tokens)
    key, value = (jnp.asarray(array[:, : PREFIX + 3 + tokens]) for array in fed.stream.kept(prefix))
    copied = kernelry.attention(query, key, value, mask=mask.at(query_offset=PREFIX + 3), sinks=OPTIONS[1]["sinks"])
    close(fed.cache.attend(query, mask=mask, prefix=prefix, sinks=OPTIONS[1]["sinks"]), copied)


def test_rows_without_tokens_of_their_own_see_the_prefix():
    fed = Fed.new(two_part()).feed("append", 1, [1, 0, 1])
    out = fed.attend(masks.Causal(), prefix=prefix_of())
    close(out, fed.oracle(masks.Causal(), prefix=prefix_of()).out)
    assert not np.any(out[1])


def test_a_window_leaves_the_prefix_behind():
    """Once the window has moved on, the prefix changes nothing, not even by being NaN."""
    nothing = SharedPrefix(jnp.full((PREFIX, K, H), jnp.nan), jnp.full((PREFIX, K, D), jnp.nan))
    fed = Fed.new(rolling()).feed("prefill", 9, [9, 8, 4]).last(1)
    mask = masks.SlidingWindow(WINDOW - 1)
    close(fed.attend(mask, prefix=nothing), fed.attend(mask))


@pytest.mark.sweep
def test_it_crosses_jit_and_decode():
    fed, ones = Fed.new(two_part()), np.ones(B, np.int32)
    before = fed.feed("prefill", 5, [2, 5, 0])
    after = before.feed("append", 1, ones)
    step = jax.jit(lambda cache, prefix, *qkv: cache.decode(*qkv, prefix=prefix, mask=masks.SlidingWindow(6)))
    out, cache = step(before.cache, prefix_of("int8"), *fed.stream.piece(after.starts, ones, 1))
    close(out, after.oracle(masks.SlidingWindow(6), prefix=prefix_of("int8")).out)
    np.testing.assert_array_equal(cache.lengths, after.cache.lengths)


def test_the_queries_of_all_rows_meet_the_prefix_as_one_row():
    fed = Fed.new(two_part()).feed("prefill", 5, [2, 5, 0]).feed("append", 3, [3, 3, 3])
    with kernelry.record() as resolutions:
        jax.eval_shape(functools.partial(fed.attend, masks.Causal()), prefix=prefix_of())
    request = resolutions[-1].request
    assert (request.batch, request.q_len, request.kv_len) == (1, 3 * B, PREFIX)
    assert not request.mask.atoms  # every query stands behind it


@pytest.mark.sweep
def test_its_gradient_is_that_of_the_copies():
    fed = Fed.new(two_part()).feed("prefill", 3, [3, 2, 1]).feed("append", 3, [3, 1, 2])

    kept = fed.stream.kept()

    def loss(prefix):
        return jnp.sin(fed.attend(masks.SlidingWindow(6), prefix=prefix, mode="train")).sum()

    def copied(prefix):
        query, _, _ = fed.stream.piece(fed.starts, fed.counts, 3)
        key, value = (
            jnp.concatenate([jnp.repeat(shared[None], B, 0), jnp.asarray(own)], 1)
            for shared, own in zip((prefix.key, prefix.value), kept, strict=True)
        )
        seen = masks.SlidingWindow(6).at(query_offset=fed.starts + PREFIX, kv_offset=0)
        lengths = masks.Lengths(fed.starts + fed.counts + PREFIX, fed.counts)
        return jnp.sin(kernelry.attention(query, key, value, mask=seen & lengths)).sum()

    got, want = (jax.jit(jax.grad(function))(prefix_of()) for function in (loss, copied))
    close(got.key, want.key, 1e-5)
    close(got.value, want.value, 1e-5)


# What is refused


def traced(**options):
    """Traces attention behind a prefix: what is refused is refused before anything runs."""
    jax.eval_shape(lambda prefix: two_part().attend(normal(B, 1, N, H), prefix=prefix, **options), prefix_of())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks.PrefixLM(np.array([1, 2, 3])), "has arrays, which belong to rows"),
        (masks.Causal() & masks.BlockSelection(np.ones((B, 1, 1, 3), bool), 8), "has arrays"),
        (masks.Causal().at(query_offset=4), "gives the queries' positions; .* leave .at out"),
        (masks.Full() & masks.Causal().at(query_offset=jnp.int32(4)), "gives the queries' positions"),
    ],
)
def test_masks_of_rows_are_refused(mask, message):
    with pytest.raises(ArgumentError, match=message):
        traced(mask=mask)


def test_the_largest_logits_of_rows_are_refused():
    with pytest.raises(ArgumentError, match="rows are joined; attend without it"):
        traced(return_max_logits=True)


@pytest.mark.parametrize("shapes", [((5, K, H), (4, K, D)), ((1, 5, K, H), (1, 5, K, D)), ((5, H), (5, D))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ShapeError, match=r"SharedPrefix: key and value must be \[P, K, H\] and \[P, K, D\]"):
        SharedPrefix(*map(jnp.zeros, shapes))


@pytest.mark.parametrize("shapes", [((4, K), (4, K, D)), ((4, K, H), (4, K)), ((4, K, H), (5, K, D))])
def test_a_prefix_of_another_rank_or_length_says_what_was_found(shapes):
    with pytest.raises(ShapeError, match=r"key and value must be \[P, K, H\] and \[P, K, D\]"):
        SharedPrefix(*(jnp.ones(shape) for shape in shapes))
