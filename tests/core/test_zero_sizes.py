"""No queries, no keys, no batch rows: every mask answers with empty arrays, zeros and −inf.

One program for each mask holds all sizes; masks and sizes alternate between the two sets of arguments.
"""

import functools

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
    compiled_attend,
    cotangents_of,
    masks_of_every_class,
)

SIZES = {"no_queries": (2, 0, 4), "no_keys": (2, 3, 0), "no_rows": (0, 3, 4), "nothing": (0, 0, 0)}
MODES = ("train", "prefill", "decode")
N, D = GROUPED.query, GROUPED.value_dim


def _is_even(mask, size):
    """Splits the pairs of mask and size like the fields of a chessboard."""
    return (MASKS.index(mask) + tuple(SIZES).index(size)) % 2 == 0


def _pairs(*, even):
    """Returns all pairs; `make test` runs the even or the odd ones."""
    pairs = [(mask, size) for mask in MASKS for size in SIZES]
    return [pytest.param(*pair, marks=() if _is_even(*pair) == even else pytest.mark.sweep) for pair in pairs]


def _first_rows(tree, rows):
    """Keeps the first rows of what has a row for each of the batch."""
    return jax.tree.map(lambda leaf: leaf[:rows] if np.shape(leaf)[:1] == (BATCH,) else leaf, tree)


def _case(mask, size, *, partial):
    batch, q_len, kv_len = SIZES[size]
    arrays = arrays_of(q_len, kv_len, bias=(BATCH, N, q_len, kv_len), sinks=not partial)
    placed = masks_of_every_class(q_len, kv_len)[mask].at(query_offset=0)
    arrays = {name: array if name == "sinks" else array[:batch] for name, array in arrays.items()}
    return _first_rows(placed, batch), arrays, _first_rows(cotangents_of(arrays, lse=partial), batch)


@functools.cache
def _answers(mask, evens_are_plain):
    """Answers by size in one program; half of the sizes are plain, the even ones or the odd, the others Partials."""
    partial = {size: _is_even(mask, size) != evens_are_plain for size in SIZES}
    cases = {size: _case(mask, size, partial=partial[size]) for size in SIZES}

    def arguments(size):
        if partial[size]:
            return {"return_partial": True, "return_max_logits": True}
        mode = MODES[MASKS.index(mask) % len(MODES)]
        return {"mode": mode, "gradients": tuple(cases[size][1])}

    called = jax.jit(lambda cases: {size: answer(*case, **arguments(size)) for size, case in cases.items()})(cases)
    return {size: (cases[size][1], Answer(*found)) for size, found in called.items()}


def _assert_zero(*arrays):
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(arrays))


@pytest.mark.parametrize(("mask", "size"), _pairs(even=True))
def test_output_and_gradients_are_zero(mask, size):
    arrays, found = _answers(mask, _is_even(mask, size))[size]
    batch, q_len, _ = SIZES[size]
    assert found.out.shape == (batch, q_len, N, D)
    assert {name: g.shape for name, g in found.gradients.items()} == {name: a.shape for name, a in arrays.items()}
    _assert_zero(found.out, found.gradients)


@pytest.mark.parametrize(("mask", "size"), _pairs(even=False))
def test_statistics_are_those_of_nothing(mask, size):
    _, found = _answers(mask, not _is_even(mask, size))[size]
    batch, q_len, _ = SIZES[size]
    np.testing.assert_array_equal(found.lse, np.full((batch, N, q_len), -np.inf))
    np.testing.assert_array_equal(found.max_logits, np.full((batch, N), -np.inf))
    _assert_zero(found.out, found.gradients)


@pytest.mark.parametrize(("size", "mask"), [("no_queries", "full"), ("no_keys", "full"), ("no_rows", "causal")])
def test_dropout_and_half_precision_serve_zero_sizes(size, mask):
    placed, arrays, _ = _case(mask, size, partial=False)
    qkv = {name: arrays[name].astype(jnp.bfloat16) for name in ("query", "key", "value")}
    out = compiled_attend(placed, qkv, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    assert out.dtype == jnp.bfloat16
    _assert_zero(out)
