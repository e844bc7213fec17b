"""Partials: their two forms, what merging them keeps, and what is refused.

That merged parts are the whole, gradients included, and the laws of `merge` are in test_laws.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry.errors import ArgumentError, ShapeError
from kernelry.execution.normalization import LogSumExp, MaxSum, to_lse, to_max_sum

B, T, N, D = 2, 5, 4, 8


def _part(seed, *, empty=(), **fields):
    """Draws a Partial; the batch rows named see nothing."""
    rng = np.random.default_rng(seed)
    out, lse = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, N, D), (B, N, T)))
    out[list(empty)], lse[list(empty)] = 0, -np.inf
    return kernelry.Partial(jnp.asarray(out), lse=jnp.asarray(lse), **{"dtype": "float32"} | fields)


def _close(left, right, atol=2e-6):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol)


def _alike(left, right):
    _close((left.out, left.lse), (right.out, right.lse))


@pytest.mark.parametrize("form", [to_lse, to_max_sum])
def test_an_empty_part_is_the_identity(form):
    part, empty = form(_part(0)), form(_part(1, empty=(0, 1)))
    _alike(to_lse(kernelry.merge([part, empty])), to_lse(part))
    nothing = to_lse(kernelry.merge([empty, empty]))
    assert (np.asarray(nothing.lse) == -np.inf).all()
    assert (np.asarray(nothing.out) == 0).all()


@pytest.mark.parametrize("form", [to_lse, to_max_sum])
def test_merging_weighs_outputs_by_their_share_of_the_sum(form):
    one, other = _part(0), _part(1, empty=(0,))
    found = to_lse(kernelry.merge([form(one), form(other)]))
    exps = [np.exp(np.asarray(part.lse, np.float64)) for part in (one, other)]
    shares = [np.swapaxes(exp / sum(exps), 1, 2)[..., None] for exp in exps]
    _close(found.lse, np.log(sum(exps)))
    _close(found.out, sum(share * np.asarray(part.out) for share, part in zip(shares, (one, other), strict=True)))


def test_merging_keeps_max_and_sum_only_where_every_part_has_them():
    one, other = _part(0), _part(1)
    assert kernelry.merge([to_max_sum(one), to_max_sum(other)]).max is not None
    mixed = kernelry.merge([one, to_max_sum(other)])
    assert mixed.max is None
    assert mixed.lse is not None


@pytest.mark.parametrize("top", [-3e38, -1e30, 1e30])
def test_merging_by_maximum_and_sum_is_exact_beside_large_logits(top):
    """There lse is the maximum alone: parts of 1 and of 3 keys weigh the same by it, which only their sums can mend."""
    one, three = (
        kernelry.Partial(
            jnp.full((1, 1, 1, 1), total * value),
            max=jnp.full((1, 1, 1), top, jnp.float32),
            sum=jnp.full((1, 1, 1), total, jnp.float32),
        )
        for total, value in ((1.0, 4.0), (3.0, 0.0))
    )
    _close(kernelry.finalize(kernelry.merge([one, three])), np.ones((1, 1, 1, 1)))
    _close(to_lse(kernelry.merge([to_lse(one), to_lse(three)])).out, np.ones((1, 1, 1, 1)))  # lse with its rest


def test_the_maximum_carries_no_gradient():
    one, other = to_max_sum(_part(0)), to_max_sum(_part(1))

    def summed(maximum):
        return kernelry.finalize(kernelry.merge([dataclasses.replace(one, max=maximum), other])).sum()

    value, gradient = jax.value_and_grad(summed)(one.max)
    assert value != summed(one.max + 1)  # it decides what a part weighs
    assert (np.asarray(gradient) == 0).all()


def test_statistics_of_empty_rows_in_both_forms():
    partial = _part(0, empty=(0,))
    other = to_max_sum(partial)
    assert (np.asarray(other.out[0]) == 0).all()
    assert (np.asarray(other.max[0]) == -np.inf).all()
    assert (np.asarray(other.sum[0]) == 0).all()
    assert (np.asarray(other.sum[1]) == 1).all()
    _alike(to_lse(other), partial)


@pytest.mark.parametrize("normalization", [LogSumExp(), MaxSum()])
def test_finalize_returns_the_querys_dtype(normalization):
    merged = normalization.merge([_part(0, dtype="bfloat16")])
    assert merged.out.dtype == jnp.float32
    assert normalization.finalize(merged).dtype == jnp.bfloat16


def test_merge_of_nothing_is_an_error():
    with pytest.raises(ArgumentError, match="no partials"):
        kernelry.merge([])


def test_merge_without_statistics_is_an_error():
    with pytest.raises(ArgumentError, match="return_partial=True"):
        kernelry.merge([kernelry.Partial(jnp.zeros((1, 1, 1, 1)))])


def test_a_maximum_without_its_sum_is_no_statistic():
    with pytest.raises(ArgumentError, match="return_partial=True"):
        to_lse(kernelry.Partial(jnp.zeros((1, 1, 1, 1)), max=jnp.zeros((1, 1, 1))))


@pytest.mark.parametrize("form", [to_lse, to_max_sum])
def test_max_logits_of_parts_merge_to_the_largest(form):
    one, other = np.random.default_rng(2).standard_normal((2, B, N)).astype(np.float32)
    parts = [form(_part(seed, max_logits=jnp.asarray(of))) for seed, of in enumerate((one, other))]
    np.testing.assert_array_equal(kernelry.merge(parts).max_logits, np.maximum(one, other))


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


def test_mistakes_with_partials_say_what_to_pass():
    part = kernelry.Partial(jnp.zeros((1, 2, 3, 4)), lse=jnp.zeros((1, 3, 2)), dtype="float32")
    for mistake, told in (
        (lambda: kernelry.merge(None), "merge takes a sequence of Partials, got None."),
        (lambda: kernelry.merge([jnp.zeros(3)]), "attention(…, return_partial=True)"),
        (lambda: kernelry.merge([(part, None)]), "returns (partial, max_logits); pass the first"),
        (lambda: kernelry.finalize(jnp.zeros(3)), "attention(…, return_partial=True)"),
        (lambda: kernelry.finalize(dataclasses.replace(part, lse=None, max=part.lse)), "this Partial lacks sum"),
        (lambda: kernelry.merge([part, dataclasses.replace(part, lse=part.lse[..., :1])]), "whose lse has one shape"),
    ):
        with pytest.raises(kernelry.errors.KernelryError) as caught:
            mistake()
        assert told in str(caught.value)
