"""What each mask checks, shows and carries, beyond the definition that test_masks.py holds it to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import Q_HEADS, near, placed_masks, strided

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks import Axis, Side
from kernelry.masks.base import Extent
from kernelry.masks.fit import check_fits

pytestmark = pytest.mark.versions

EXTENT = Extent(batch=2, q_heads=4, kv_heads=2, q_len=4, kv_len=4)


@pytest.mark.parametrize("mask", [masks.Chunked, masks.BlockCausal])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, 2**31, None])
def test_grids_refuse_sizes_that_mean_nothing(mask, size):
    with pytest.raises(ArgumentError, match="size must be an integer in"):
        mask(size)


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_block_selection_refuses_block_sizes_that_mean_nothing(size):
    with pytest.raises(ArgumentError, match="block_size must be an integer"):
        masks.BlockSelection(np.ones((1, 1, 4, 2), bool), size)


def test_block_selection_refuses_scores():
    with pytest.raises(ShapeError, match="keep must be boolean"):
        masks.BlockSelection(np.ones((1, 1, 4, 2)), 2)


@pytest.mark.parametrize("shape", [(3, 4, 4, 2), (2, 3, 4, 2), (2, 4, 5, 2)])
def test_block_selection_that_does_not_fit_is_an_error(shape):
    with pytest.raises(ShapeError, match="keep must be"):
        check_fits(masks.BlockSelection(np.ones(shape, bool), 2), EXTENT)


def test_block_selection_hides_keys_beyond_its_blocks():
    visible = masks.BlockSelection(np.ones((4, 2), bool), 1).materialize(4, 4)[0, 0]
    np.testing.assert_array_equal(visible, np.arange(4)[None] < 2 * np.ones((4, 1)))


def test_block_selection_of_no_blocks_hides_everything():
    assert not masks.BlockSelection(np.ones((4, 0), bool), 2).materialize(4, 4).any()


def test_block_selection_per_key_head_serves_its_group():
    keep = np.zeros((1, 2, 4, 2), bool)
    keep[:, 0, :, 0] = keep[:, 1, :, 1] = True
    mask = masks.BlockSelection(keep, 2)
    visible = mask.evaluate(Side.query(4, np, q_heads=4), Side.kv(4, np))
    np.testing.assert_array_equal(visible[0, :, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize("bad", [1.5, np.zeros((2, 2), int), np.ones(2)])
def test_prefix_refuses_lengths_that_mean_nothing(bad):
    with pytest.raises(ShapeError, match="prefix_lengths must be integers"):
        masks.PrefixLM(bad)


def test_prefix_that_does_not_fit_the_batch_is_an_error():
    with pytest.raises(ShapeError, match="prefix_lengths must be a number or"):
        check_fits(masks.PrefixLM(np.array([1, 2, 3])), EXTENT)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("flags", "spans"),
    [
        ([1, 1, 0, 1], [0, 0, -1, 1]),
        ([0, 0, 0, 0], [-1, -1, -1, -1]),
        ([0, 1, 1, 1], [-1, 0, 0, 0]),
        ([[1, 0, 1, 0], [0, 1, 0, 1]], [[0, -1, 1, -1], [-1, 0, -1, 1]]),
    ],
)
def test_spans_number_the_runs_of_flags(xp, flags, spans):
    mask = masks.BidirectionalSpans.from_flags(xp.asarray(flags, bool))
    assert isinstance(mask.query_spans, jax.Array) == (xp is jnp)
    np.testing.assert_array_equal(mask.query_spans, spans)


@pytest.mark.parametrize("bad", [np.ones(4), np.ones((1, 1, 4), bool)])
def test_spans_refuse_flags_that_are_no_booleans(bad):
    with pytest.raises(ShapeError, match="flags must be booleans"):
        masks.BidirectionalSpans.from_flags(bad)


def test_spans_of_another_length_want_those_of_the_keys():
    with pytest.raises(ShapeError, match=r"BidirectionalSpans\(query_spans, kv_spans\)"):
        check_fits(
            masks.BidirectionalSpans(np.zeros(3, int)), Extent(batch=1, q_heads=1, kv_heads=1, q_len=3, kv_len=5)
        )


def test_spans_are_not_moved():
    mask = masks.BidirectionalSpans(np.array([0, 0, -1, -1]))
    np.testing.assert_array_equal(mask.at(query_offset=2).materialize(4, 4), mask.materialize(4, 4))


def test_image_spans_reach_across_a_packed_causal_sequence():
    packed = masks.Causal() & masks.Segments(np.array([0, 0, 1, 1]))
    mask = packed | masks.BidirectionalSpans.from_flags(np.array([0, 1, 1, 0], bool))
    np.testing.assert_array_equal(
        mask.materialize(4, 4)[0, 0], [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    )


@pytest.mark.parametrize(("fn", "found"), [(lambda q, k: q - k, "int32"), (lambda *_: 1.0, "float")])
def test_predicates_must_return_booleans(fn, found):
    with pytest.raises(ShapeError, match=f"must return booleans .* got .*{found}"):
        masks.Predicate(fn).materialize(4, 4)


def test_predicates_may_return_one_boolean_for_all():
    assert masks.Predicate(lambda *_: True).materialize(3, 3).all()


def test_predicates_must_be_functions():
    with pytest.raises(ArgumentError, match="must be a function"):
        masks.Predicate(np.ones(4))


def test_predicates_without_operands_are_equal_by_function():
    assert masks.Predicate(strided) == masks.Predicate(strided)
    assert hash(masks.Predicate(strided)) == hash(masks.Predicate(strided))
    with pytest.raises(TypeError, match="form is the key"):
        hash(masks.Predicate(near, np.int32(1)))


def test_predicates_are_written_down_by_name():
    form = masks.Predicate(strided).form
    assert masks.MaskForm.from_json(form.to_json()) == form


def test_anonymous_predicates_cannot_be_written_down():
    with pytest.raises(ArgumentError, match="define it with def at module level"):
        masks.Predicate(lambda q, k: k <= q).form.to_json()


def test_anonymous_predicates_are_told_apart():
    one, other = (masks.Predicate(lambda q, k, way=way: (k <= q) == way) for way in (True, False))
    assert one.form != other.form


def test_predicates_attend_with_traced_operands():
    query = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    call = jax.jit(lambda reach: kernelry.attention(query, query, query, mask=masks.Predicate(near, reach)))
    for reach in (1, 3):
        expected = kernelry.attention(query, query, query, mask=masks.SlidingWindow(reach, reach))
        np.testing.assert_allclose(np.asarray(call(jnp.int32(reach))), np.asarray(expected), atol=1e-6)


@pytest.mark.sweep
@given(placed_masks(max_len=8), st.data())
@settings(max_examples=150, deadline=None)
def test_tiles_of_a_mask_are_slices_of_the_whole(drawn, data):
    mask, q_len, kv_len = drawn
    rows = data.draw(st.lists(st.integers(0, q_len - 1), min_size=1, max_size=4))
    columns = data.draw(st.lists(st.integers(0, kv_len - 1), min_size=1, max_size=4))
    whole = mask.evaluate(Side.query(q_len, jnp, q_heads=Q_HEADS), Side.kv(kv_len, jnp))
    whole = np.broadcast_to(np.asarray(whole), (*whole.shape[:2], q_len, kv_len))
    query = Side.of_slots(Axis.QUERY, jnp.asarray(rows, jnp.int32), q_heads=Q_HEADS)
    tile = np.asarray(mask.evaluate(query, Side.of_slots(Axis.KV, jnp.asarray(columns, jnp.int32))))
    expected = whole[:, :, rows][..., columns]
    np.testing.assert_array_equal(*np.broadcast_arrays(tile, expected))


@given(placed_masks(max_len=4))
@settings(max_examples=40, deadline=None)
def test_masks_pass_through_jit_as_arguments(drawn):
    mask, q_len, kv_len = drawn

    def visible(mask):
        return jnp.asarray(mask.materialize(q_len, kv_len, q_heads=Q_HEADS))

    np.testing.assert_array_equal(*np.broadcast_arrays(jax.jit(visible)(mask), visible(mask)))


def test_masks_pass_through_vmap_scan_and_grad():
    ids = jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 1]])
    query = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))

    def loss(query, ids, offset):
        mask = (masks.Chunked(3) & masks.Segments(ids)).at(query_offset=offset, kv_offset=offset)
        return jnp.sin(kernelry.attention(query, query, query, mask=mask)).sum()

    gradient = jax.jit(jax.grad(loss))
    offsets = jnp.asarray([0, 1])
    plain = np.stack([np.asarray(gradient(query, ids[i], offsets[i])) for i in range(2)])
    mapped = jax.vmap(gradient, in_axes=(None, 0, 0))(query, ids, offsets)
    scanned = jax.lax.scan(lambda carry, xs: (carry, gradient(query, *xs)), 0, (ids, offsets))[1]
    np.testing.assert_allclose(np.asarray(mapped), plain, atol=1e-6)
    np.testing.assert_allclose(np.asarray(scanned), plain, atol=1e-6)


def test_masks_with_traced_positions_can_be_compared():
    where = jnp.asarray([1, 2])
    one, other = (masks.Causal().at(query_offset=where) for _ in range(2))
    assert one != other
    assert one == one


def test_large_and_traced_arrays_are_shown_by_shape():
    assert repr(masks.Segments(np.zeros((2, 100), np.int32))) == "Segments(<int32[2, 100]>)"
    shown = []
    jax.jit(lambda ids: shown.append(repr(masks.Segments(ids))))(jnp.zeros(4, jnp.int32))
    assert shown == ["Segments(<int32[4]>)"]


def test_small_arrays_are_shown_so_that_they_can_be_pasted_back():
    where = jnp.asarray([1, 2])
    assert repr(masks.Causal().at(query_offset=where)) == "Causal().at(query_offset=[1, 2])"
    assert repr(masks.Segments([])) == "Segments([])"


def test_gradients_pass_through_functions_that_take_masks():
    query = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))

    def loss(query, mask):
        return jnp.sin(kernelry.attention(query, query, query, mask=mask)).sum()

    gradient = jax.jit(jax.grad(loss))
    for mask in (masks.Chunked(2), masks.Segments(jnp.asarray([0, 0, 1, 1])), masks.PrefixLM(jnp.int32(2))):
        dense = masks.Dense(np.asarray(mask.materialize(4, 4)))
        found, expected = gradient(query, mask), gradient(query, dense)
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-6)


WIDE = np.array([1, 2**32 + 1])


@pytest.mark.parametrize("make", [masks.Segments, masks.BidirectionalSpans])
def test_ids_that_do_not_fit_int32_are_errors(make):
    with pytest.raises(ArgumentError, match="must fit int32"):
        make(WIDE)


@pytest.mark.parametrize("limit", [np.iinfo(np.int64).max, 2**33, np.iinfo(np.int64).min])
def test_limits_beyond_int32_are_the_farthest(limit):
    query = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    for make in (masks.Lengths, masks.PrefixLM):
        found = kernelry.attention(query, query, query, mask=make(np.array([limit])))
        nearer = make(np.array([4 if limit > 0 else 0]))
        np.testing.assert_array_equal(found, kernelry.attention(query, query, query, mask=nearer))


def test_an_unsigned_id_is_never_a_negative_one():
    mask = masks.Segments(jnp.array([2**32 - 1], jnp.uint32), jnp.array([-1]))
    assert not np.asarray(mask.materialize(1, 1)).any()


def test_lengths_can_be_mapped_over():
    query = jax.random.normal(jax.random.key(0), (2, 4, 2, 8))
    lengths = jnp.array([2, 3])

    def row(query, mask):
        return kernelry.attention(query[None], query[None], query[None], mask=mask)[0]

    batched = kernelry.attention(query, query, query, mask=masks.Lengths(lengths))
    np.testing.assert_allclose(np.asarray(jax.vmap(row)(query, masks.Lengths(lengths))), np.asarray(batched), atol=1e-6)


@pytest.mark.parametrize("where", [{"query_positions": np.zeros((0, 4), int)}, {"query_offset": np.zeros(0, int)}])
def test_positions_of_an_empty_batch_serve_it(where):
    mask = masks.Causal().at(**where)
    query = jnp.ones((0, 4, 2, 8))
    assert kernelry.attention(query, query, query, mask=mask).shape == query.shape
    assert mask.block_map(4, 4, 2, 2).shape == (2, 2)


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (5, 1, 4, 4), (1, 3, 4, 4), (1, 1, 1, 1, 1)])
def test_predicates_must_fit_the_call(shape):
    query = jnp.ones((2, 4, 4, 8))
    with pytest.raises(ShapeError, match="must return booleans that broadcast to B N T S"):
        kernelry.attention(query, query, query, mask=masks.Predicate(lambda *_: np.ones(shape, bool)))


def test_predicates_must_have_a_hash():
    class Unhashable:
        __hash__ = None

        def __call__(self, query, kv):
            return kv <= query

    with pytest.raises(ArgumentError, match="has no hash"):
        masks.Predicate(Unhashable())


def test_masks_are_neither_true_nor_false():
    with pytest.raises(ArgumentError, match=r"with &, \| and ~"):
        masks.Causal() and masks.Full()


@pytest.mark.parametrize("xp", [np, jnp])
def test_an_array_before_a_mask_says_to_use_dense(xp):
    with pytest.raises(ArgumentError, match=r"masks\.Dense"):
        xp.ones((4, 4), bool) & masks.Causal()
    with pytest.raises(ArgumentError, match=r"masks\.Dense"):
        xp.ones((4, 4), bool) | masks.Causal()


def test_offsets_are_no_truth_values():
    with pytest.raises(ShapeError, match="query_offset must be integers"):
        masks.Causal().at(query_offset=True)


def test_materialize_asks_for_the_heads_where_parts_differ_in_theirs():
    keep, visible = np.ones((1, 2, 4, 2), bool), np.ones((1, 4, 4, 4), bool)
    mask = masks.BlockSelection(keep, 2) & masks.Dense(visible)
    with pytest.raises(ShapeError, match="pass q_heads=, N"):
        mask.materialize(4, 4)
    assert mask.materialize(4, 4, q_heads=4).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("make", [masks.Lengths, masks.PrefixLM])
def test_unsigned_limits_beyond_int32_hide_nothing(make):
    assert np.asarray(make(jnp.uint32(3_000_000_000)).materialize(3, 3)).all()


def test_predicates_are_equal_where_function_and_operands_are_the_same():
    reach, shift = np.int32(3), np.int32(1)
    one = masks.Predicate(near, reach)
    assert one == masks.Predicate(near, reach)
    for other in (
        masks.Full(),
        masks.Predicate(near),
        masks.Predicate(near, reach, shift),
        masks.Predicate(near, shift),
    ):
        assert one != other
