"""TwoPartCache: however tokens come in, attention is that over each row's whole stream."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import STORAGES, B, D, Fed, H, K, N, attended, close, normal, two_part, written
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import sweep_but

from kernelry import masks
from kernelry.cache import TwoPartCache
from kernelry.errors import ArgumentError, CacheFullError, ShapeError

MASKS = [
    masks.Causal(),
    masks.SlidingWindow(2),
    masks.SlidingWindow(3, 1),
    masks.Chunked(3),
    masks.PrefixLM(4),
    masks.Full(),
    masks.Chunked(4) | masks.SlidingWindow(1),
]
OPTIONS = [{}, {"soft_cap": 2.0}, {"sinks": normal(N, seed=9)}, {"scale": 0.5}]


def counts(most):
    return st.lists(st.integers(0, most), min_size=B, max_size=B)


def tokens(count, seed=1, batch=B):
    return normal(batch, count, K, H, seed=seed), normal(batch, count, K, D, seed=seed + 1)


# Laws


@pytest.mark.parametrize(
    ("mask", "options"), [(masks.SlidingWindow(3, 1), OPTIONS[2]), (masks.Causal(), OPTIONS[1] | OPTIONS[3])]
)
@given(pieces=st.lists(counts(3), min_size=3, max_size=3), steps=st.lists(counts(1), min_size=1, max_size=2))
@settings(max_examples=6, deadline=None)
def test_pieces_of_three_tokens_are_the_whole(mask, options, pieces, steps):
    """Pieces of one length, so that all examples share their programs."""
    fed = Fed.new(two_part())
    for method, piece in zip(("prefill", "prefill_chunk", "append"), pieces, strict=True):
        fed = fed.feed(method, 3, piece).check(mask, **options)
    for step in steps:
        fed = fed.feed("append", 1, step).check(mask, **options)
    assert not fed.cache.check().overflowed


@pytest.mark.sweep
@given(
    storage=st.sampled_from(STORAGES),
    mask=st.sampled_from(MASKS),
    options=st.sampled_from(OPTIONS),
    prompt=counts(5),
    chunk=counts(3),
    speculated=counts(3),
    steps=st.lists(counts(1), min_size=1, max_size=3),
)
@settings(max_examples=12, deadline=None)
def test_any_split_into_prefill_chunks_and_appends_is_the_whole(
    storage, mask, options, prompt, chunk, speculated, steps
):
    fed = Fed.new(two_part(storage), storage)
    fed = fed.feed("prefill", 5, prompt).check(mask, mode="prefill", **options) if any(prompt) else fed
    fed = fed.feed("prefill_chunk", 3, chunk).check(mask, **options)
    fed = fed.feed("append", 3, speculated).check(mask, **options)
    for step in steps:
        fed = fed.feed("append", 1, step).check(mask, **options)
    assert not fed.cache.check().overflowed


@pytest.mark.sweep
@pytest.mark.parametrize("storage", STORAGES)
def test_prefill_starts_every_row_afresh(storage):
    fed = Fed.new(two_part(storage), storage).feed("prefill", 8, [8, 7, 6]).feed("append", 3, [3, 2, 1])
    fed = fed.feed("prefill", 5, [0, 3, 5]).check(masks.Causal())
    fed.feed("append", 1, [1, 1, 0]).check(masks.Causal())


def test_rows_without_lengths_are_full():
    key, value = tokens(4)
    cache = jax.jit(lambda cache: cache.prefill(key, value).append(key[:, :2], value[:, :2]))(two_part())
    np.testing.assert_array_equal(cache.prefill_lengths, [4] * B)
    np.testing.assert_array_equal(cache.lengths, [6] * B)


def test_decoded_tokens_stand_behind_a_short_prompt():
    key, value = tokens(2)
    fill = jax.jit(lambda cache: cache.prefill(key, value, lengths=np.array([2, 1, 0])).append(key, value))
    cache = fill(two_part())
    close(cache.decode_key[:, :2], key)
    _, decoded = cache.parts(masks.Causal(), 1)
    np.testing.assert_array_equal(decoded.offset, [2, 1, 0])


@pytest.mark.sweep
def test_a_cache_crosses_jit_scan_and_donation():
    """The carry of a scan has fixed types, and donated buffers must not be shared among the leaves."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, prompt, steps):
        def step(cache, inputs):
            out, cache = cache.decode(*inputs)
            return cache, out

        return jax.lax.scan(step, cache.prefill(*prompt[1:]), steps)

    fed = Fed.new(two_part())
    ones = np.ones(B, np.int32)
    prompt = fed.stream.piece(0 * ones, 4 * ones, 4)
    singles = [fed.stream.piece(place * ones, ones, 1) for place in range(4, 8)]
    empty = two_part()
    cache, out = run(empty, prompt, [jnp.stack(arrays) for arrays in zip(*singles, strict=True)])
    assert empty.prefill_key.is_deleted()
    assert not cache.check().overflowed
    want = dataclasses.replace(fed, starts=4 * ones, counts=4 * ones, tokens=4).oracle(masks.Causal())
    close(out[:, :, 0].swapaxes(0, 1), want.out)


