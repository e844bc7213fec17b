"""blockwise over many small blocks: what it visits, its numbers, its memory and the size of its program.

With the shipped block sizes a test's few tokens would stand in one block, and no block would be skipped or joined.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from mask_strategies import BATCH, KV_HEADS, Q_HEADS, masks_of, placed_masks
from pairs import covering

import kernelry
from kernelry import masks
from kernelry.cache import PagedArray, QuantizedArray
from kernelry.masks import BlockKind
from kernelry.plugin import Inputs, Request, Tiling
from kernelry.testing import reference_mask
from kernelry.testing.conformance import run
from kernelry.testing.reference import reference_attention, reference_gradients
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.spans import spans_of
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_keys, visits_of_queries
from kernelry_dot_product.plugin import BLOCKWISE

SMALL = {"block_q": 8, "block_kv": 5}
OPERANDS = ("query", "key", "value")
SQUARE = Grid(q_len=64, kv_len=64, block_q=16, block_kv=16)
PACKED = np.repeat(np.arange(4, dtype=np.int32), 16)[None]


def _blocks_of(mask, q_len, kv_len, grid):
    """What each block really holds, over batch and heads."""
    visible = np.asarray(mask.materialize(q_len, kv_len, q_heads=Q_HEADS))
    for row in range(grid.rows):
        for column in range(grid.columns):
            rows = np.s_[row * grid.block_q : (row + 1) * grid.block_q]
            block = visible[:, :, rows, column * grid.block_kv : (column + 1) * grid.block_kv]
            yield row, column, block.any(), block.all()


def _assert_kinds_hold(mask, q_len, kv_len, blocks):
    grid = Grid(q_len=q_len, kv_len=kv_len, block_q=blocks[0], block_kv=blocks[1], batch=BATCH, step_batch=BATCH)
    [kinds] = np.asarray(kinds_of(mask.canonical(), grid))
    for row, column, some, full in _blocks_of(mask, q_len, kv_len, grid):
        assert not (kinds[row, column] == BlockKind.EMPTY and some), (row, column)
        assert not (kinds[row, column] == BlockKind.FULL and not full), (row, column)


@pytest.mark.parametrize(
    "blocks", [(3, 4), pytest.param((3, 7), marks=pytest.mark.sweep), pytest.param((7, 4), marks=pytest.mark.sweep)]
)
@settings(deadline=None, max_examples=40)
@given(mask=masks_of(7, 7))
def test_no_block_is_called_emptier_or_fuller_than_it_is(blocks, mask):
    _assert_kinds_hold(mask, 7, 7, blocks)


@pytest.mark.parametrize(
    ("mask", "visited"),
    [
        (masks.Causal(), 4 * 5 // 2),
        (masks.SlidingWindow(7), 4 + 3),
        (masks.Chunked(16), 4),
        (masks.Segments(jnp.asarray(PACKED)), 4),
        (masks.Causal() & masks.Segments(jnp.asarray(PACKED)), 4),
        (masks.Lengths(jnp.asarray([20])), 4 * 2),
        (masks.Causal().at(query_offset=jnp.int32(0), kv_offset=jnp.int32(0)), 4 * 5 // 2),
        (masks.Causal().at(query_positions=np.arange(64)[::-1], kv_positions=np.arange(64)), 4 * 5 // 2),
        (masks.BlockSelection(np.eye(4, dtype=bool).repeat(16, axis=0), 16), 4),
        (masks.Dense(np.kron(np.eye(4, dtype=bool), np.ones((16, 16), bool))), 4),
    ],
    ids=lambda value: str(value)[:40],
)
def test_blocks_without_a_visible_pair_are_not_visited(mask, visited):
    kinds = kinds_of(mask.canonical(), SQUARE)
    assert int(visits_of_queries(kinds).some.sum()) == visited
    assert int(visits_of_keys(kinds).some.sum()) == visited


def test_blocks_within_one_segment_need_no_mask():
    kinds = kinds_of(masks.Segments(jnp.asarray(PACKED)).canonical(), SQUARE)
    assert int(visits_of_queries(kinds).full.sum()) == 4


def test_ids_that_int32_cannot_hold_are_left_to_the_mask():
    ids = jnp.asarray([[2**31 + 5] * 8], jnp.uint32)
    kinds = kinds_of(masks.Segments(ids).canonical(), Grid(q_len=8, kv_len=8, block_q=4, block_kv=4))
    assert (np.asarray(kinds) == BlockKind.PARTIAL).all()


@pytest.mark.sweep
def test_conformance_holds_over_small_blocks():
    small = Tiling.of(**SMALL)
    report = run(dataclasses.replace(BLOCKWISE, tilings=lambda _: (small,)), quick=True)
    assert report.ok, [(case.name, case.detail) for case in report.failures]


@pytest.mark.sweep
@settings(deadline=None, max_examples=15)
@given(placed_masks(max_len=11), st.sampled_from([(3, 4), (3, 11), (11, 4)]))
def test_outputs_and_gradients_agree_with_the_oracle_under_any_mask(drawn, blocks):
    mask, q_len, kv_len = drawn
    rng = np.random.default_rng(q_len * 16 + kv_len)
    shapes = ((q_len, Q_HEADS), (kv_len, KV_HEADS), (kv_len, KV_HEADS), (q_len, Q_HEADS))
    query, key, value, d_out = (rng.standard_normal((BATCH, *shape, 4), np.float32) for shape in shapes)

    def attend(*operands):
        return kernelry.attention(*operands, mask=mask, kernel="blockwise")

    with kernelry.use(tiling={"block_q": blocks[0], "block_kv": blocks[1]}):
        out, pull = jax.vjp(attend, query, key, value)
        gradients = pull(d_out)
    wanted = reference_attention(query, key, value, mask=mask)
    np.testing.assert_allclose(out, wanted.out, rtol=2e-6, atol=2e-6)
    right = reference_gradients(query, key, value, mask=mask, d_out=d_out)
    for found, of in zip(gradients, (right.query, right.key, right.value), strict=True):
        np.testing.assert_allclose(found, of, rtol=2e-5, atol=2e-5)


TRIMMED = {
    "causal": (masks.Causal(), [(0, 4), (0, 8), (0, 12), (0, 13)]),
    "window": (masks.SlidingWindow(2), [(0, 4), (0, 8), (4, 12), (8, 13)]),
    "nothing": (masks.Causal().at(query_offset=-6, kv_offset=0), [(0, 4), (0, 4), (0, 8), (0, 8)]),
    "everything": (masks.Full(), [(0, 13)] * 4),
}


@pytest.mark.parametrize("name", TRIMMED)
@pytest.mark.parametrize("options", [{"bias": True}, {"soft_cap": 2.0, "sinks": True}], ids=str)
def test_a_block_of_queries_meets_just_the_keys_that_it_sees(name, options, monkeypatch):
    """Tiles as wide as what is seen, in steps of 4 slots; the last block of queries goes beyond the end."""
    monkeypatch.setattr("kernelry_dot_product.blockwise.spans._STEP", 4)
    mask, spans = TRIMMED[name]
    length = 13
    request = Request(batch=2, q_len=length, kv_len=length, q_heads=4, kv_heads=2, mask=mask)
    found = spans_of(mask.canonical(), request, Grid(q_len=length, kv_len=length, block_q=4, block_kv=length))
    assert [(span.start, span.stop) for span in found] == spans
    query, key, value, d_out, bias = _drawn(*[(2, length, heads, 8) for heads in (4, 2, 2, 4)], (1, 4, length, length))
    operands = {"query": query, "key": key, "value": value}
    operands |= {"bias": bias} if "bias" in options else {}
    operands |= {"sinks": jnp.arange(4.0)} if "sinks" in options else {}
    known = {"mask": mask} | {name: value for name, value in options.items() if name == "soft_cap"}

    def attend(operands):
        return kernelry.attention(**operands, **known, kernel="blockwise")

    with kernelry.use(tiling={"block_q": 4, "block_kv": 16}):
        out, pull = jax.jit(lambda operands: jax.vjp(attend, operands))(operands)
        [gradients] = pull(d_out)
    np.testing.assert_allclose(out, reference_attention(**operands, **known).out, rtol=2e-6, atol=2e-6)
    right = reference_gradients(**operands, **known, d_out=d_out)
    for name, mine in gradients.items():
        np.testing.assert_allclose(mine, getattr(right, name), rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("mask", [masks.Segments(jnp.zeros((1, 64), jnp.int32)), masks.Lengths(jnp.asarray([5]))])
def test_a_mask_that_holds_arrays_is_looped_over(mask):
    request = Request(q_len=64, kv_len=64, mask=mask)
    assert spans_of(mask.canonical(), request, Grid(q_len=64, kv_len=64, block_q=16, block_kv=64)) == ()


def _gradient(length):
    arrays = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3

    def loss(query, key, value):
        return kernelry.attention(query, key, value, mask=masks.Causal(), kernel="blockwise").sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), arrays


@pytest.mark.versions
def test_the_program_does_not_grow_with_the_length():
    sizes = []
    for length in (4096, 16384):
        function, arrays = _gradient(length)
        sizes.append(len(function.lower(*arrays).as_text().splitlines()))
    assert sizes[0] == sizes[1]


@pytest.mark.versions
def test_temporary_memory_grows_with_the_length_not_its_square():
    short, long = (
        function.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
        for function, arrays in map(_gradient, (1024, 8192))
    )
    assert long < 8 * 1.5 * short


@pytest.mark.sweep
def test_runs_inside_shard_map():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    query = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 2, 8)), jnp.float32)

    def attend(query):
        return kernelry.attention(query, query, query, mask=masks.Causal(), kernel="blockwise")

    def loss(query):
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
        return mapped(query).sum()

    with kernelry.use(tiling=SMALL):
        found = jax.jit(jax.grad(loss))(query)
        wanted = jax.grad(lambda query: attend(query).sum())(query)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("dot_product", {}),
        ("blockwise", {"return_partial": True}),
        pytest.param("dot_product", {"return_partial": True}, marks=pytest.mark.sweep),
        pytest.param("blockwise", {}, marks=pytest.mark.sweep),
    ],
)
def test_what_is_alike_on_every_device_has_its_gradients_summed(kernel, options):
    """Under shard_map: keys, values, bias and sinks that are replicated beside a query that is not."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("query", "key", "value"), (2, 12, 2, 8)) | {"bias": (1, 2, 12, 12), "sinks": (2,)}
    operands = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def attend(query, key, value, bias, sinks):
        extra = {} if options else {"sinks": sinks}
        found = kernelry.attention(query, key, value, mask=masks.Causal(), bias=bias, kernel=kernel, **extra, **options)
        return kernelry.finalize(found, sinks) if options else found

    def loss(*operands):
        specs = (PartitionSpec("x"), *(PartitionSpec(),) * 4)
        return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"))(*operands).sum()

    with kernelry.use(tiling=SMALL if kernel == "blockwise" else None):
        found = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*operands.values())
    wanted = reference_gradients(**operands, mask=masks.Causal(), d_out=np.ones((2, 12, 2, 8)))
    for name, mine in zip(operands, found, strict=True):
        np.testing.assert_allclose(mine, getattr(wanted, name), rtol=2e-5, atol=2e-5, err_msg=name)


