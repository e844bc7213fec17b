"""The work of a shape, counted by brute force from its mask."""

import dataclasses

import jax
import numpy as np
import pytest
from on_device.shapes import ACCELERATOR, BOTH, CPU, FORWARD, SHAPES, Shape

_SHRINK = 64


def _small(shape):
    """The same kind of call, short enough for its whole mask to be looked at."""
    if shape.mode == "decode":
        return dataclasses.replace(shape, kv_len=shape.kv_len // _SHRINK, batch=min(shape.batch, 2))
    documents = shape.documents and tuple(max(1, length // _SHRINK) for length in shape.documents)
    length = sum(documents) if documents else shape.q_len // _SHRINK
    window = shape.window and shape.window // _SHRINK
    return dataclasses.replace(shape, q_len=length, kv_len=length, window=window, documents=documents)


def _materialized(shape):
    return np.asarray(shape.mask(shape.ids()).materialize(shape.q_len, shape.kv_len))


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_of_the_visible_pairs(name):
    shape = _small(SHAPES[name])
    pairs = np.broadcast_to(_materialized(shape), (shape.batch, shape.q_heads, shape.q_len, shape.kv_len)).sum()
    products = {FORWARD: shape.head_dim + shape.out_dim, BOTH: 4 * shape.head_dim + 3 * shape.out_dim}
    for which in shape.passes:
        assert shape.flops(which) == 2 * pairs * products[which]


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_are_those_of_the_arrays(name):
    shape = _small(SHAPES[name])
    query, key, value, weights, _ = jax.eval_shape(shape.arrays)
    assert shape.bytes == sum(array.size * array.dtype.itemsize for array in (query, key, value, weights))


@pytest.mark.parametrize("name", SHAPES)
def test_a_causal_shape_is_square_and_its_documents_fill_it(name):
    shape = SHAPES[name]
    assert not shape.causal or shape.q_len == shape.kv_len
    assert shape.documents is None or sum(shape.documents) == shape.q_len
    assert shape.q_heads % shape.kv_heads == 0


def test_backward_is_two_and_a_half_times_forward_where_h_equals_d():
    shape = ACCELERATOR["causal_8k"]
    assert shape.flops(BOTH) == 3.5 * shape.flops(FORWARD)


def test_a_window_longer_than_a_document_is_cut_by_it():
    shape = Shape(q_len=8, kv_len=8, q_heads=1, kv_heads=1, head_dim=1, window=6, documents=(5, 3))
    assert shape.visible == _materialized(shape).sum() == 15 + 6


def test_no_name_stands_for_two_shapes():
    assert not ACCELERATOR.keys() & CPU.keys()
