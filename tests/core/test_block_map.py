"""block_map says EMPTY, PARTIAL and FULL exactly, for any lengths, offsets and block sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import STATIC_ATOMS, placed_masks

from kernelry import masks
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks import BlockKind, blocks
from kernelry.parallel import load_balanced_order
from kernelry.testing import reference_mask


def _odd_distance(query, kv):
    return (query - kv) % 2 == 1


def _expected(visible, block_q, block_kv):
    """Classifies the blocks of booleans [B, N, T, S] by looking at every element."""
    q_len, kv_len = visible.shape[2:]
    kinds = np.zeros((-(-q_len // block_q), -(-kv_len // block_kv)), int)
    for i in range(kinds.shape[0]):
        for j in range(kinds.shape[1]):
            block = visible[:, :, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            kinds[i, j] = BlockKind.FULL if block.all() else BlockKind.PARTIAL if block.any() else BlockKind.EMPTY
    return kinds


def _reference(mask, q_len, kv_len):
    return reference_mask(mask, 2, 4, q_len, kv_len)


@given(placed_masks(atoms=STATIC_ATOMS, max_len=12, traced=False), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_block_map_of_a_static_mask_is_exact(drawn, block_q, block_kv):
    mask, q_len, kv_len = drawn
    found = mask.block_map(q_len, kv_len, block_q, block_kv)
    np.testing.assert_array_equal(found, _expected(_reference(mask, q_len, kv_len), block_q, block_kv))


@given(placed_masks(max_len=9), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_block_map_of_any_mask_is_never_empty_or_full_where_the_mask_is_not(drawn, block_q, block_kv):
    mask, q_len, kv_len = drawn
    found = mask.block_map(q_len, kv_len, block_q, block_kv)
    exact = _expected(_reference(mask, q_len, kv_len), block_q, block_kv)
    wrong = (found != exact) & (found != BlockKind.PARTIAL)
    assert not wrong.any()


_SIZES = st.integers(1, 6)
_OF_POSITIONS = st.one_of(
    st.builds(masks.SlidingWindow, st.integers(0, 9), st.integers(0, 3)),
    st.builds(masks.Chunked, _SIZES),
    st.builds(masks.BlockCausal, _SIZES),
    st.just(masks.Causal()),
)
_CONJUNCTIONS = st.builds(lambda one, other, some: one & other | ~some, *[_OF_POSITIONS] * 3) | _OF_POSITIONS


@given(_CONJUNCTIONS, st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_block_map_at_positions_in_any_order_is_exact(mask, seed, rows, block_q, block_kv):
    rng = np.random.default_rng(seed)
    query, kv = (np.stack([rng.permutation(length) for _ in range(rows)]) for length in (14, 17))
    mask = mask.at(query_positions=query * 2, kv_positions=kv)
    found = mask.block_map(14, 17, block_q, block_kv)
    np.testing.assert_array_equal(found, _expected(reference_mask(mask, rows, 1, 14, 17), block_q, block_kv))


@pytest.mark.parametrize(
    "mask",
    [masks.Causal(), masks.SlidingWindow(511), masks.SlidingWindow(511) & masks.Chunked(4096)],
    ids=str,
)
@pytest.mark.parametrize("order", ["random", "reversed", "striped", "dual_chunk"])
def test_block_map_of_131072_tokens_in_any_order_evaluates_no_element(mask, order, monkeypatch):
    tokens = np.arange(2**17)
    orders = {"random": np.random.default_rng(0).permutation(tokens), "reversed": tokens[::-1]}
    places = orders[order] if order in orders else load_balanced_order(len(tokens), 8, order)
    monkeypatch.setattr(blocks, "_evaluated", None)
    kinds = mask.at(query_positions=places, kv_positions=places).block_map(len(tokens), len(tokens), 1024, 1024)
    assert (kinds == BlockKind.PARTIAL).any()


def test_block_map_finds_the_one_visible_element_of_a_block_among_many():
    rng = np.random.default_rng(0)
    query, kv = rng.permutation(2048), rng.permutation(2048)
    mask = masks.SlidingWindow(9).at(query_positions=query, kv_positions=kv)
    np.testing.assert_array_equal(mask.block_map(2048, 2048, 16, 16), _expected(mask.materialize(2048, 2048), 16, 16))


@pytest.mark.parametrize("mask", [masks.Predicate(_odd_distance) & masks.SlidingWindow(300), ~masks.Chunked(64)])
def test_block_map_of_many_elements_is_exact_and_evaluates_few_of_a_partial_block(mask, monkeypatch):
    tokens = np.random.default_rng(0).permutation(512)
    placed = mask.at(query_positions=tokens, kv_positions=tokens) | masks.SlidingWindow(2)
    exact = placed.block_map(512, 512, 64, 32)
    evaluated, whole = [], blocks._evaluated

    def counted(static, row, columns, grid, every=1):
        evaluated.append(len(columns) / every**2)
        return whole(static, row, columns, grid, every)

    monkeypatch.setattr(blocks, "_evaluated", counted)
    monkeypatch.setattr(blocks, "_MANY_ELEMENTS", 1)
    np.testing.assert_array_equal(placed.block_map(512, 512, 64, 32), exact)
    np.testing.assert_array_equal(exact, _expected(placed.materialize(512, 512), 64, 32))
    assert sum(evaluated) < exact.size / 2


def test_block_map_of_a_dynamic_part_is_never_full():
    mask = masks.Causal() & masks.Segments(np.zeros((1, 8), np.int32))
    np.testing.assert_array_equal(
        mask.block_map(8, 8, 4, 4), [[BlockKind.PARTIAL, BlockKind.EMPTY], [BlockKind.PARTIAL, BlockKind.PARTIAL]]
    )


def test_block_map_tells_partial_blocks_that_have_nothing_in_common():
    mask = masks.SlidingWindow(0, 0) & masks.Predicate(_odd_distance)
    assert (mask.block_map(8, 8, 4, 4) == BlockKind.EMPTY).all()


def test_block_map_of_a_long_band_looks_at_blocks_only():
    kinds = masks.SlidingWindow(4095).block_map(2**22, 2**22, 2**14, 2**14)
    assert kinds.shape == (256, 256)
    assert (np.count_nonzero(kinds, axis=1) == [1, *[2] * 255]).all()


def test_block_map_of_zero_lengths_is_empty():
    assert masks.Full().block_map(0, 8, 4, 4).shape == (0, 2)


def test_block_map_refuses_blocks_of_nothing():
    with pytest.raises(ArgumentError, match="block_q=0 must be at least 1"):
        masks.Full().block_map(8, 8, 0, 4)


def test_block_map_wants_to_know_where_the_queries_stand():
    with pytest.raises(ShapeError, match="query_offset=4"):
        masks.Causal().block_map(4, 8, 4, 4)


def test_block_map_works_while_tracing():
    import jax

    found = []

    @jax.jit
    def traced(x):
        found.append(masks.Predicate(_jax_predicate).block_map(8, 8, 4, 4))
        return x

    traced(1.0)
    np.testing.assert_array_equal(found[0], masks.Causal().block_map(8, 8, 4, 4))


def _jax_predicate(query, kv):
    import jax.numpy as jnp

    return jnp.less_equal(kv, query)