BALANCED = np.r_[0:8, 56:64]
ONE_SIDED = {
    "keys_before_and_after": (masks.Causal().at(query_offset=16, kv_positions=BALANCED), 8, 16),
    "queries_before_and_after": (masks.Causal().at(query_positions=BALANCED, kv_offset=20), 16, 8),
    "blocks_behind": (masks.BlockCausal(8).at(query_offset=0, kv_offset=8), 24, 8),
    "blocks_before": (masks.BlockCausal(8).at(query_offset=8, kv_offset=0), 8, 24),
    "chunks": (masks.Chunked(8).at(query_offset=7, kv_offset=0), 1, 24),
}


@pytest.mark.parametrize("name", ONE_SIDED)
def test_a_single_block_on_one_side_may_still_be_empty(name):
    """No block of these masks is PARTIAL, some are EMPTY, and one side is a single block: there is no loop over it."""
    mask, q_len, kv_len = ONE_SIDED[name]
    _check_against_oracle(mask, q_len, kv_len)


@pytest.mark.parametrize("mask", [masks.Causal(), ~masks.Causal()])
def test_keys_that_stand_at_the_ends_of_int32(mask):
    ends = np.iinfo(np.int32)
    for nowhere in (ends.min, ends.max):
        kv_positions = jnp.r_[jnp.full(8, nowhere, jnp.int32), jnp.arange(8, dtype=jnp.int32)]
        placed = mask.at(query_positions=jnp.arange(1, 17), kv_positions=kv_positions)
        np.testing.assert_array_equal(placed.materialize(16, 16)[0, 0], reference_mask(placed, 1, 1, 16, 16)[0, 0])
        _assert_kinds_hold(placed, 16, 16, (8, 8))


