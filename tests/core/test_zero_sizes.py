"""No queries, no keys, no batch rows: every mask answers with empty arrays, zeros and −inf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    GROUPED,
    MASKS,
    Answer,
    answer,
    arrays_of,
    compiled_answer,
    cotangents_of,
    masks_of_every_class,
)

import kernelry
from kernelry import masks

SIZES = {"no_queries": (2, 0, 4), "no_keys": (2, 3, 0), "no_rows": (0, 3, 4), "nothing": (0, 0, 0)}
N, D = GROUPED.query, GROUPED.value_dim


def _first_rows(tree, rows):
    """Keeps the first rows of what has a row for each of the batch."""
    return jax.tree.map(lambda leaf: leaf[:rows] if np.shape(leaf)[:1] == (BATCH,) else leaf, tree)


def _case(mask, size, *, partial):
    batch, q_len, kv_len = SIZES[size]
    arrays = arrays_of(q_len, kv_len, bias=(BATCH, N, q_len, kv_len), sinks=not partial)
    placed = masks_of_every_class(q_len, kv_len)[mask].at(query_offset=0)
    arrays = {name: array if name == "sinks" else array[:batch] for name, array in arrays.items()}
    return _first_rows(placed, batch), arrays, cotangents_of(arrays, lse=partial)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_output_and_gradients_are_zero(mask, size):
    placed, arrays, cotangents = _case(mask, size, partial=False)
    found = Answer(*answer(placed, arrays, cotangents))
    batch, q_len, _ = SIZES[size]
    assert found.out.shape == (batch, q_len, N, D)
    assert {name: g.shape for name, g in found.gradients.items()} == {name: a.shape for name, a in arrays.items()}
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((found.out, found.gradients)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_statistics_are_those_of_nothing(mask, size):
    placed, arrays, cotangents = _case(mask, size, partial=True)
    found = Answer(*answer(placed, arrays, cotangents, return_partial=True, return_max_logits=True))
    batch, q_len, _ = SIZES[size]
    np.testing.assert_array_equal(found.lse, np.full((batch, N, q_len), -np.inf))
    np.testing.assert_array_equal(found.max_logits, np.full((batch, N), -np.inf))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((found.out, found.gradients)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_compiled_programs_serve_zero_sizes(size, mode):
    placed, arrays, cotangents = _case("and", size, partial=False)
    found = compiled_answer(placed, arrays, cotangents, gradients=tuple(arrays), mode=mode, soft_cap=None)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((found.out, found.gradients)))


@pytest.mark.parametrize(("size", "mask"), [("no_queries", "full"), ("no_keys", "full"), ("no_rows", "causal")])
def test_dropout_and_half_precision_serve_zero_sizes(size, mask):
    placed, arrays, _ = _case(mask, size, partial=False)
    qkv = [arrays[name].astype(jnp.bfloat16) for name in ("query", "key", "value")]
    out = kernelry.attention(*qkv, mask=placed, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    assert out.dtype == jnp.bfloat16
    assert (np.asarray(out) == 0).all()


def test_a_part_without_keys_is_the_identity_of_merge():
    arrays = arrays_of(3, 4)
    some = kernelry.attention(*arrays.values(), return_partial=True)
    none = kernelry.attention(*arrays_of(3, 0).values(), return_partial=True)
    for parts in ([some, none], [none, some]):
        merged = kernelry.merge(parts)
        np.testing.assert_allclose(np.asarray(merged.out), np.asarray(some.out), atol=1e-6)
        np.testing.assert_allclose(np.asarray(merged.lse), np.asarray(some.lse), atol=1e-6)


def test_no_keys_with_sinks_give_zero():
    arrays = arrays_of(3, 0, sinks=True)
    sinks = arrays.pop("sinks")
    out = kernelry.attention(*arrays.values(), sinks=sinks, mask=masks.Causal().at(query_offset=0))
    assert (np.asarray(out) == 0).all()
