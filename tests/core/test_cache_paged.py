"""PagedCache: attention to pages equals the float64 oracle on each row alone, whatever happened to the rows before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import sweep_but

from kernelry import Partial, finalize, masks
from kernelry.cache import PagedCache, QuantizedArray, SharedPrefix
from kernelry.errors import ArgumentError, CacheFullError, ShapeError
from kernelry.testing import reference_attention

pytestmark = pytest.mark.versions

R, N, K, H, D, SIZE, PAGES = 4, 4, 2, 8, 6, 4, 16
STORAGES = [None, "int8", "int4", "float8_e4m3fn", "int8:heads_and_head_dim"]
SINKS = jnp.linspace(-1.0, 2.0, N)
CAUSAL = masks.Causal()
RAGGED = np.array([9, 4, 0, 14])


def cache_of(**changes):
    sizes = {"rows": R, "pages": PAGES, "page_size": SIZE, "max_length": 30}
    heads = {"kv_heads": K, "head_dim": H, "value_dim": D, "dtype": jnp.float32}
    return PagedCache.create(**{**sizes, **heads, **changes})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tokens(seed, count, rows=R):
    return normal(seed, rows, count, K, H), normal(seed + 100, rows, count, K, D)


def query_of(seed, count, rows=R):
    return normal(seed + 1000, rows, count, N, H)


def appended(cache, counts, seed=0):
    """Appends counts[r] random tokens to row r, which fit."""
    return append(cache, *tokens(seed, 14), lengths=jnp.asarray(counts, jnp.int32)).check()


def prefilled(cache, counts, new):
    """Begins with counts[r] of 20 tokens in row r."""
    return prefill(cache, *new, lengths=jnp.asarray(counts, jnp.int32))


append, prefill, allocate, fork, free = (
    jax.jit(getattr(PagedCache, name)) for name in ("append", "prefill", "allocate", "fork", "free")
)
write = jax.jit(PagedCache.write, static_argnums=1)
"""Compiled: run eagerly, each step would compile a program of its own."""


@functools.partial(jax.jit, static_argnames=("pages", "layer", "mask", "mode", "soft_cap", "scale", "return_partial"))
def attended(cache, query, rows=None, pages=0, layer=0, **options):
    return cache.view(rows, layer, pages).attend(query, **options)


@functools.cache
def ragged(**changes):
    return appended(appended(cache_of(**changes), RAGGED // 2, seed=1), RAGGED - RAGGED // 2, seed=2)


@functools.cache
def nearly_full():
    """Two pages are free."""
    return appended(appended(cache_of(), [12, 14, 0, 14], seed=1), [0, 2, 0, 14], seed=2)


def contents(cache, row, layer=0):
    """The keys and values of a row, read through the table: [1, L, K, H] and [1, L, K, D]."""
    length, pages = int(cache.lengths[row]), np.asarray(cache.table[row])
    for held in (cache.keys[layer], cache.values[layer]):
        plain = np.asarray(held.dequantize() if isinstance(held, QuantizedArray) else held)
        yield plain[pages].reshape(1, -1, *plain.shape[2:])[:, :length]


def oracle(cache, query, row, *, mask=CAUSAL, count=None, layer=0, **options):
    """What the last tokens of a row attend to, by itself."""
    count = query.shape[1] if count is None else count
    key, value = contents(cache, row, layer)
    placed = mask.at(query_offset=key.shape[1] - count)
    return reference_attention(query[row : row + 1, :count], key, value, mask=placed, **options).out[0]


def assert_rows(out, cache, query, rows=range(R), **options):
    """Every row that is not empty equals the oracle; an empty one is 0."""
    for place, row in enumerate(rows):
        count = min(query.shape[1], int(cache.lengths[row]))
        if count == 0:
            np.testing.assert_array_equal(out[place], 0)
        elif count == query.shape[1]:
            wanted = oracle(cache, query, row, **options)
            np.testing.assert_allclose(np.asarray(out[place]), wanted, rtol=2e-5, atol=2e-5)


# Equal to the oracle


@pytest.mark.parametrize(
    ("storage", "count"),
    sweep_but(
        [(storage, count) for storage in STORAGES for count in (1, 4)],
        (None, 1),
        (None, 4),
        ("int8", 1),
        ("int8:heads_and_head_dim", 4),
        ("int4", 1),
        ("float8_e4m3fn", 4),
    ),
)
def test_ragged_rows_equal_the_oracle(storage, count):
    cache, query = ragged(storage=storage), query_of(0, count)
    assert cache.lengths.tolist() == RAGGED.tolist()
    assert_rows(attended(cache, query, mode=MODES[count]), cache, query)


MODES = {1: "decode", 4: "prefill"}
OPTIONS = {
    "window": {"mask": masks.SlidingWindow(5)},
    "chunked": {"mask": masks.Chunked(4)},
    "hole": {"mask": masks.Causal() & ~masks.SlidingWindow(2)},
    "sinks": {"sinks": SINKS},
    "all": {"soft_cap": 0.8, "scale": 0.3, "sinks": SINKS, "mask": masks.SlidingWindow(3)},
}


@pytest.mark.parametrize(
    ("name", "count"),
    sweep_but([(name, count) for name in OPTIONS for count in (1, 4)], ("chunked", 1), ("hole", 4), ("all", 4)),
)
def test_masks_and_sinks_equal_the_oracle(name, count):
    cache, query, options = ragged(), query_of(1, count), OPTIONS[name]
    assert_rows(attended(cache, query, **options), cache, query, **options)


def test_what_was_appended_is_what_stands_there():
    key, value = map(np.asarray, tokens(5, 14))
    cache = append(cache_of(), key, value, lengths=np.full(R, 3, np.int32))
    cache = append(cache, np.roll(key, -3, axis=1), np.roll(value, -3, axis=1), lengths=np.full(R, 11, np.int32))
    assert cache.lengths.tolist() == [14] * R
    for row in range(R):
        for found, wanted in zip(contents(cache, row), (key, value), strict=True):
            np.testing.assert_array_equal(found[0], wanted[row])


@pytest.mark.parametrize("storage", sweep_but([None, "int8"], None))
def test_forks_frees_and_appends_equal_the_oracle(storage):
    cache = free(fork(fork(ragged(storage=storage), 3, 2), 0, 1, 6), 0)
    cache = fork(appended(cache, [3, 2, 1, 0], seed=3), 2, 0, 15)
    assert cache.lengths.tolist() == [15, 8, 15, 14]
    for seed in range(4, 7):
        cache = appended(cache, [1, 1, 1, 1], seed=seed)
        query = query_of(seed, 1)
        assert_rows(attended(cache, query), cache, query)


def test_queries_that_are_no_tokens_are_zero():
    cache, query, counts = ragged(), query_of(2, 4), jnp.array([2, 4, 0, 1])
    out = attended(cache, query, lengths=counts, mode="prefill")
    for row, count in enumerate(counts.tolist()):
        np.testing.assert_array_equal(out[row, count:], 0)
        if count:
            wanted = oracle(cache, query, row, count=count)
            np.testing.assert_allclose(out[row, :count], wanted, rtol=2e-5, atol=2e-5)


def test_layers_share_the_table_and_nothing_else():
    cache = cache_of(layers=2)
    for seed, counts in enumerate(([5, 1, 0, 7], [2, 6, 0, 1])):
        cache = allocate(cache, jnp.asarray(counts))
        for layer in range(2):
            cache = write(cache, layer, *tokens(10 * layer + seed, 7), lengths=jnp.asarray(counts))
    outs = []
    for layer in range(2):
        query = query_of(3, 1)
        outs.append(attended(cache, query, layer=layer))
        assert_rows(outs[-1], cache, query, layer=layer)
    assert not np.allclose(outs[0][0], outs[1][0])


def test_a_prompt_in_chunks_equals_the_prompt_at_once():
    key, value = tokens(7, 10)
    query = query_of(7, 10)
    chunk = jax.jit(lambda cache, *new: cache.decode(*new, mode="prefill"))
    cache, outs = cache_of(), []
    for at in range(0, 10, 5):
        out, cache = chunk(cache, *(array[:, at : at + 5] for array in (query, key, value)))
        outs.append(out)
    assert cache.lengths.tolist() == [10] * R
    assert_rows(np.concatenate(outs, axis=1), cache, query)


def test_a_prefix_of_other_storage_comes_before_all_rows():
    cache, query = ragged(), query_of(4, 1)
    key, value = tokens(9, 5, rows=1)
    out = attended(cache, query, prefix=SharedPrefix(key[0], value[0]))
    for row in (0, 1, 3):
        mine = contents(cache, row)
        both = [np.concatenate([first, own], axis=1) for first, own in zip((key, value), mine, strict=True)]
        wanted = reference_attention(query[row : row + 1], *both, mask=masks.Full()).out[0]
        np.testing.assert_allclose(out[row], wanted, rtol=2e-5, atol=2e-5)


# Views


def test_a_view_attends_from_its_rows_in_their_order():
    cache, query = ragged(), query_of(5, 1)
    rows = np.array([3, 0, 2])
    view = cache.view(rows)
    assert view.lengths.tolist() == [14, 9, 0]
    assert_rows(attended(cache, query[rows], rows=view.rows), cache, query, rows)


@jax.jit
def append_to_rows(cache, rows, *new, lengths):
    return cache.view(rows).append(*new, lengths=lengths).cache


def test_a_view_appends_to_its_rows_only():
    cache = ragged()
    key, value = tokens(6, 3, rows=2)
    after = append_to_rows(cache, jnp.array([2, 1]), key, value, lengths=jnp.array([3, 2]))
    assert (after.lengths - cache.lengths).tolist() == [0, 2, 3, 0]
    np.testing.assert_array_equal(next(contents(after, 2))[0], key[0])
    np.testing.assert_array_equal(next(contents(after, 1))[0, -2:], key[1, :2])


def test_rows_out_of_range_under_jit_are_empty():
    cache, query = ragged(), query_of(6, 1)
    out = attended(cache, query[:3], rows=jnp.array([-1, 3, R]))
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(out[2], 0)
    assert_rows(out[1:2], cache, jnp.roll(query, 2, axis=0), [3])


# Under jit


def step_of(cache, inputs):
    query, key, value = inputs
    out, cache = cache.decode(query, key, value)
    return cache, out


step = jax.jit(step_of, donate_argnums=0)


@pytest.mark.parametrize("storage", sweep_but([None, "int4", "int8"], "int8"))
def test_a_scan_of_decode_steps_equals_one_after_another(storage):
    start = fork(ragged(storage=storage), 3, 2)
    inputs = [jnp.stack([part(seed) for seed in range(6)]) for part in (lambda s: query_of(s, 1), *map(new, (0, 1)))]
    cache, outs = jax.jit(lambda cache, inputs: jax.lax.scan(step_of, cache, inputs))(start, inputs)
    start = jax.tree.map(jnp.copy, start)
    for place in range(6):
        start, out = step(start, [array[place] for array in inputs])
        np.testing.assert_allclose(outs[place], out, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(*map(jax.tree.leaves, (cache, start)), strict=True):
        np.testing.assert_array_equal(found, wanted)


def new(which):
    return lambda seed: tokens(seed, 1)[which]


def test_donated_pages_are_written_in_place():
    cache = jax.tree.map(jnp.copy, ragged(storage="int8"))
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((cache.keys, cache.values))]
    query = query_of(0, 1)
    after, out = step(cache, (query, *tokens(0, 1)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert places == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((after.keys, after.values))]
    assert after.lengths.tolist() == (RAGGED + 1).tolist()
    assert_rows(out, after, query)


def test_greedy_decoding_equals_attention_over_all_tokens():
    """A toy language model of one layer: the token decides key, value and query, the output the next token."""
    words = 32
    table = [normal(i, words, heads, H) for i, heads in enumerate((N, K, K))]
    head = normal(9, words, N * H)

    def chosen(out):
        return (out.reshape(out.shape[0], -1) @ head.T).argmax(-1)

    @jax.jit
    def decoded(cache, token):
        out, cache = cache.decode(*(embedding[token][:, None] for embedding in table))
        return cache, chosen(out)

    rows = [[3, 1, 4, 1, 5], [9, 2], [6], [5, 3, 5, 8, 9, 7, 9]]
    cache, counts = cache_of(value_dim=H), jnp.array([len(row) - 1 for row in rows])
    prompt = jnp.array([row[:-1] + [0] * (7 - len(row)) for row in rows])
    cache = append(cache, table[1][prompt], table[2][prompt], lengths=counts)
    token = jnp.array([row[-1] for row in rows])
    for _ in range(8):
        cache, token = decoded(cache, token)
        for row, found in zip(rows, token.tolist(), strict=True):
            query, key, value = (np.asarray(embedding)[np.array(row)][None] for embedding in table)
            wanted = reference_attention(query[:, -1:], key, value, mask=masks.Full()).out
            row.append(found)
            assert found == (wanted.reshape(-1) @ np.asarray(head, np.float64).T).argmax()
    assert len({word for row in rows for word in row}) > 10


# Forks


def test_a_fork_costs_no_page_until_it_is_written_to():
    cache = appended(cache_of(), [6, 0, 0, 0])
    forked = fork(fork(fork(cache, 0, 1), 0, 2, 5), 0, 3, 4)
    assert cache.free_pages == forked.free_pages == PAGES - 2
    assert forked.lengths.tolist() == [6, 6, 5, 4]
    one = appended(forked, [0, 1, 0, 0], seed=1)  # copies
    both = appended(one, [1, 0, 1, 1], seed=2)  # row 0 copies, row 2 finds the page its own, row 3 begins a new one
    assert (one.free_pages, both.free_pages) == (PAGES - 3, PAGES - 5)
    assert both.table[2].tolist() == forked.table[2].tolist()


def test_drafted_tokens_are_rejected_by_shortening_the_row():
    cache = ragged()
    drafted = appended(cache, [4, 4, 0, 4], seed=8)
    after = fork(drafted, np.array([0, 1, 3]), np.array([0, 1, 3]), np.array([11, 4, 15]))
    assert after.lengths.tolist() == [11, 4, 0, 15]
    assert after.free_pages == PAGES - (3 + 1 + 4)
    cache, query = appended(after, [1, 1, 1, 1], seed=9), query_of(9, 1)
    assert_rows(attended(cache, query), cache, query)


def test_forks_at_once_reorder_the_beams():
    cache = ragged()
    parents = np.array([3, 3, 0, 1])
    after = fork(cache, parents, np.arange(R))
    assert after.lengths.tolist() == RAGGED[parents].tolist()
    for row, parent in enumerate(parents):
        for found, wanted in zip(contents(after, row), contents(cache, parent), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_under_jit_a_fork_takes_what_is_there_and_ignores_rows_out_of_range():
    cache = ragged()
    assert fork(cache, 1, 2, 99).lengths.tolist() == [9, 4, 4, 14]
    assert fork(cache, 1, 2, -1).lengths.tolist() == [9, 4, 0, 14]
    assert fork(cache, 9, 3).lengths.tolist() == [9, 4, 0, 0]
    for target in (-1, R):
        same(fork(cache, 0, target), cache)
        same(free(cache, target), cache)


def same(cache, other):
    for found, wanted in zip(*map(jax.tree.leaves, (cache, other)), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_row_freed_twice_at_once_is_freed_once():
    cache = fork(ragged(), 3, 0)
    after = free(cache, np.array([0, 1, 0]))
    same(after, free(free(cache, 0), 1))
    assert after.references.sum() == 4


def test_a_shared_page_that_was_copied_is_given_back():
    cache = fork(appended(cache_of(), [9, 0, 0, 0]), 0, 1)
    cache = appended(cache, [1, 1, 0, 0])  # the first row to write copies the page that both share
    assert free(cache, np.arange(R)).free_pages == PAGES


# Pages of others


NAN_OR_INF = ("float8_e4m3fn", 4)


@pytest.mark.parametrize(
    ("storage", "count"), sweep_but([(None, 1), (None, 4), ("int8", 1), NAN_OR_INF], (None, 1), NAN_OR_INF)
)
def test_what_others_left_in_a_page_never_leaks(storage, count):
    bad = (jnp.asarray(np.full((R, 20, K, width), bad, np.float32)) for width, bad in ((H, np.nan), (D, np.inf)))
    cache = prefilled(cache_of(storage=storage), [16] * R, bad)
    assert cache.free_pages == 0
    cache, query = appended(free(cache, np.arange(R)), RAGGED), query_of(3, count)
    out = attended(cache, query, mode=MODES[count])
    assert_rows(out, cache, query)
    assert np.isfinite(out).all()


def test_prefill_begins_all_rows_anew():
    key, value = tokens(4, 20)
    cache = prefilled(ragged(), [5, 2, 0, 1], (key, value))
    assert cache.lengths.tolist() == [5, 2, 0, 1]
    assert cache.free_pages == PAGES - 4
    np.testing.assert_array_equal(next(contents(cache, 0))[0], key[0, :5])


# Shared pages


@functools.cache
def shared(**changes):
    cache = fork(fork(appended(cache_of(**changes), [9, 0, 0, 0], seed=1), 0, 1), 0, 3, 8)
    return appended(cache, [1, 4, 0, 4], seed=2)


@pytest.mark.parametrize(
    ("storage", "pages", "count", "name"),
    sweep_but(
        [
            (storage, *sizes, name)
            for storage in (None, "int8")
            for sizes in ((2, 1), (1, 4))
            for name in ("causal", "window")
        ],
        (None, 2, 1, "causal"),
        ("int8", 1, 4, "window"),
    ),
)
def test_shared_pages_attended_to_at_once_equal_the_oracle(storage, pages, count, name):
    cache, query = shared(storage=storage), query_of(5, count)
    options = {"mask": masks.SlidingWindow(6), "sinks": SINKS} if name == "window" else {}
    out = attended(cache, query, pages=pages, **options)
    assert_rows(out, cache, query, **options)


def test_shared_pages_may_be_all_of_a_row():
    cache = fork(appended(cache_of(), [8, 0, 0, 0]), 0, 1)
    query = query_of(6, 1)
    assert_rows(attended(cache, query, pages=2), cache, query)


def test_shared_pages_of_some_rows():
    cache, query = shared(), query_of(7, 1)
    rows = np.array([3, 1])
    partial = attended(cache, query[rows], rows=rows, pages=2, return_partial=True)
    assert isinstance(partial, Partial)
    assert_rows(finalize(partial), cache, query, rows)


@pytest.mark.parametrize("case", ["others", "too short", "queries inside"])
def test_pages_that_are_not_shared_are_an_error_and_under_jit_nan(case):
    cache, pages, count = shared(), 2, 4 if case == "queries inside" else 1
    if case == "too short":
        cache = fork(cache, 0, 1, 7)  # its second page holds a token of others
    if case == "others":
        cache = appended(fork(free(cache, 1), 0, 1, 4), [0, 8, 0, 0])  # its second page is its own
    query = query_of(8, count)
    with pytest.raises(
        ArgumentError, match=rf"shared_pages={pages}: rows \[.*\] do not begin with the same {4 * pages}"
    ):
        cache.view(shared_pages=pages).attend(query)
    assert np.isnan(attended(cache, query, pages=pages)).all()


def test_nobody_shares_pages_of_an_empty_cache():
    query = query_of(9, 1)
    np.testing.assert_array_equal(attended(cache_of(), query, pages=2), 0)


# What does not fit


def test_pages_that_do_not_suffice_are_an_error():
    cache = nearly_full()
    with pytest.raises(CacheFullError, match=r"3 more pages are needed, and 2 of 16 are free: free rows, or create"):
        cache.append(*tokens(0, 5), lengths=jnp.array([5, 1, 0, 0]))
    appended(cache, [5, 0, 0, 0])


def test_a_row_that_becomes_too_long_is_an_error():
    cache = nearly_full()
    with pytest.raises(CacheFullError, match=r"rows \[3\] would have \[31\] tokens, and max_length is 30: free them"):
        cache.append(*tokens(0, 3), lengths=jnp.array([3, 0, 0, 3]))
    appended(cache, [3, 0, 0, 2])


@pytest.mark.parametrize("counts", [[5, 1, 0, 0], [0, 0, 0, 30], [0, 2**31 - 1, 0, 0]])
def test_under_jit_an_overflow_changes_nothing_and_stays(counts):
    cache = nearly_full()
    allocated = allocate(cache, jnp.asarray(counts))
    assert allocated.overflowed
    same(dataclasses.replace(allocated, overflowed=False), dataclasses.replace(cache, overflowed=False))

    later = append(allocated, *tokens(0, 14), lengths=jnp.array([1, 1, 0, 0]))
    same(later, allocated)
    with pytest.raises(CacheFullError, match="did not fit"):
        later.check()
    assert np.isnan(attended(later, query_of(0, 1))).all()
    recovered = dataclasses.replace(free(later, 3), overflowed=jnp.array(False))
    assert appended(recovered, [4, 1, 0, 0]).check().lengths.tolist() == [16, 17, 0, 0]


def test_under_jit_tokens_without_room_of_their_own_are_not_written():
    cache = appended(cache_of(), [6, 0, 0, 0])
    key, value = tokens(0, 2)
    for wrong in (fork(cache, 0, 1), cache):
        after = write(wrong, 0, key, value, lengths=jnp.array([1, 1, 0, 0]))
        assert after.overflowed
        same(dataclasses.replace(after, overflowed=False), dataclasses.replace(wrong, overflowed=False))
    assert not write(cache, 0, key, value, lengths=jnp.array([2, 0, 0, 0])).overflowed


# Errors


def test_as_many_pages_may_be_shared_as_a_row_has():
    assert cache_of().view(shared_pages=8).shared_pages == 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.free(4), ArgumentError, r"rows=4 is out of range: the cache has rows 0 … 3"),
        (lambda c: c.free(np.array([0, -1])), ArgumentError, r"rows=\[0, -1\] is out of range"),
        (lambda c: c.free(np.array([True, False])), ShapeError, "rows must be an integer or integers"),
        (lambda c: c.free(1.0), ShapeError, "rows must be an integer or integers"),
        (lambda c: c.fork(0, 7), ArgumentError, "target=7 is out of range"),
        (lambda c: c.fork(-1, 0), ArgumentError, "source=-1 is out of range"),
        (lambda c: c.fork(0, 1, 10), ArgumentError, r"length=10 must lie within 0 … \[9\]"),
        (lambda c: c.fork(np.array([0, 1]), 2), ShapeError, "source and target must have the same length, got 2 and 1"),
        (lambda c: c.fork(np.array([0, 1]), np.array([2, 2])), ArgumentError, r"target=\[2, 2\] names a row twice"),
        (lambda c: c.view(layer=1), ArgumentError, r"layer=1 is out of range: the cache has layers 0 … 0"),
        (lambda c: c.view(shared_pages=9), ArgumentError, "shared_pages=9 must be an integer, 0 … 8"),
        (lambda c: c.view(shared_pages=-1), ArgumentError, "shared_pages=-1 must be an integer, 0 … 8"),
        (lambda c: c.view(2), ShapeError, r"rows must be integers \[B\]"),
        (lambda c: c.view(np.array([5])), ArgumentError, r"rows=\[5\] is out of range"),
        (lambda c: c.view(np.array([1, 1])), ArgumentError, r"rows=\[1, 1\] names a row twice"),
        (lambda c: c.allocate(jnp.ones(3, int)), ShapeError, r"counts must be integers \[R\] = \[4\], got int32"),
        (lambda c: c.allocate(jnp.ones(4)), ShapeError, r"counts must be integers \[R\] = \[4\], got float32"),
        (lambda c: c.allocate(np.array([0, -1, 0, 0])), ArgumentError, "must not be negative; fork"),
        (lambda c: c.write(0, *tokens(0, 2)), ArgumentError, "cannot take their last .* allocate them first"),
        (lambda c: c.append(*tokens(0, 2, rows=3)), ShapeError, r"key must be \[B, T, 2, 8\] with B=4"),
        (lambda c: c.append(*tokens(0, 2), lengths=jnp.array([3, 0, 0, 0])), ArgumentError, "lengths must lie"),
        (lambda c: c.attend(query_of(0, 1), mask=masks.Segments([0])), ArgumentError, "use masks of positions"),
        (lambda c: c.view(shared_pages=1).attend(query_of(0, 1)[0]), ShapeError, r"query must be \[B, T, N, H\]"),
        (
            lambda c: c.view(shared_pages=1).attend(query_of(0, 1), prefix=SharedPrefix(*map(jnp.ones, _PREFIX))),
            ArgumentError,
            "pass one of them",
        ),
        (lambda _: cache_of(layers=2).append(*tokens(0, 2)), ArgumentError, r"this cache has 2: allocate\(counts\)"),
        (lambda _: cache_of(pages=0), ArgumentError, "pages must be"),
        (lambda _: cache_of(storage="int3"), ArgumentError, "unknown dtype 'int3'; did you mean"),
    ],
)
def test_a_wrong_argument_says_what_to_pass(call, error, message):
    with pytest.raises(error, match=message):
        call(ragged())


_PREFIX = ((3, K, H), (3, K, D))


def test_a_page_shared_since_it_was_allocated_is_not_written():
    cache = fork(allocate(cache_of(), jnp.array([6, 0, 0, 0])), 0, 1)
    with pytest.raises(ArgumentError, match="fork rows only after they are written"):
        cache.write(0, *tokens(0, 2), lengths=jnp.array([1, 0, 0, 0]))


# What does not fit, or is named twice, under jit


def assert_as_before(after, before):
    for name in ("table", "lengths", "references"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name)


def test_a_prefill_that_does_not_fit_frees_nothing():
    cache, new = nearly_full(), tokens(3, 20)
    full = prefilled(cache, [20] * R, new)
    assert_as_before(full, cache)
    assert full.overflowed
    with pytest.raises(CacheFullError, match="20 more pages are needed, and 16 of 16 are free"):
        cache.prefill(*new)
    again = prefilled(full.recovered(), [4] * R, new).check()
    np.testing.assert_array_equal(again.lengths, [4] * R)


def test_of_a_target_named_twice_the_first_counts():
    cache = appended(cache_of(), [5, 9, 0, 0])
    twice = fork(cache, jnp.array([0, 1]), jnp.array([2, 2]))
    assert_as_before(twice, fork(cache, 0, 2))


def test_a_row_named_twice_is_shown_once():
    cache = appended(cache_of(), [5, 9, 0, 0])
    shown = append_to_rows(cache, jnp.array([1, 1]), *tokens(1, 3, rows=2), lengths=jnp.array([1, 1]))
    np.testing.assert_array_equal(shown.lengths, [5, 10, 0, 0])


@pytest.mark.parametrize("length", [1.7, [1, 2], np.array([1.0])])
def test_lengths_of_forks_are_integers(length):
    with pytest.raises(ShapeError, match=r"length must be an integer or integers \[1\]"):
        appended(cache_of(), [5, 0, 0, 0]).fork([0], [1], length)