def _check_against_oracle(mask, q_len, kv_len):
    rng = np.random.default_rng(1)
    shapes = (q_len, 2, 4), (kv_len, 1, 4), (kv_len, 1, 4), (q_len, 2, 4)
    query, key, value, d_out = (rng.standard_normal((1, *shape)).astype(np.float32) for shape in shapes)

    def run(*arrays):
        out, pull = jax.vjp(lambda *arrays: kernelry.attention(*arrays, mask=mask, kernel="blockwise"), *arrays)
        return out, pull(jnp.asarray(d_out))

    with kernelry.use(tiling={"block_q": 8, "block_kv": 8}):
        out, gradients = jax.jit(run)(query, key, value)
    np.testing.assert_allclose(out, reference_attention(query, key, value, mask=mask).out, atol=2e-6)
    wanted = reference_gradients(query, key, value, mask=mask, d_out=d_out)
    for name, mine in zip(("query", "key", "value"), gradients, strict=True):
        np.testing.assert_allclose(mine, getattr(wanted, name), atol=2e-5, err_msg=name)


def test_a_request_says_the_blocks_that_its_window_wants():
    request = Request(q_len=4096, mask=masks.SlidingWindow(63))
    assert BLOCKWISE.tilings(request)[0]["block_q"] < BLOCKWISE.tilings(Request(q_len=4096))[0]["block_q"]


