"""Masks: each atom means its definition, in NumPy and in JAX, moved by `.at` and composed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from mask_strategies import BATCH, Q_HEADS, placed_masks

from kernelry import masks
from kernelry.masks.base import Extent
from kernelry.masks.fit import check_fits
from kernelry.testing import reference_mask


def _reference(mask, q_len, kv_len):
    return reference_mask(mask, BATCH, Q_HEADS, q_len, kv_len)


def _full(visible, q_len, kv_len):
    return np.broadcast_to(np.asarray(visible), (BATCH, Q_HEADS, q_len, kv_len))


@given(placed_masks())
@settings(max_examples=150, deadline=None)
def test_evaluation_equals_the_definition(drawn):
    mask, q_len, kv_len = drawn
    np.testing.assert_array_equal(
        _full(mask.materialize(q_len, kv_len, q_heads=Q_HEADS), q_len, kv_len), _reference(mask, q_len, kv_len)
    )


@given(placed_masks())
@settings(max_examples=100, deadline=None)
def test_canonical_conjunction_equals_the_mask(drawn):
    mask, q_len, kv_len = drawn
    conjuncts = mask.canonical()
    assert len(conjuncts) == len(mask.form.atoms)
    product = np.ones((BATCH, Q_HEADS, q_len, kv_len), bool)
    for conjunct in conjuncts:
        product &= _full(conjunct.materialize(q_len, kv_len, q_heads=Q_HEADS), q_len, kv_len)
    np.testing.assert_array_equal(product, _reference(mask, q_len, kv_len))


@given(placed_masks())
@settings(max_examples=100, deadline=None)
def test_form_never_denies_empty_rows_or_hidden_slots_that_exist(drawn):
    mask, q_len, kv_len = drawn
    visible = _reference(mask, q_len, kv_len)
    if not visible.any(axis=3).all():
        assert mask.form.may_have_empty_rows(q_len, kv_len)
    if not visible.any(axis=2).all():
        assert mask.form.may_hide_slots(q_len, kv_len)


def test_block_map_of_a_dynamic_part_is_never_full():
    mask = masks.Causal() & masks.Segments(jnp.zeros((1, 8), jnp.int32))
    assert (mask.block_map(8, 8, 4, 4) == [[masks.BlockKind.PARTIAL, masks.BlockKind.EMPTY], [1, 1]]).all()


def test_numpy_in_numpy_out():
    mask = masks.Causal() & masks.Segments(np.zeros((1, 4), np.int32)) & masks.Lengths(np.array([3]))
    assert isinstance(mask.materialize(4, 4), np.ndarray)


def test_innermost_at_wins():
    inner = masks.Causal().at(query_offset=1)
    outer = inner.at(query_offset=5, kv_offset=0)
    np.testing.assert_array_equal(outer.materialize(2, 4), inner.materialize(2, 4))


def test_at_does_not_move_indexed_masks():
    mask = masks.Lengths(np.array([2]))
    np.testing.assert_array_equal(mask.at(kv_offset=7).materialize(3, 3), mask.materialize(3, 3))
    assert mask.at(kv_offset=7).form == mask.form


def test_at_refuses_two_ways_of_saying_where():
    with pytest.raises(ValueError, match="both query_offset and query_positions"):
        masks.Causal().at(query_offset=1, query_positions=np.arange(3))


@pytest.mark.parametrize("bad", [1.5, np.ones(3), "x", np.zeros((2, 2), int)])
def test_at_refuses_offsets_that_are_not_integers(bad):
    with pytest.raises(ValueError, match="query_offset must be integers"):
        masks.Causal().at(query_offset=bad)


@pytest.mark.parametrize("bad", [-1, 1.0, True, 2**31])
def test_window_refuses_bounds_that_mean_nothing(bad):
    with pytest.raises(ValueError, match="left must be an integer"):
        masks.SlidingWindow(bad)


def test_dense_refuses_numbers():
    with pytest.raises(ValueError, match="visible must be boolean"):
        masks.Dense(np.ones((2, 2)))


def test_segments_refuse_floats():
    with pytest.raises(ValueError, match="query_ids must be integers"):
        masks.Segments(np.ones((1, 4)))


def test_composing_with_an_array_says_to_use_dense():
    with pytest.raises(ValueError, match=r"masks\.Dense"):
        masks.Causal() & np.ones((4, 4), bool)


def test_double_negation_is_the_mask_itself():
    mask = masks.Causal()
    assert ~~mask is mask


def test_masks_without_arrays_are_hashable_and_equal_by_value():
    assert hash(masks.SlidingWindow(3) & masks.Causal()) == hash(masks.SlidingWindow(3) & masks.Causal())
    assert masks.Causal().at(query_offset=2) == masks.Causal().at(query_offset=2)


def test_masks_with_arrays_are_not_hashable():
    with pytest.raises(TypeError):
        hash(masks.Causal() & masks.Lengths(np.array([3])))


def test_masks_are_pytrees_whose_arrays_are_leaves():
    ids = jnp.zeros((2, 4), jnp.int32)
    mask = (masks.Causal().at(query_offset=jnp.int32(3)) & masks.Segments(ids)) | masks.SlidingWindow(2)
    leaves, structure = jax.tree.flatten(mask)
    assert len(leaves) == 2
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert rebuilt.form == mask.form


def test_unflatten_does_not_validate():
    mask = masks.Segments(jnp.zeros((2, 4), jnp.int32)) & masks.SlidingWindow(2)
    assert jax.tree.map(lambda _: None, mask) is not None
    axes = jax.tree.map(lambda _: 0, mask)
    rows = jax.vmap(lambda m: m.materialize(4, 4)[0, 0], in_axes=(axes,))(mask)
    np.testing.assert_array_equal(rows, mask.materialize(4, 4)[:, 0])


def test_equal_masks_share_one_trace():
    traces = []

    @jax.jit
    def visible(mask):
        traces.append(mask.form)
        return mask.materialize(4, 4)

    for offset in (1, 2):
        visible(masks.Causal().at(query_offset=jnp.int32(offset)))
    visible(masks.SlidingWindow(2))
    visible(masks.SlidingWindow(2))
    assert len(traces) == 2


def test_repr_can_be_pasted_back():
    mask = ~(masks.Causal().at(query_offset=3) & masks.SlidingWindow(4, 1)) | masks.Full()
    pasted = eval(repr(mask), {name: getattr(masks, name) for name in masks.__all__})
    assert pasted == mask


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (masks.Segments(np.zeros((2, 3), int)), "query_ids"),
        (masks.Segments(np.zeros((2, 4), int)), "kv_ids=None"),
        (masks.Segments(np.zeros((2, 4), int), np.zeros((2, 4), int)), "kv_ids"),
        (masks.Lengths(np.array([1, 2, 3])), "kv_lengths"),
        (masks.Lengths(np.array([1, 2]), np.array([1])), "query_lengths"),
        (masks.Dense(np.ones((4, 4), bool)), "visible"),
        (masks.Causal(), "query_offset"),
        (~masks.SlidingWindow(3), "query_offset"),
        (masks.Causal().at(query_positions=np.arange(3)), "query_positions"),
        (masks.Causal().at(kv_positions=np.zeros((3, 5), int)), "kv_positions"),
        (masks.Causal().at(query_offset=np.array([1, 2, 3])), "query_offset"),
        (masks.Causal().at(query_offset=jnp.array([1, 2, 3])), "query_offset"),
    ],
)
def test_masks_that_do_not_fit_say_which_argument(mask, named):
    with pytest.raises(ValueError, match=named):
        check_fits(mask, Extent(batch=2, q_heads=2, kv_heads=2, q_len=4, kv_len=5))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_positions_of_narrow_and_unsigned_dtypes_do_not_wrap(dtype):
    positions = jnp.arange(8).astype(dtype)
    mask = masks.SlidingWindow(40, 10).at(query_positions=positions, kv_positions=positions)
    assert np.asarray(mask.materialize(8, 8)).all()
    offset = masks.SlidingWindow(40, 10).at(query_offset=positions[1])
    assert np.asarray(offset.materialize(8, 8)).all()


@pytest.mark.parametrize(
    "where",
    [
        {"query_offset": 2**30},
        {"kv_offset": -(2**30)},
        {"kv_positions": [0, 2**30]},
        {"query_positions": [-(2**31), 0]},
    ],
)
def test_positions_that_do_not_fit_int32_are_errors(where):
    with pytest.raises(ValueError, match="must lie within"):
        masks.Causal().at(**where)


def test_positions_of_an_empty_batch_have_a_place():
    mask = masks.Causal().at(query_positions=np.zeros((0, 3), int))
    check_fits(mask, Extent(batch=0, q_heads=2, kv_heads=2, q_len=3, kv_len=5))


def test_a_placed_mask_is_no_atom():
    with pytest.raises(TypeError, match="use form"):
        _ = masks.Causal().at(query_offset=1).atom
