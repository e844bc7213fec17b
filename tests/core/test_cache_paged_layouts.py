"""PagedCache whose values are stored with the keys: every operation gives what the oracle says of each row alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import masks
from kernelry.cache import PagedCache, QuantizedArray, RollingCache, SharedPrefix, TwoPartCache, ValueInKey
from kernelry.errors import ArgumentError, CacheFullError, ShapeError
from kernelry.testing import reference_attention

R, N, K, H, D, SIZE, PAGES = 4, 4, 2, 8, 6, 4, 16
CAUSAL = masks.Causal()
RAGGED = np.array([9, 4, 0, 14])
HELD = {
    "value_in_key": {"layout": "value_in_key", "value_dim": D},
    "value_in_key, int8": {"layout": "value_in_key", "value_dim": D, "storage": "int8"},
    "interleaved": {"layout": "interleaved"},
}


def cache_of(name, **changes):
    sizes = {"rows": R, "pages": PAGES, "page_size": SIZE, "max_length": 30, "kv_heads": K, "head_dim": H}
    return PagedCache.create(**{**sizes, "dtype": jnp.float32, **HELD[name], **changes})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens(cache, seed, count, rows=R):
    key, value = normal(seed, rows, count, K, H), normal(seed + 100, rows, count, K, H)
    return key, None if cache.layout == "value_in_key" else value


def query_of(seed, count, rows=R):
    return normal(seed + 1000, rows, count, N, H)


append, prefill, fork, free = (jax.jit(getattr(PagedCache, name)) for name in ("append", "prefill", "fork", "free"))


@functools.partial(jax.jit, static_argnames=("pages", "layer", "mask"))
def attended(cache, query, rows=None, pages=0, layer=0, **options):
    return cache.view(rows, layer, pages).attend(query, **options)


def appended(cache, counts, seed=0):
    return append(cache, *tokens(cache, seed, 14), lengths=jnp.asarray(counts, jnp.int32)).check()


@functools.cache
def ragged(name):
    return appended(appended(cache_of(name), RAGGED // 2, seed=1), RAGGED - RAGGED // 2, seed=2)


def contents(cache, row, layer=0):
    """The keys and values of a row from the definition of the layouts, [1, L, K, H] and [1, L, K, D]."""
    held, length = cache.keys[layer], int(cache.lengths[row])
    plain = np.asarray(held.dequantize() if isinstance(held, QuantizedArray) else held)
    both = plain[np.asarray(cache.table[row])].reshape(1, -1, *plain.shape[2:])[:, :length]
    return (both[:, :, ::2], both[:, :, 1::2]) if cache.layout == "interleaved" else (both, both[..., :D])


def assert_rows(out, cache, query, rows=range(R), *, layer=0, prefix=None, mask=CAUSAL):
    """Every row with enough tokens equals the oracle; an empty one is 0."""
    count = query.shape[1]
    for place, row in enumerate(rows):
        length = int(cache.lengths[row])
        if length == 0:
            np.testing.assert_array_equal(out[place], 0)
        if length < count:
            continue
        key, value = contents(cache, row, layer)
        if prefix is not None:
            key, value = (
                np.concatenate([first[None], own], axis=1) for first, own in zip(prefix, (key, value), strict=True)
            )
        placed = mask.at(query_offset=key.shape[1] - count)
        wanted = reference_attention(query[row : row + 1], key, value, mask=placed).out[0]
        np.testing.assert_allclose(np.asarray(out[place]), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", list(HELD))
def test_rows_equal_the_oracle_after_appends_forks_frees_and_prefills(name):
    cache, query = ragged(name), query_of(0, 1)
    assert_rows(attended(cache, query), cache, query)
    cache = appended(free(fork(cache, 3, 2), 0), [3, 1, 2, 1], seed=3)
    assert cache.lengths.tolist() == [3, 5, 16, 15]
    for count in (1, 3):
        query = query_of(count, count)
        assert_rows(attended(cache, query), cache, query)
    window = masks.SlidingWindow(4, 0)
    assert_rows(attended(cache, query, mask=window), cache, query, mask=window)
    cache = prefill(cache, *tokens(cache, 5, 14), lengths=jnp.array([14, 2, 0, 5]))
    query = query_of(2, 2)
    assert_rows(attended(cache, query), cache, query)


@pytest.mark.parametrize("name", list(HELD))
def test_what_was_appended_is_what_is_held(name):
    cache = cache_of(name, storage=None)
    key, value = tokens(cache, 0, 14)
    cache = append(cache, key, value, lengths=jnp.asarray(RAGGED, jnp.int32))
    found = contents(cache, 3)
    np.testing.assert_array_equal(found[0][0], key[3, :14])
    np.testing.assert_array_equal(found[1][0], key[3, :14, :, :D] if value is None else value[3, :14])
    assert cache.values == ()


@pytest.mark.parametrize("name", list(HELD))
def test_layers_and_views_of_rows(name):
    cache = cache_of(name, layers=2).allocate(jnp.array([5, 3, 0, 7]))
    for layer in range(2):
        cache = cache.write(layer, *tokens(cache, layer, 7), lengths=jnp.array([5, 3, 0, 7]))
    query = query_of(0, 2)
    for layer in range(2):
        assert_rows(attended(cache, query, layer=layer), cache, query, layer=layer)
    rows = jnp.array([3, 0])
    some = attended(cache, query[np.array([3, 0])], rows, layer=1)
    assert_rows(some, cache, query, [3, 0], layer=1)
    one = cache_of(name)
    new = tokens(one, 4, 3, rows=2)
    after = one.view(rows).append(*new, lengths=jnp.array([2, 3])).cache
    assert after.lengths.tolist() == [3, 0, 0, 2]


@pytest.mark.parametrize("name", list(HELD))
def test_shared_pages_and_a_prefix_equal_the_oracle(name):
    cache = fork(fork(appended(cache_of(name), [9, 0, 0, 0], seed=1), 0, 1), 0, 3, 8)
    cache, query = appended(cache, [1, 4, 0, 4], seed=2), query_of(0, 1)
    assert_rows(attended(cache, query, pages=2), cache, query)
    key, value = normal(7, 3, K, H), normal(8, 3, K, H)
    if cache.layout == "value_in_key":
        prefix, held = SharedPrefix(key, ValueInKey(D)), (key, key[..., :D])
    else:
        prefix, held = SharedPrefix(key, value), (key, value)
    out = jax.jit(lambda cache, query, prefix: cache.attend(query, prefix=prefix))(cache, query, prefix)
    rows = [0, 1, 3]
    assert_rows(out[np.array(rows)], cache, query, rows, prefix=held)


def step_of(cache, inputs):
    query, *new = inputs
    out, cache = cache.decode(query, *new)
    return cache, out


step = jax.jit(step_of, donate_argnums=0)


@pytest.mark.parametrize("name", list(HELD))
def test_a_scan_of_decode_steps_equals_one_after_another(name):
    start = fork(ragged(name), 3, 2)
    each = [(query_of(seed, 1), *tokens(start, seed, 1)) for seed in range(4)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    cache, outs = jax.jit(lambda cache, inputs: jax.lax.scan(step_of, cache, inputs))(start, stacked)
    start = jax.tree.map(jnp.copy, start)
    for place, inputs in enumerate(each):
        start, out = step(start, inputs)
        np.testing.assert_allclose(outs[place], out, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(*map(jax.tree.leaves, (cache, start)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", list(HELD))
def test_donated_pages_are_written_in_place(name):
    cache = jax.tree.map(jnp.copy, ragged(name))
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.keys)]
    query = query_of(0, 1)
    after, out = step(cache, (query, *tokens(cache, 0, 1)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert places == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.keys)]
    assert_rows(out, after, query)


@pytest.mark.parametrize("name", ["value_in_key", "interleaved"])
def test_no_operation_on_the_program_of_a_write_is_as_large_as_the_pages(name):
    """Written in place: the program copies no pages, whichever operations make the new tokens."""
    cache = cache_of(name, pages=512)
    new = tokens(cache, 0, 1)
    program = jax.jit(PagedCache.append, donate_argnums=0).lower(cache, *new).compile()
    pages = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.keys))
    assert program.memory_analysis().temp_size_in_bytes < pages / 4
    assert program.memory_analysis().alias_size_in_bytes >= pages


def test_bytes_are_those_of_what_is_held():
    separate = PagedCache.create(
        rows=R, pages=PAGES, page_size=SIZE, max_length=30, kv_heads=K, head_dim=H, dtype=jnp.float32
    )
    slots = PAGES * SIZE * K
    book = separate.bytes - slots * 2 * H * 4
    assert cache_of("value_in_key").bytes == book + slots * H * 4
    assert cache_of("value_in_key, int8").bytes == book + slots * (H + 2)
    assert cache_of("interleaved").bytes == separate.bytes


@pytest.mark.parametrize("name", list(HELD))
def test_under_jit_what_does_not_fit_is_not_written(name):
    cache = ragged(name)
    after = append(cache, *tokens(cache, 0, 14), lengths=jnp.array([14, 14, 14, 14]))
    assert after.overflowed
    assert after.lengths.tolist() == RAGGED.tolist()
    with pytest.raises(CacheFullError):
        after.check()
    assert np.isnan(attended(after, query_of(0, 1))).all()


@pytest.mark.parametrize("name", list(HELD))
def test_what_others_left_in_a_page_never_leaks(name):
    bad = cache_of(name)
    new = jax.tree.map(lambda array: jnp.full_like(array, np.nan), tokens(bad, 0, 14))
    cache = free(prefill(bad, *new, lengths=jnp.full(R, 14, jnp.int32)), np.arange(R))
    cache, query = appended(cache, RAGGED), query_of(3, 1)
    out = attended(cache, query)
    assert_rows(out, cache, query)
    assert np.isfinite(out).all()


def test_a_cache_crosses_export():
    cache = ragged("value_in_key")
    exported = jax.export.export(jax.jit(step_of))(cache, (query_of(0, 1), *tokens(cache, 0, 1)))
    read = jax.export.deserialize(exported.serialize())
    inputs = (query_of(0, 1), *tokens(cache, 0, 1))
    after, out = read.call(cache, inputs)
    assert (after.layout, after.value_width) == ("value_in_key", D)
    assert_rows(out, after, inputs[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "value_in_keys"}, "unknown layout 'value_in_keys'; did you mean 'value_in_key'"),
        ({"layout": "value_in_key", "value_dim": 9}, "value_dim=9 must not be larger than head_dim=8"),
        ({"layout": "interleaved", "value_dim": 6}, "needs value_dim = head_dim=8, got 6"),
        ({"layout": "interleaved", "storage": "int8"}, "pages are not quantised, got storage='int8'"),
    ],
)
def test_a_layout_that_does_not_go_with_the_sizes_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        cache_of("interleaved", **arguments)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("value_in_key", (R, 1, K, H), (R, 1, K, D), r"value must be None.*got \(4, 1, 2, 6\)"),
        ("value_in_key", (R, 1, K, H + 1), None, r"key must be \[B, T, 2, 8\]"),
        ("interleaved", (R, 1, K, H), None, "value must be a floating array"),
        ("interleaved", (R, 1, 2 * K, H), (R, 1, K, H), r"key must be \[B, T, 2, 8\]"),
        ("interleaved", (R, 1, K, H), (R, 2, K, H), "key has T=1 tokens and value 2"),
    ],
)
def test_tokens_that_do_not_fit_are_an_error(name, key, value, message):
    with pytest.raises(ShapeError, match=message):
        cache_of(name).append(jnp.zeros(key), None if value is None else jnp.zeros(value))


def test_caches_of_other_kinds_need_a_value():
    sizes = {"batch": R, "kv_heads": K, "head_dim": H, "dtype": jnp.float32}
    for cache in (TwoPartCache.create(prefill=4, decode=4, **sizes), RollingCache.create(window=4, **sizes)):
        with pytest.raises(ShapeError, match="value must be a floating array"):
            cache.append(jnp.zeros((R, 1, K, H)), None)
