"""RollingCache: a ring of the last tokens answers as all of them would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import MAX_APPEND, STORAGES, WINDOW, B, D, Fed, H, K, N, attended, close, normal, rolling, written
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry import masks
from kernelry.cache import RollingCache
from kernelry.errors import ArgumentError, ShapeError

WINDOWED = masks.SlidingWindow(WINDOW - 1)
MASKS = [
    WINDOWED,
    masks.SlidingWindow(1),
    masks.SlidingWindow(2, 1),
    masks.Chunked(WINDOW),
    masks.Chunked(3),
    masks.Chunked(3) | masks.SlidingWindow(2),
    masks.PrefixLM(3) & WINDOWED,
]
OPTIONS = [{}, {"soft_cap": 2.0}, {"sinks": normal(N, seed=9)}, {"scale": 0.5}]


def counts(most):
    return st.lists(st.integers(0, most), min_size=B, max_size=B)


def tokens(count, seed=1):
    return normal(B, count, K, H, seed=seed), normal(B, count, K, D, seed=seed + 1)


# Laws


@pytest.mark.parametrize(
    ("mask", "options"),
    [(masks.SlidingWindow(2, 1), OPTIONS[2]), (masks.Chunked(3) | masks.SlidingWindow(2), OPTIONS[1] | OPTIONS[3])],
)
@given(prompt=counts(11), appends=st.lists(counts(MAX_APPEND), min_size=2, max_size=4))
@settings(max_examples=6, deadline=None)
def test_a_ring_answers_as_the_whole_stream_would(mask, options, prompt, appends):
    """Appends of one length, so that all examples share their programs."""
    fed = Fed.new(rolling()).feed("prefill", 11, prompt)
    fed.last(MAX_APPEND).check(mask, **options)
    for step in appends:
        fed = fed.feed("append", MAX_APPEND, step).check(mask, **options)


@pytest.mark.sweep
@given(
    storage=st.sampled_from(STORAGES),
    mask=st.sampled_from(MASKS),
    options=st.sampled_from(OPTIONS),
    prompt=counts(11),
    appends=st.lists(st.sampled_from([1, MAX_APPEND]).flatmap(lambda most: st.tuples(st.just(most), counts(most)))),
)
@settings(max_examples=12, deadline=None)
def test_a_ring_of_any_storage_answers_as_the_whole_stream_would(storage, mask, options, prompt, appends):
    fed = Fed.new(rolling(storage), storage).feed("prefill", 11, prompt)
    fed.last(MAX_APPEND).check(mask, **options)
    for most, step in appends[:4]:
        fed = fed.feed("append", most, step).check(mask, **options)


@given(prompt=counts(9), steps=st.lists(counts(1), min_size=1, max_size=6))
@settings(max_examples=6, deadline=None)
def test_the_least_ring_forgets_all_but_the_window(prompt, steps):
    fed = Fed.new(rolling(max_append=1)).feed("prefill", 9, prompt)
    for step in steps:
        fed = fed.feed("append", 1, step).check(WINDOWED)
    assert fed.cache.key.shape[1] == WINDOW


@pytest.mark.sweep
def test_a_prompt_in_chunks_is_the_prompt_at_once():
    fed = at_once = Fed.new(rolling())
    for step in ([3, 1, 3], [3, 0, 2], [3, 0, 3]):
        fed = fed.feed("append", 3, step).check(WINDOWED, mode="prefill")
    at_once = at_once.feed("prefill", 11, [9, 1, 8])
    for got, want in ((fed.cache.key, at_once.cache.key), (fed.cache.value, at_once.cache.value)):
        close(got[0], want[0])
        close(got[1, :1], want[1, :1])
        close(got[2], want[2])


def test_the_token_at_a_position_stands_in_its_slot_modulo_the_capacity():
    key, value = tokens(6)
    cache = written(rolling(window=3, max_append=2), key, value, np.array([6, 2, 0]), method="prefill")
    (part,) = cache.parts(masks.SlidingWindow(2), 1)
    np.testing.assert_array_equal(part.positions[0], [4, 5, 2, 3])
    np.testing.assert_array_equal(part.lengths, [4, 2, 0])
    close(cache.key[0], key[0, [4, 5, 2, 3]])
    close(cache.value[1, :2], value[1, :2])


def test_memory_does_not_grow_with_the_row():
    cache = rolling()
    after = jax.eval_shape(lambda cache: cache.prefill(*tokens(20)).append(*tokens(3)), cache)
    assert cache.bytes == after.bytes
    assert cache.capacity == WINDOW + MAX_APPEND - 1
    assert cache.max_append == MAX_APPEND


@pytest.mark.sweep
def test_a_long_row_never_overflows_under_jit_scan_and_donation():
    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, steps):
        def step(cache, inputs):
            out, cache = cache.decode(*inputs, mask=WINDOWED)
            return cache, out

        return jax.lax.scan(step, cache, steps)

    fed, ones = Fed.new(rolling()), np.ones(B, np.int32)
    _, *prompt = fed.stream.piece(0 * ones, 6 * ones, 6)
    singles = [fed.stream.piece(place * ones, ones, 1) for place in range(6, 24)]
    before = rolling().prefill(*prompt)
    cache, out = run(before, [jnp.stack(arrays) for arrays in zip(*singles, strict=True)])
    assert before.key.is_deleted()
    np.testing.assert_array_equal(cache.check().lengths, 24 * ones)
    want = kernelry.attention(*map(jnp.asarray, (fed.stream.query, *fed.stream.kept())), mask=WINDOWED)
    close(out[:, :, 0].swapaxes(0, 1), want[:, 6:])


def test_no_tokens_are_a_prompt_too():
    cache = jax.jit(lambda cache: cache.prefill(*tokens(5)).prefill(*tokens(0)))(rolling())
    np.testing.assert_array_equal(cache.lengths, [0] * B)
    assert not np.any(attended(cache, normal(B, 1, N, H), mask=WINDOWED))


@pytest.mark.parametrize(
    ("mask", "max_append", "atoms"),
    [
        (WINDOWED, 1, ["lengths"]),
        (WINDOWED, 2, ["lengths", "window"]),
        (masks.SlidingWindow(1), 1, ["lengths", "window"]),
    ],
)
def test_a_token_that_sees_all_that_is_kept_asks_for_no_positions(mask, max_append, atoms):
    """So that kernels that know nothing else than lengths can serve."""
    cache = rolling(max_append=max_append)
    with kernelry.record() as resolutions:
        jax.eval_shape(functools.partial(cache.attend, mask=mask), normal(B, 1, N, H))
    assert [atom.kind.value for atom in resolutions[0].request.mask.atoms] == atoms


# What is refused


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        masks.Full(),
        masks.SlidingWindow(WINDOW),
        masks.Chunked(WINDOW + 1),
        masks.BlockCausal(2),
        masks.PrefixLM(3),
        masks.Causal() | WINDOWED,
        ~WINDOWED,
        WINDOWED.at(query_offset=0),
        masks.Causal() & WINDOWED.at(query_offset=jnp.int32(1)),
    ],
    ids=repr,
)
def test_a_mask_that_may_look_further_back_is_refused(mask):
    with pytest.raises(ArgumentError, match=r"a window of 4 positions, .* use SlidingWindow\(3\) or Chunked\(4\)"):
        rolling().attend(normal(B, 1, N, H), mask=mask)


def test_the_default_mask_is_refused():
    with pytest.raises(ArgumentError, match=r"mask=Causal\(\) may look further back"):
        rolling().decode(normal(B, 1, N, H), *tokens(1))


def test_more_queries_than_max_append_are_refused():
    with pytest.raises(ArgumentError, match=r"4 queries .* max_append=3 .* max_append=4, or .* kernelry.attention"):
        rolling().attend(normal(B, 4, N, H), mask=WINDOWED)


def test_more_tokens_than_max_append_are_refused():
    with pytest.raises(
        ShapeError, match=r"max_append=3 tokens per row, got 4: create it with max_append=4, or .* prefill"
    ):
        rolling().append(*tokens(4))


@pytest.mark.parametrize("method", ["append", "prefill"])
def test_tokens_that_do_not_fit_are_refused(method):
    call = getattr(rolling(), method)
    key, value = tokens(2)
    with pytest.raises(ShapeError, match=r"key must be \[B, T, 2, 8\]"):
        call(value, value)
    with pytest.raises(ArgumentError, match=r"lengths must lie in \[0, 2\]"):
        call(key, value, lengths=np.array([1, 3, 0]))


def test_lengths_outside_count_as_the_nearest_inside_under_jit():
    cache = written(rolling(), *tokens(2), np.array([-1, 1, 5]))
    np.testing.assert_array_equal(cache.lengths, [0, 1, 2])


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(ArgumentError, match="RollingCache: window must be an integer ≥ 1, got 0"):
        rolling(window=0)
    with pytest.raises(ArgumentError, match="RollingCache: max_append must be an integer ≥ 1, got True"):
        rolling(max_append=True)


def test_a_step_that_sees_the_whole_ring_needs_no_positions():
    """A ring as long as the window holds nothing that the last token does not see."""
    cache = RollingCache.create(batch=B, window=WINDOW, max_append=1, kv_heads=K, head_dim=H, dtype=jnp.float32)
    with kernelry.record() as resolutions:
        jax.eval_shape(lambda query: cache.attend(query, mask=WINDOWED), normal(B, 1, N, H))
        jax.eval_shape(lambda query: cache.attend(query, mask=masks.SlidingWindow(WINDOW - 2)), normal(B, 1, N, H))
    kinds = [[str(atom.kind) for atom in resolution.request.mask.atoms] for resolution in resolutions]
    assert [len(atoms) for atoms in kinds] == [1, 2]
