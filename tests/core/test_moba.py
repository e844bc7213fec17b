"""Mixture of block attention: the choice of blocks, and attention over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry import masks, moba
from kernelry.errors import ArgumentError, ShapeError
from kernelry.testing import reference_attention, reference_gradients, reference_select_blocks

B, T, S, N, K, H = 2, 5, 21, 4, 2, 8


def _arrays(seed=0, kv_len=S):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, kv_len, K, H), (B, kv_len, K, H))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@functools.partial(jax.jit, static_argnames=("chunk_size", "top_k"))
def kept(query, key, query_positions, *, chunk_size, top_k):
    mask = moba.select_blocks(query, key, chunk_size=chunk_size, top_k=top_k, query_positions=query_positions)
    return mask.mask.keep


@pytest.mark.parametrize(("chunk_size", "top_k"), [(1, 7), (3, 1), (4, 3), (9, 8), (30, 2)])
@given(first=st.integers(0, S - T), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_blocks_are_those_of_the_definition(chunk_size, top_k, first, seed):
    query, key, _ = _arrays(seed)
    positions, sizes = np.arange(first, first + T), {"chunk_size": chunk_size, "top_k": top_k}
    expected = reference_select_blocks(query, key, query_positions=positions, **sizes)
    np.testing.assert_array_equal(kept(query, key, positions, **sizes), expected)


def test_of_equal_gates_the_earlier_block_wins():
    query, key, _ = _arrays()
    mask = moba.select_blocks(
        query, jnp.zeros_like(key), chunk_size=4, top_k=3, query_positions=np.full((B, T), 17, np.int32)
    )
    np.testing.assert_array_equal(mask.mask.keep[0, 0, 0], [True, True, False, False, True, False])


def test_positions_may_differ_by_row():
    query, key, _ = _arrays()
    positions = np.stack([np.arange(T), np.arange(S - T, S)])
    mask = moba.select_blocks(query, key, chunk_size=4, top_k=2, query_positions=positions)
    expected = reference_select_blocks(query, key, chunk_size=4, top_k=2, query_positions=positions)
    np.testing.assert_array_equal(mask.mask.keep, expected)


def test_attention_over_the_blocks_equals_the_reference_forward_and_backward():
    query, key, value = _arrays()
    positions = np.arange(S - T, S)

    def mask_of(query, key):
        chosen = moba.select_blocks(query, key, chunk_size=4, top_k=2, query_positions=positions)
        return masks.Causal().at(query_positions=positions) & chosen

    @jax.jit
    def run(*arrays):
        def loss(query, key, value):
            out = kernelry.attention(query, key, value, mask=mask_of(query, key))
            return jnp.sin(out).sum(), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)

    (d_query, d_key, d_value), out = run(query, key, value)
    fixed = mask_of(query, key)
    expected = reference_attention(query, key, value, mask=fixed).out
    np.testing.assert_allclose(np.asarray(out), expected, atol=2e-6)
    around = reference_gradients(query, key, value, mask=fixed, d_out=np.cos(expected))
    for found, other in ((d_query, around.query), (d_key, around.key), (d_value, around.value)):
        np.testing.assert_allclose(np.asarray(found), other, atol=1e-6)


def test_no_keys_give_no_blocks():
    query, key, value = _arrays(kv_len=0)

    @jax.jit
    def run(*arrays):
        mask = moba.select_blocks(*arrays[:2], chunk_size=4, top_k=2, query_positions=np.arange(T))
        return kernelry.attention(*arrays, mask=mask)

    assert (np.asarray(run(query, key, value)) == 0).all()


@pytest.mark.parametrize("change", [{"chunk_size": 0}, {"top_k": 0}, {"top_k": 1.5}, {"chunk_size": True}])
def test_numbers_that_mean_nothing_are_errors(change):
    query, key, _ = _arrays()
    arguments = {"chunk_size": 4, "top_k": 2, "query_positions": np.arange(T), **change}
    with pytest.raises(ArgumentError, match="must be a positive integer"):
        moba.select_blocks(query, key, **arguments)


@pytest.mark.parametrize("positions", [np.arange(T + 1), np.zeros((T, B), int), 3])
def test_positions_that_do_not_fit_are_errors(positions):
    query, key, _ = _arrays()
    with pytest.raises(ShapeError, match="query_positions must be"):
        moba.select_blocks(query, key, chunk_size=4, top_k=2, query_positions=positions)


def test_keys_that_do_not_suit_the_queries_are_an_error():
    query, key, _ = _arrays()
    with pytest.raises(ShapeError, match="must suit query"):
        moba.select_blocks(query, key[..., :4], chunk_size=4, top_k=2, query_positions=np.arange(T))
    with pytest.raises(ShapeError, match="key must be"):
        moba.select_blocks(query, key[0], chunk_size=4, top_k=2, query_positions=np.arange(T))