@pytest.mark.parametrize(
    ("mask", "length", "blocks"),
    [
        (masks.Causal(), 1024, (256, 1024)),
        (masks.Causal(), 100, (64, 100)),
        (masks.Full(), 512, (512, 512)),
        (masks.SlidingWindow(255), 512, (128, 512)),
        (masks.SlidingWindow(63), 512, (64, 64)),
        (masks.Causal(), 2048, (1024, 512)),
        (masks.Causal() & masks.Segments(jnp.zeros((1, 512), jnp.int32)), 512, (64, 64)),
        (masks.Causal() & masks.Segments(jnp.zeros((1, 2048), jnp.int32)), 2048, (512, 512)),
    ],
    ids=str,
)
def test_a_short_call_has_all_keys_in_a_block_unless_most_of_them_are_hidden(mask, length, blocks):
    request = Request(q_len=length, kv_len=length, mask=mask)
    assert BLOCKWISE.tilings(request)[0] == Tiling.of(block_q=blocks[0], block_kv=blocks[1])


def test_each_row_of_a_decoding_batch_visits_the_blocks_of_its_own_length():
    grid = Grid.of(Request(q_len=1, kv_len=64, batch=3, q_heads=2, mode="decode"), 3, 1, 16)
    visits = visits_of_queries(kinds_of(masks.Lengths(jnp.asarray([5, 64, 0])).canonical(), grid))
    assert np.asarray(visits.some).tolist() == [[1], [4], [0]]


