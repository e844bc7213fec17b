"""Caches inside a user's own `shard_map`: of rows and heads of each shard, written and read with `check_vma=True`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded_cases import BY_HEAD, PLAIN, B, H, K, N, mesh, normal, place

from kernelry import masks
from kernelry.cache import PagedCache, RollingCache, SharedPrefix, TwoPartCache

PROMPT, STEPS, WINDOW = 6, 3, 4
LENGTHS = np.array([6, 4])


def two_part(**sizes):
    return TwoPartCache.create(prefill=8, decode=4, **sizes)


def rolling(**sizes):
    return RollingCache.create(window=WINDOW, **sizes)


def paged(*, batch, **sizes):
    """A pool of each shard's own: the pages of its rows."""
    return PagedCache.create(rows=batch, pages=6 * batch, page_size=4, max_length=16, **sizes)


TOKENS = tuple(normal(B, PROMPT + STEPS, heads, H, seed=seed) for seed, heads in enumerate((N, K, K)))


def filled(make, storage, key, value, lengths):
    cache = make(batch=key.shape[0], kv_heads=key.shape[2], head_dim=H, dtype=jnp.float32, storage=storage)
    write = cache.append if make is paged else cache.prefill
    return write(key[:, :PROMPT], value[:, :PROMPT], lengths=lengths)


def options_of(make):
    return {"mask": masks.SlidingWindow(WINDOW - 1)} if make is rolling else {}


def decoded(make, storage, kernel, tokens, lengths):
    """A prompt, then one token at a time: [STEPS, B, 1, N, H]."""

    def step(cache, at):
        query, key, value = (jax.lax.dynamic_slice_in_dim(array, at, 1, axis=1) for array in tokens)
        cache = cache.append(key, value)
        return cache, cache.attend(query, kernel=kernel, **options_of(make))

    cache = filled(make, storage, *tokens[1:], lengths)
    return jax.lax.scan(step, cache, PROMPT + jnp.arange(STEPS))[1]


CASES = list(itertools.product((two_part, rolling, paged), (None, "int8"), (*PLAIN, "ragged", "pallas_decode")))
SAMPLE = {
    (two_part, None, "dot_product"),
    (two_part, "int8", "dot_product"),
    (rolling, None, "pallas_decode"),
    (paged, None, "ragged"),
}


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize(
    ("make", "storage", "kernel"),
    [pytest.param(*case, marks=[] if case in SAMPLE else [pytest.mark.sweep]) for case in CASES],
)
def test_a_cache_in_a_shard_map_decodes_as_the_whole_cache(make, storage, kernel):
    run = functools.partial(decoded, make, storage, kernel)
    mapped = jax.shard_map(run, mesh=mesh(), in_specs=(BY_HEAD, P("batch")), out_specs=P(None, *BY_HEAD))
    with place(kernel):
        found, wanted = jax.jit(mapped)(TOKENS, LENGTHS), jax.jit(run)(TOKENS, LENGTHS)
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("make", [two_part, rolling, paged])
def test_a_cache_leaves_a_shard_map_over_heads_and_enters_the_next(make):
    """Keys and values are the heads' of each device, lengths and tables every device's."""
    options = options_of(make)
    prefix = SharedPrefix(normal(5, K, H, seed=7), normal(5, K, H, seed=8)) if make is not rolling else None

    def prefill(key, value, lengths):
        return filled(make, None, key, value, lengths)

    def step(cache, prefix, query, key, value):
        cache = cache.append(key, value)
        return cache, cache.attend(query, prefix=prefix, kernel="blockwise", **options)

    prompt, last = (TOKENS[1], TOKENS[2], LENGTHS), [array[:, PROMPT : PROMPT + 1] for array in TOKENS]
    wanted = jax.jit(lambda: step(prefill(*prompt), prefix, *last)[1])()
    shapes = jax.eval_shape(prefill, *prompt)
    by_head, of_prefix = P(None, None, "heads"), P(None, "heads")
    of_cache = jax.tree.map(lambda array: by_head if array.ndim == 4 else P(), shapes)
    sharded = functools.partial(jax.shard_map, mesh=mesh())
    cache = jax.jit(sharded(prefill, in_specs=(by_head, by_head, P()), out_specs=of_cache))(*prompt)
    specs = (of_cache, of_prefix, by_head, by_head, by_head)
    cache, found = jax.jit(sharded(step, in_specs=specs, out_specs=(of_cache, by_head)))(cache, prefix, *last)
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + 1)


def chunked(cache, key, value, lengths):
    return cache.prefill_chunk(key[:, :4], value[:, :4], lengths=lengths - 2)


def in_chunks_of_all(cache, key, value, lengths):
    return cache.prefill_chunk(key[:, :4], value[:, :4]).prefill_chunk(key[:, 4:6], value[:, 4:6])


def longer(cache, key, value, lengths):
    """More tokens than slots, of which few are real."""
    return cache.prefill(key, value, lengths=lengths)


def whole(cache, key, value, lengths):
    return cache.prefill(key[:, :6], value[:, :6])


@pytest.mark.parametrize("write", [chunked, in_chunks_of_all, longer, whole])
def test_what_was_written_first_is_the_carry_of_a_scan_of_steps(write):
    """`lax.scan` in a shard_map compares over which axes the cache varies before and after a step."""

    def run(key, value, lengths):
        empty = two_part(batch=key.shape[0], kv_heads=key.shape[2], head_dim=H, dtype=jnp.float32)
        cache = write(empty, key, value, lengths)
        step = key[:, :1], value[:, :1]
        return jax.lax.scan(lambda cache, _: (cache.append(*step), None), cache, length=2)[0].decode_key

    mapped = jax.shard_map(run, mesh=mesh(), in_specs=(BY_HEAD, BY_HEAD, P("batch")), out_specs=BY_HEAD)
    assert jax.eval_shape(mapped, *TOKENS[1:], LENGTHS).shape == (B, 4, K, H)
