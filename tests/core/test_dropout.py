"""Dropout: the mask that was drawn is recovered from the output, and the oracle repeats the call with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    GROUPED,
    SUFFIX,
    Heads,
    arrays_of,
    assert_twins,
    attend,
    compiled_answer,
    compiled_attend,
    cotangents_of,
    oracle_answer,
    visible_by,
)
from pairs import sweep_but

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError
from kernelry.testing import reference_attention

pytestmark = pytest.mark.versions

T, S = SUFFIX


def _key(seed):
    """A key of the generator that compiles fast; threefry, JAX's default, takes seconds for each shape."""
    return jax.random.key(seed, impl="rbg")


CAUSAL = masks.Causal().at(query_offset=S - T)
SEES_NOTHING = masks.Lengths(np.array([S - 2, 0])) & CAUSAL
CASES = {
    "plain": (masks.Full(), GROUPED, {}, {}),
    "own_heads": (CAUSAL, Heads(4, 4, 8, 8), {}, {"scale": 0.3}),
    "one_key_head": (CAUSAL, Heads(4, 1, 8, 5), {"sinks": True}, {"soft_cap": 3.0}),
    "empty_rows": (SEES_NOTHING, GROUPED, {"sinks": True, "bias": (BATCH, 4, T, S)}, {}),
}


def _drawn(mask, arrays, rate, key, **arguments):
    """Recovers [B, N, T, S] by attending to values that are one-hot in the slot."""
    batch, kv_len, kv_heads, _ = arrays["key"].shape
    one_hot = jnp.broadcast_to(jnp.eye(kv_len)[None, :, None], (batch, kv_len, kv_heads, kv_len))
    weights = compiled_attend(mask, arrays | {"value": one_hot}, dropout_rate=rate, dropout_rng=key, **arguments)
    return np.swapaxes(np.asarray(weights), 1, 2) > 0


@pytest.mark.parametrize("case", sweep_but(CASES, "own_heads", "one_key_head", "empty_rows"))
def test_output_and_gradients_are_those_of_the_mask_that_was_drawn(case):
    mask, heads, shapes, arguments = CASES[case]
    arrays = arrays_of(T, S, heads, **shapes)
    rate, key = 0.3, _key(7)
    keep = _drawn(mask, arrays, rate, key, **arguments)
    visible = visible_by(mask, arrays)
    assert 0.6 < keep[visible].mean() < 0.8
    cotangents = cotangents_of(arrays)
    found = compiled_answer(mask, arrays, cotangents, dropout_rate=rate, dropout_rng=key, **arguments)
    expected = oracle_answer(mask, arrays, cotangents, dropout_rate=rate, dropout_keep=keep, **arguments)
    assert_twins(found, expected)


def test_statistics_know_nothing_of_dropout():
    statistics = {"return_partial": True, "return_max_logits": True}
    random = {"dropout_rate": 0.5, "dropout_rng": _key(0)}

    @jax.jit
    def both(arrays):
        return attend(CAUSAL, arrays, **statistics), attend(CAUSAL, arrays, **statistics, **random)

    (plain, plain_max), (dropped, dropped_max) = both(arrays_of(T, S))
    assert (np.asarray(dropped.out) != np.asarray(plain.out)).any()
    np.testing.assert_array_equal(dropped.lse, plain.lse)
    np.testing.assert_array_equal(dropped_max, plain_max)


def test_gradients_through_lse_know_nothing_of_dropout():
    arrays = arrays_of(T, S)
    rate, key = 0.3, _key(7)
    keep = _drawn(CAUSAL, arrays, rate, key)
    cotangents = cotangents_of(arrays, lse=True)
    found = compiled_answer(CAUSAL, arrays, cotangents, dropout_rate=rate, dropout_rng=key, return_partial=True)
    assert_twins(found, oracle_answer(CAUSAL, arrays, cotangents, dropout_rate=rate, dropout_keep=keep))


def test_the_same_key_drops_the_same_and_another_key_drops_others():
    arrays = arrays_of(T, S)
    one, again, other = (_drawn(masks.Full(), arrays, 0.5, _key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.sweep
def test_the_same_key_drops_the_same_in_a_compiled_program():
    arrays, given_here = arrays_of(T, S), {"dropout_rate": 0.5, "dropout_rng": _key(3)}
    found, plain = compiled_attend(CAUSAL, arrays, **given_here), attend(CAUSAL, arrays, **given_here)
    np.testing.assert_allclose(np.asarray(found), np.asarray(plain), atol=1e-6)


@pytest.mark.parametrize("rate", sweep_but([0.1, 0.5, 0.9], 0.1, 0.9))
def test_every_probability_is_kept_as_often_as_asked(rate):
    arrays = arrays_of(3, 4)
    keys = jax.random.split(_key(0), 1000)
    one_hot = jnp.broadcast_to(jnp.eye(4)[None, :, None], (BATCH, 4, GROUPED.kv, 4))
    call = jax.vmap(lambda key: attend(masks.Full(), arrays | {"value": one_hot}, dropout_rate=rate, dropout_rng=key))
    kept = np.asarray(jax.jit(call)(keys)) > 0
    # The fraction kept of n draws has the deviation √(rate·(1 − rate) / n); 5 of them, for 96 fractions at once.
    deviation = np.sqrt(rate * (1 - rate))
    np.testing.assert_allclose(kept.mean(axis=0), 1 - rate, atol=5 * deviation / np.sqrt(len(keys)))
    np.testing.assert_allclose(kept.mean(), 1 - rate, atol=5 * deviation / np.sqrt(kept.size))


def test_neighbours_are_dropped_independently():
    arrays = arrays_of(20, 20)
    keep = _drawn(masks.Full(), arrays, 0.5, _key(0)).astype(float) - 0.5
    for axis in range(4):
        together = (keep * np.roll(keep, 1, axis=axis)).mean() * 4
        assert abs(together) < 5 / np.sqrt(keep.size), axis


def test_the_mean_over_keys_is_attention_without_dropout():
    arrays = arrays_of(T, S)
    keys = jax.random.split(_key(0), 2000)
    call = jax.vmap(lambda key: attend(CAUSAL, arrays, dropout_rate=0.5, dropout_rng=key))
    dropped = np.asarray(jax.jit(call)(keys))
    error = dropped.std(axis=0) / np.sqrt(len(keys))
    expected = reference_attention(*arrays.values(), mask=CAUSAL).out
    np.testing.assert_array_less(np.abs(dropped.mean(axis=0) - expected), 5 * error + 1e-6)


def test_a_rate_of_zero_draws_nothing():
    arrays = arrays_of(T, S)

    def program(**arguments):
        return str(jax.make_jaxpr(lambda arrays: attend(CAUSAL, arrays, **arguments))(arrays))

    assert program(dropout_rate=0.0, dropout_rng=_key(0)) == program()
    assert "random_bits" in program(dropout_rate=0.5, dropout_rng=_key(0))


def test_a_rate_without_a_key_is_an_error():
    with pytest.raises(ArgumentError, match="dropout_rng"):
        kernelry.attention(*arrays_of(T, S).values(), dropout_rate=0.5)
