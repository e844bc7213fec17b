"""Bad input to attention: the message names the argument, what it was and what it must be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError, ShapeError

Q = jnp.ones((2, 6, 4, 8))
K = jnp.ones((2, 6, 2, 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": Q[0]}, ["query", "[B, T, N, H]", "(6, 4, 8)"]),
        ({"key": K[..., 0]}, ["key", "[B, S, K, H]", "(2, 6, 2)"]),
        ({"value": K[None]}, ["value", "[B, S, K, D]", "(1, 2, 6, 2, 8)"]),
        ({"query": [[1.0]]}, ["query must be an array", "list"]),
        ({"query": Q.astype(jnp.int32)}, ["query must be floating", "int32"]),
        ({"key": K.astype(jnp.bfloat16)}, ["key", "float32", "bfloat16"]),
        ({"value": K.astype(jnp.float16)}, ["value", "float32", "float16"]),
        ({"key": K[:1]}, ["key", "B=2", "(1, 6, 2, 8)"]),
        ({"value": K[:1]}, ["value", "B=2", "(1, 6, 2, 8)"]),
        ({"key": K[..., :4]}, ["key", "H=8", "(2, 6, 2, 4)"]),
        ({"value": K[:, :4]}, ["value", "S=6", "(2, 4, 2, 8)"]),
        ({"value": K[:, :, :1]}, ["value", "K=2", "(2, 6, 1, 8)"]),
        ({"key": jnp.ones((2, 6, 3, 8)), "value": jnp.ones((2, 6, 3, 8))}, ["key", "K=3", "N=4"]),
        ({"mask": jnp.ones((6, 6), bool)}, ["mask must be a kernelry mask", "(6, 6)", "masks.Dense"]),
        ({"mask": None}, ["mask must be a kernelry mask", "NoneType"]),
        ({"mask": masks.Dense(np.ones((3, 1, 6, 6), bool))}, ["visible", "(2, 4, 6, 6)", "(3, 1, 6, 6)"]),
        ({"mask": masks.Segments(np.zeros((2, 5), int))}, ["query_ids", "[2, 6]", "(2, 5)"]),
        ({"mask": masks.Lengths(np.zeros(3, int))}, ["kv_lengths", "[2]", "(3,)"]),
        ({"query": Q[:, :3], "mask": masks.Causal()}, ["Causal()", "T=3", "S=6", "query_offset=3"]),
        ({"query": Q[:, :3], "mask": masks.Full() & ~masks.SlidingWindow(2)}, ["T=3", "S=6", "query_offset"]),
        ({"bias": jnp.ones((6, 5))}, ["bias", "(2, 4, 6, 6)", "(6, 5)"]),
        ({"bias": jnp.ones((1, 1, 1, 6, 6))}, ["bias", "(1, 1, 1, 6, 6)"]),
        ({"bias": jnp.ones((6, 6), bool)}, ["bias must be floating", "bool", "masks.Dense"]),
        ({"sinks": jnp.ones(2)}, ["sinks", "[4]", "(2,)"]),
        ({"sinks": jnp.ones((1, 4))}, ["sinks", "rank 1", "(1, 4)"]),
    ],
)
def test_misfits_raise_shape_errors_that_name_the_argument(change, words):
    arguments = {"query": Q, "key": K, "value": K, **change}
    with pytest.raises(ShapeError) as caught:
        jax.jit(lambda: kernelry.attention(**arguments))()
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mode": "trian"}, "unknown mode 'trian'; did you mean 'train'"),
        ({"soft_cap": 0.0}, "soft_cap must be positive, got 0.0"),
        ({"soft_cap": -1.0}, "soft_cap must be positive"),
        ({"dropout_rate": 1.0}, "dropout_rate must be in"),
        ({"dropout_rate": 0.1}, "needs dropout_rng"),
        ({"normalization": "softmx"}, "did you mean 'softmax'"),
        ({"gradients": ["querry"]}, "did you mean 'query'"),
        ({"gradients": "query"}, "gradients must be names of operands"),
        ({"gradients": 3}, "gradients must be names of operands"),
        ({"scale": True}, "scale must be a finite number"),
        ({"dropout_rate": 0.1, "dropout_rng": 3}, "dropout_rng must be one PRNG key"),
        ({"dropout_rate": 0.1, "dropout_rng": jnp.zeros(5)}, "dropout_rng must be one PRNG key"),
        (
            {"dropout_rate": 0.1, "dropout_rng": jax.random.split(jax.random.key(0), 2)},
            "dropout_rng must be one PRNG key",
        ),
        ({"sinks": jnp.ones(4), "return_partial": True}, "kernelry.finalize"),
        ({"scale": "x"}, "scale must be a finite number"),
        ({"scale": jnp.ones(2)}, "scale must be a finite number"),
        ({"soft_cap": float("inf")}, "soft_cap must be a finite number"),
        ({"dropout_rate": "a"}, "dropout_rate must be a finite number"),
        ({"kernel": None}, "kernel must be a name or 'auto', got None"),
        ({"precision": "hihgest"}, "did you mean 'highest'"),
        ({"logits_dtype": "foo"}, "logits_dtype='foo' is no dtype"),
        ({"logits_dtype": jnp.int32}, "logits_dtype must be floating, got int32"),
        ({"logits_dtype": "float64"}, "logits_dtype=float64 needs 64-bit types"),
        ({"normalization": None}, "unknown normalization None"),
    ],
)
def test_meaningless_values_raise_argument_errors(change, complaint):
    with pytest.raises(ArgumentError, match=re.escape(complaint)):
        kernelry.attention(Q, K, K, **change)


def test_traced_numbers_are_refused_before_jax_complains():
    with pytest.raises(ArgumentError, match="scale must be a Python number"):
        jax.jit(lambda scale: kernelry.attention(Q, K, K, scale=scale))(0.5)


def test_numbers_may_be_arrays_of_rank_0():
    kernelry.attention(Q, K, K, scale=1 / jnp.sqrt(8.0), soft_cap=np.float32(3))


def test_positional_masks_with_at_accept_unequal_lengths():
    assert kernelry.attention(Q[:, :3], K, K, mask=masks.Causal().at(query_offset=3)).shape == (2, 3, 4, 8)
