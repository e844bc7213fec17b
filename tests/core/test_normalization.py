"""The laws of partials: merging is associative and commutative, has an identity, and loses nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError, ShapeError
from kernelry.normalization import LogSumExp, MaxSum, to_lse, to_max_sum

B, T, N, K, H = 2, 6, 4, 2, 8


def _arrays(kv_len, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, T, N, H), (B, kv_len, K, H), (B, kv_len, K, H))
    return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))


def _part(q, k, v, first, last):
    mask = masks.Causal().at(query_offset=2, kv_offset=first)
    return kernelry.attention(q, k[:, first:last], v[:, first:last], mask=mask, return_partial=True)


def _close(left, right, atol=2e-6):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol)


@given(st.integers(0, 8), st.integers(0, 8))
@settings(max_examples=6, deadline=None)
def test_splitting_the_keys_anywhere_changes_nothing(one, other):
    q, k, v = _arrays(8)
    cuts = [0, *sorted((one, other)), 8]
    whole = kernelry.attention(q, k, v, mask=masks.Causal().at(query_offset=2))
    parts = [_part(q, k, v, first, last) for first, last in itertools.pairwise(cuts)]
    _close(kernelry.finalize(kernelry.merge(parts)), whole)


@pytest.mark.parametrize("form", [to_lse, to_max_sum])
def test_merge_is_associative_and_commutative(form):
    q, k, v = _arrays(8)
    a, b, c = (form(_part(q, k, v, first, last)) for first, last in ((0, 3), (3, 5), (5, 8)))
    left = kernelry.merge([kernelry.merge([a, b]), c])
    _close(kernelry.finalize(left), kernelry.finalize(kernelry.merge([a, kernelry.merge([b, c])])))
    _close(kernelry.finalize(left), kernelry.finalize(kernelry.merge([c, a, b])))
    _close(to_lse(left).lse, to_lse(kernelry.merge([c, a, b])).lse)


@pytest.mark.parametrize("form", [to_lse, to_max_sum])
def test_an_empty_part_is_the_identity(form):
    q, k, v = _arrays(8)
    part = form(_part(q, k, v, 0, 8))
    empty = form(_part(q, k, v, 4, 4))
    _close(to_lse(kernelry.merge([part, empty])), to_lse(part))
    nothing = to_lse(kernelry.merge([empty, empty]))
    assert (np.asarray(nothing.lse) == -np.inf).all()
    assert (np.asarray(nothing.out) == 0).all()


@pytest.mark.parametrize("form", [to_lse, to_max_sum])
def test_gradients_of_merged_parts_equal_those_of_the_whole(form):
    q, k, v = _arrays(8)
    sinks = jnp.linspace(-1.0, 1.0, N)

    def whole(q, k, v, sinks):
        mask = masks.Causal().at(query_offset=2)
        return jnp.sin(kernelry.attention(q, k, v, mask=mask, sinks=sinks)).sum()

    def parts(q, k, v, sinks):
        merged = kernelry.merge([form(_part(q, k, v, first, last)) for first, last in ((0, 2), (2, 5), (5, 8))])
        return jnp.sin(kernelry.finalize(merged, sinks)).sum()

    _close(
        jax.jit(jax.grad(parts, argnums=(0, 1, 2, 3)))(q, k, v, sinks),
        jax.jit(jax.grad(whole, argnums=(0, 1, 2, 3)))(q, k, v, sinks),
        atol=1e-5,
    )


def test_statistics_of_empty_rows_in_both_forms():
    q, k, v = _arrays(4)
    mask = masks.Lengths(jnp.array([0, 2], jnp.int32))
    partial = kernelry.attention(q, k, v, mask=mask, return_partial=True)
    other = to_max_sum(partial)
    assert (np.asarray(partial.out[0]) == 0).all()
    assert (np.asarray(partial.lse[0]) == -np.inf).all()
    assert (np.asarray(other.max[0]) == -np.inf).all()
    assert (np.asarray(other.sum[0]) == 0).all()
    assert (np.asarray(other.sum[1]) == 1).all()


@pytest.mark.parametrize("normalization", [LogSumExp(), MaxSum()])
def test_finalize_returns_the_querys_dtype(normalization):
    q, k, v = (array.astype(jnp.bfloat16) for array in _arrays(4))
    partial = kernelry.attention(q, k, v, return_partial=True)
    merged = normalization.merge([partial])
    assert merged.out.dtype == jnp.float32
    assert normalization.finalize(merged).dtype == jnp.bfloat16


def test_merge_of_nothing_is_an_error():
    with pytest.raises(ArgumentError, match="no partials"):
        kernelry.merge([])


def test_merge_without_statistics_is_an_error():
    with pytest.raises(ArgumentError, match="return_partial=True"):
        kernelry.merge([kernelry.Partial(jnp.zeros((1, 1, 1, 1)))])


def test_max_logits_of_parts_merge_to_the_largest():
    q, k, v = _arrays(8)

    def part(first, last):
        call = {"return_partial": True, "return_max_logits": True}
        return kernelry.attention(q, k[:, first:last], v[:, first:last], **call)[0]

    whole = kernelry.attention(q, k, v, return_max_logits=True)[1]
    _close(kernelry.merge([part(0, 3), part(3, 8)]).max_logits, whole)


def _partial(shape=(1, 2, 4, 8), dtype="float32", **statistics):
    batch, length, heads, _ = shape
    return kernelry.Partial(jnp.zeros(shape), lse=jnp.zeros((batch, heads, length)), dtype=dtype, **statistics)


@pytest.mark.parametrize("other", [_partial((1, 3, 4, 8)), _partial((2, 2, 4, 8)), _partial(dtype="bfloat16")])
def test_merge_of_parts_of_different_attentions_is_an_error(other):
    with pytest.raises(ShapeError, match="for the same queries; got outputs"):
        kernelry.merge([_partial(), other])


def test_merge_never_drops_max_logits():
    with pytest.raises(ArgumentError, match="1 of 2 partials hold no max_logits"):
        kernelry.merge([_partial(), _partial(max_logits=jnp.zeros((1, 4)))])


def test_merge_of_arrays_is_an_error():
    with pytest.raises(ArgumentError, match="merge takes Partials, got"):
        kernelry.merge([jnp.zeros((1, 2, 4, 8))])


def test_merge_takes_any_sequence_and_says_so():
    part = _partial()
    _close(kernelry.merge(p for p in (part, part)), kernelry.merge([part, part]))
    with pytest.raises(ArgumentError, match=r"write merge\(\[partial\]\)"):
        kernelry.merge(part)


def test_finalize_takes_sinks_as_a_list():
    _close(kernelry.finalize(_partial(), [0.0] * 4), kernelry.finalize(_partial(), jnp.zeros(4)))


def test_finalize_of_an_array_is_an_error():
    with pytest.raises(ArgumentError, match="finalize takes a Partial, got"):
        kernelry.finalize(jnp.zeros((1, 2, 4, 8)))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 4)])
def test_finalize_refuses_sinks_that_are_not_one_per_head(shape):
    with pytest.raises(ShapeError, match="one logit per query head"):
        kernelry.finalize(_partial(), jnp.zeros(shape))