@pytest.mark.parametrize("batch", [1, 6, 7])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (12, 1)])
def test_a_step_takes_as_much_of_batch_and_heads_as_fits_a_tile(batch, heads):
    q_heads, kv_heads = heads
    grid = Grid.of(Request(q_len=64, batch=batch, q_heads=q_heads, kv_heads=kv_heads), batch, 16, 16)
    assert (grid.step_batch, grid.step_heads) == (batch, kv_heads)
    long = Request(q_len=4096, batch=batch, q_heads=q_heads, kv_heads=kv_heads)
    large = Grid.of(long, batch, 512 // grid.groups, 512)
    assert (large.step_batch, large.step_heads) == (1, 1)


def test_splitting_and_putting_are_inverse_in_steps_over_batch_and_heads():
    grid = Grid(q_len=7, kv_len=10, block_q=3, block_kv=4, batch=4, kv_heads=6, groups=2, step_batch=2, step_heads=3)
    query = jnp.asarray(np.random.default_rng(0).standard_normal((4, 7, 12, 5)), jnp.float32)
    key = jnp.asarray(np.random.default_rng(1).standard_normal((4, 10, 6, 5)), jnp.float32)
    queries, keys = jnp.zeros_like(query), jnp.zeros_like(key)
    for step in range(grid.steps):
        queries = grid.put_queries(queries, grid.split_queries(query, step), step)
        keys = grid.put_keys(keys, grid.split_keys(key, step), step)
    np.testing.assert_array_equal(queries, query)
    np.testing.assert_array_equal(keys, key)


def _stored(how, array, page_size):
    """The array as it is held, in shuffled pages where `page_size` says so, and what it stands for."""
    held = array if how is None else QuantizedArray.quantize(array, how)
    means = array if how is None else held.dequantize()
    if page_size is None:
        return held, means, None
    rows, slots = array.shape[:2]
    count = rows * slots // page_size
    table = np.random.default_rng(0).permutation(count).reshape(rows, -1).astype(np.int32)
    places = np.argsort(table.reshape(-1))
    pages = jax.tree.map(lambda leaf: leaf.reshape(count, page_size, *leaf.shape[2:])[places], held)
    return pages, means, jnp.asarray(table)


STORED = {
    "q_len": [1, 20, 3],
    "how": [None, "int8", "int4:heads_and_head_dim", "float8_e4m3fn"],
    "page_size": [None, 4],
}
FEW_STORED = covering(**STORED | {"q_len": [1, 20]})


@pytest.mark.versions
@pytest.mark.parametrize(
    ("q_len", "how", "page_size"),
    [
        pytest.param(*case, marks=() if dict(zip(STORED, case, strict=True)) in FEW_STORED else pytest.mark.sweep)
        for case in itertools.product(*STORED.values())
    ],
)
def test_decoding_reads_ragged_rows_where_they_stand(how, page_size, q_len):
    rng = np.random.default_rng(3)
    query = jnp.asarray(rng.standard_normal((3, q_len, 4, 8)), jnp.float32)
    key, value = (jnp.asarray(rng.standard_normal((3, 28, 2, 8)), jnp.float32) for _ in range(2))
    lengths = jnp.asarray([28, 21, 0])
    mask = masks.SlidingWindow(12).at(query_offset=lengths - q_len, kv_offset=0) & masks.Lengths(lengths)
    hidden = (np.arange(28) >= np.asarray(lengths)[:, None])[..., None, None]
    clean_key, clean_value = (jnp.where(hidden, 0, array) for array in (key, value))
    (key, means_key, table), (value, means_value, _) = (
        _stored(how, jnp.where(hidden, jnp.nan, array), page_size) for array in (clean_key, clean_value)
    )
    if page_size is not None:
        key, value = PagedArray(key, table), PagedArray(value, table)
    with kernelry.use(tiling={"block_kv": 8, "block_q": 8}):
        out = jax.jit(
            lambda q, k, v: kernelry.attention(q, *_one_table(k, v), mask=mask, mode="decode", kernel="blockwise")
        )(query, key, value)
    means = (jnp.where(hidden, 0, array) for array in (means_key, means_value))
    wanted = reference_attention(query, *means, mask=mask)
    np.testing.assert_allclose(out, wanted.out, rtol=3e-6, atol=3e-6)


def _one_table(key, value):
    """A table that went through jit twice is two arrays."""
    return (key, PagedArray(value.pages, key.table)) if isinstance(key, PagedArray) else (key, value)


@pytest.mark.versions
def test_a_decode_step_needs_no_more_memory_for_a_larger_cache():
    def temporary(capacity):
        shapes = [jax.ShapeDtypeStruct((2, size, 4, 64), jnp.float32) for size in (1, capacity, capacity)]

        def step(query, key, value, lengths):
            return kernelry.attention(query, key, value, mask=masks.Lengths(lengths), mode="decode", kernel="blockwise")

        lowered = jax.jit(step).lower(*shapes, jax.ShapeDtypeStruct((2,), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(65536) < 1.2 * temporary(8192)


@pytest.mark.sweep
def test_the_gradient_of_the_query_through_quantised_keys():
    rng = np.random.default_rng(4)
    query, key, value, d_out = (jnp.asarray(rng.standard_normal((1, 12, 2, 8)), jnp.float32) for _ in range(4))
    held = [QuantizedArray.quantize(array) for array in (key, value)]

    def attend(query):
        return kernelry.attention(query, *held, mask=masks.Causal(), kernel="blockwise")

    _, pull = jax.vjp(attend, query)
    means = [np.asarray(array.dequantize()) for array in held]
    right = reference_gradients(np.asarray(query), *means, mask=masks.Causal(), d_out=np.asarray(d_out))
    np.testing.assert_allclose(pull(d_out)[0], right.query, rtol=2e-5, atol=2e-5)


def _drawn(*shapes):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@pytest.mark.versions
def test_dropout_keeps_the_same_probabilities_forward_and_backward():
    length, rate, key = 12, 0.3, jax.random.key(7, impl="rbg")
    query, key_, value, d_out = _drawn(*[(2, length, heads, 8) for heads in (4, 2, 2, 4)])
    one_hot = jnp.broadcast_to(jnp.eye(length)[None, :, None], (2, length, 2, length))
    mask = masks.Causal()

    @jax.jit
    def run(value, d_out):
        def attend(*operands):
            return kernelry.attention(
                *operands, mask=mask, kernel="blockwise", dropout_rate=rate, dropout_rng=key, gradients=OPERANDS
            )

        out, pull = jax.vjp(attend, query, key_, value)
        return out, pull(d_out)

    with kernelry.use(tiling=SMALL):
        keep = np.swapaxes(np.asarray(run(one_hot, jnp.zeros((2, length, 4, length)))[0]), 1, 2) > 0
        out, gradients = run(value, d_out)
    assert 0.6 < keep[:, :, np.tri(length, dtype=bool)].mean() < 0.8
    dropped = {"mask": mask, "dropout_rate": rate, "dropout_keep": keep}
    wanted = reference_attention(query, key_, value, **dropped)
    right = reference_gradients(query, key_, value, d_out=d_out, **dropped)
    np.testing.assert_allclose(out, wanted.out, rtol=2e-6, atol=2e-6)
    for found, name in zip(gradients, OPERANDS, strict=True):
        np.testing.assert_allclose(found, getattr(right, name), rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.versions
def test_a_constant_bias_is_read_head_by_head(monkeypatch):
    monkeypatch.setattr("kernelry_dot_product.blockwise.grid._TILE_BYTES", 1)  # each step has one key head of one row
    query, key, value, d_out, bias = _drawn(*[(2, 9, heads, 8) for heads in (6, 3, 3, 6)], (2, 6, 9, 9))

    def attend(query):
        return kernelry.attention(
            query, key, value, bias=bias, mask=masks.Causal(), kernel="blockwise", gradients={"query"}
        )

    with kernelry.use(tiling=SMALL):
        out, pull = jax.jit(lambda query: jax.vjp(attend, query))(query)
        [gradient] = pull(d_out)
    known = {"bias": bias, "mask": masks.Causal()}
    np.testing.assert_allclose(out, reference_attention(query, key, value, **known).out, rtol=2e-6, atol=2e-6)
    right = reference_gradients(query, key, value, d_out=d_out, **known)
    np.testing.assert_allclose(gradient, right.query, rtol=2e-5, atol=2e-5)


@pytest.mark.versions
def test_what_is_kept_for_the_backward_pass_has_the_dtype_of_the_query():
    arrays = [array.astype(jnp.bfloat16) for array in _drawn(*[(2, 9, 4, 8)] * 3)]
    request = Request(batch=2, q_len=9, q_heads=4, head_dim=8, dtype="bfloat16", mask=masks.Causal())
    inputs = Inputs(*arrays, mask=masks.Causal().canonical())
    body, tiling = BLOCKWISE.body(), Tiling.of(**SMALL)
    partial = jax.eval_shape(lambda inputs: body.forward(inputs, request, tiling, statistics=False), inputs)
    assert partial.out.dtype == jnp.bfloat16


def test_a_block_of_pages_holds_one_at_least():
    request = Request(mode="decode", q_len=1, kv_len=64, page_size=16)
    assert [Grid.of(request, 1, 1, block).block_kv for block in (8, 16, 40, 64)] == [16, 16, 32, 64]


@pytest.mark.versions
def test_a_call_of_one_tile_has_no_loop():
    query, key, value = _drawn(*[(2, 9, 4, 8)] * 3)

    def program(**tiling):
        with kernelry.use(tiling=tiling):
            call = functools.partial(kernelry.attention, mask=masks.Causal(), kernel="blockwise")
            return str(jax.make_jaxpr(call)(query, key, value))

    assert not {"scan", "while"} & set(re.findall(r"\w+", program(block_q=9, block_kv=9)))
    assert {"scan", "while"} & set(re.findall(r"\w+", program(**SMALL)))


@pytest.mark.parametrize(
    "where", [{"query_offset": 3}, {"kv_positions": np.arange(9)[::-1]}, {"query_offset": jnp.int32(3)}]
)
def test_positions_need_no_adapter(where):
    request = Request(q_len=9, mask=masks.Causal().at(**where))
    assert kernelry.resolve(request, kernel="blockwise").plan.steps == ()


def _within(query, kv, reach):
    return abs(query - kv) <= reach


def _listed(query, kv, table):
    return table[0, 0, 0, kv] > query % 3


LENGTH = 24
OPERANDS_OF_PREDICATES = {
    "a number": (_within, (1, 1, 1, 1)),
    "rows of queries": (_within, (2, 1, LENGTH, 1)),
    "all pairs": (_within, (1, 2, LENGTH, LENGTH)),
    "a table by position": (_listed, (1, 1, 1, LENGTH)),
}


@pytest.mark.parametrize("block", [1, 5, 8])
@pytest.mark.parametrize("name", OPERANDS_OF_PREDICATES)
def test_a_tile_gets_its_part_of_a_predicates_operands(name, block):
    function, shape = OPERANDS_OF_PREDICATES[name]
    mask = masks.Predicate(function, np.random.default_rng(0).integers(0, 9, shape))
    query = jax.random.normal(jax.random.key(0), (2, LENGTH, 2, 8))

    def attend(query, kernel):
        return kernelry.attention(query, query, query, mask=mask, kernel=kernel)

    def results(kernel):
        return attend(query, kernel), jax.grad(lambda query: jnp.sin(attend(query, kernel)).sum())(query)

    with kernelry.use(tiling={"block_q": block, "block_kv": 8}):
        found = results("blockwise")
    for mine, right in zip(found, results("dot_product"), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5)