@pytest.mark.parametrize("level", [-1e9, 1e9])
def test_both_parts_weigh_as_many_keys_as_they_have_beside_large_logits(level):
    query, key = jnp.full((B, 1, N, H), level / H), jnp.ones((B, 4, K, H))
    value = normal(B, 4, K, D)
    cache = written(two_part(), key[:, :3], value[:, :3], np.full(B, 3), method="prefill")
    cache = written(cache, key[:, 3:], value[:, 3:], np.ones(B, int), method="append")
    out = attended(cache, query, scale=1.0, mask=None)
    close(out, np.repeat(np.asarray(value, np.float64).mean(axis=1, keepdims=True), N // K, axis=2))


def test_bfloat16_is_the_default():
    cache = TwoPartCache.create(batch=1, prefill=2, decode=1, kv_heads=1, head_dim=4)
    assert (cache.prefill_key.dtype, cache.decode_value.shape) == (jnp.bfloat16, (1, 1, 1, 4))


# What does not fit


def leaves(cache):
    return [np.array(leaf) for leaf in jax.tree.leaves(cache)]


def assert_unchanged(cache, before, *, flagged=False):
    *arrays, overflowed = leaves(cache)
    jax.tree.map(np.testing.assert_array_equal, arrays, before[:-1])
    assert overflowed == flagged


@functools.cache
def begun():
    return written(two_part(prefill=3, decode=2), *tokens(2), np.full(B, 2), method="prefill")


@functools.cache
def nearly_full():
    return written(begun(), *tokens(2), np.array([1, 0, 1]))


@pytest.mark.parametrize("method", ["append", "prefill_chunk"])
def test_overflow_raises_and_leaves_the_cache_as_it_was(method):
    cache = nearly_full() if method == "append" else begun()
    before = leaves(cache)
    part = {"append": "decode", "prefill_chunk": "prefill"}[method]
    with pytest.raises(CacheFullError, match=rf"\[2, 2, 0\] more tokens .* {part} part .* larger {part}="):
        getattr(cache, method)(*tokens(2), lengths=np.array([2, 2, 0]))
    assert_unchanged(cache, before)


@pytest.mark.parametrize("method", ["append", "prefill_chunk"])
def test_overflow_under_jit_writes_nothing_and_poisons_for_good(method):
    cache = nearly_full() if method == "append" else begun()
    full = written(cache, *tokens(2), np.full(B, 2), method=method)
    assert_unchanged(full, leaves(cache), flagged=True)
    query = normal(B, 1, N, H)
    out, largest = attended(full, query, return_max_logits=True)
    assert np.isnan(out).all()
    assert np.isnan(largest).all()
    assert np.isnan(attended(full, query, return_partial=True).out).all()
    later = written(written(full, *tokens(2), np.ones(B, int), method="prefill"), *tokens(2), np.ones(B, int))
    assert np.isnan(attended(later, query, return_max_logits=True)[0]).all()
    with pytest.raises(CacheFullError, match="TwoPartCache: tokens were appended that did not fit"):
        later.check()


def test_a_row_that_decoded_takes_no_more_of_a_prompt():
    cache = nearly_full()
    with pytest.raises(ArgumentError, match=r"rows \[0, 2\] have decoded"):
        cache.prefill_chunk(*tokens(1))
    assert written(cache, *tokens(2), np.ones(B, int), method="prefill_chunk").overflowed
    after = cache.prefill_chunk(*tokens(1), lengths=np.array([0, 1, 0]))
    np.testing.assert_array_equal(after.lengths, [3, 3, 3])


@pytest.mark.parametrize(
    ("method", "part"), [("append", "decode"), ("prefill", "prefill"), ("prefill_chunk", "prefill")]
)
def test_more_tokens_than_slots_are_refused_while_tracing(method, part):
    with pytest.raises(CacheFullError, match=rf"4 tokens per row do not fit .* larger {part}="):
        jax.eval_shape(getattr(two_part(prefill=3, decode=2), method), *tokens(4))


@pytest.mark.parametrize(
    ("method", "traced"),
    sweep_but(
        [(method, traced) for method in ("append", "prefill", "prefill_chunk") for traced in (False, True)],
        *(("append", True), ("prefill", False), ("prefill", True), ("prefill_chunk", True)),
    ),
)
def test_columns_beyond_the_slots_count_only_where_they_are_tokens(method, traced):
    cache, new, fitting, long = two_part(prefill=3, decode=3), tokens(5), np.array([3, 1, 0]), np.array([3, 4, 0])
    call = getattr(type(cache), method)
    call = jax.jit(call) if traced else call
    after = call(cache, *new, lengths=jnp.asarray(fitting)).check()
    np.testing.assert_array_equal(after.lengths, fitting)
    whole = written(two_part(prefill=5, decode=5), *new, fitting, method=method)
    for found, wanted in zip(after.parts(masks.Causal(), 1), whole.parts(masks.Causal(), 1), strict=True):
        np.testing.assert_array_equal(found.lengths, wanted.lengths)
        for row, count in enumerate(np.asarray(found.lengths)):
            np.testing.assert_array_equal(found.key[row, :count], wanted.key[row, :count])
            np.testing.assert_array_equal(found.value[row, :count], wanted.value[row, :count])
    if traced:
        assert_unchanged(call(after, *new, lengths=jnp.asarray(long)), leaves(after), flagged=True)
    else:
        with pytest.raises(CacheFullError, match="more tokens do not fit"):
            call(after, *new, lengths=long)


@pytest.mark.parametrize("method", ["append", "prefill", "prefill_chunk"])
def test_tokens_of_another_shape_are_refused(method):
    call = getattr(two_part(), method)
    key, value = tokens(2)
    with pytest.raises(ShapeError, match=r"key must be \[B, T, 2, 8\] with B=3"):
        call(key[:2], value)
    with pytest.raises(ShapeError, match=r"value must be \[B, T, 2, 6\]"):
        call(key, key)
    with pytest.raises(ShapeError, match="key has T=2 tokens and value 1"):
        call(key, value[:, :1])
    with pytest.raises(ShapeError, match="key must be a floating array"):
        call(key.astype(np.int32), value)


@pytest.mark.parametrize("method", ["append", "prefill", "prefill_chunk"])
def test_lengths_that_mean_nothing_are_refused(method):
    call = functools.partial(getattr(two_part(), method), *tokens(2))
    with pytest.raises(ShapeError, match=r"lengths must be integers \[B\] = \[3\], got float32"):
        call(lengths=np.ones(B, np.float32))
    with pytest.raises(ShapeError, match=r"lengths must be integers \[B\] = \[3\]"):
        call(lengths=np.array([1, 1]))
    with pytest.raises(ArgumentError, match=r"lengths must lie in \[0, 2\], .* got \[1, 3, 0\]"):
        call(lengths=np.array([1, 3, 0]))


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(ArgumentError, match="TwoPartCache: decode must be an integer ≥ 1, got 0"):
        two_part(decode=0)
    with pytest.raises(ArgumentError, match="unknown dtype 'int3'"):
        two_part("int3")
    with pytest.raises(ArgumentError, match="TwoPartCache: value_dim must be an integer ≥ 1, got 0"):
        TwoPartCache.create(batch=1, prefill=1, decode=1, kv_heads=1, head_dim=8, value_dim=0, dtype=np.float32)
