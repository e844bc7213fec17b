"""blockwise over many small blocks: what it visits, its numbers, its memory and the size of its program.

With the shipped block sizes a test's few tokens would stand in one block, and no block would be skipped or joined.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, PartitionSpec
from mask_strategies import BATCH, KV_HEADS, Q_HEADS, placed_masks

import kernelry
from kernelry import masks
from kernelry.masks import BlockKind
from kernelry.plugin import Request, Tiling
from kernelry.testing.conformance import run
from kernelry.testing.reference import reference_attention, reference_gradients
from kernelry_dot_product.blockwise.grid import Grid
from kernelry_dot_product.blockwise.visits import kinds_of, visits_of_keys, visits_of_queries
from kernelry_dot_product.plugin import BLOCKWISE

SMALL = {"block_q": 8, "block_kv": 5}
PACKED = np.repeat(np.arange(4, dtype=np.int32), 16)[None]


def _blocks_of(mask, q_len, kv_len, grid):
    """What each block really holds, over batch and heads."""
    visible = np.asarray(mask.materialize(q_len, kv_len, q_heads=Q_HEADS))
    for row in range(grid.rows):
        for column in range(grid.columns):
            rows = np.s_[row * grid.block_q : (row + 1) * grid.block_q]
            block = visible[:, :, rows, column * grid.block_kv : (column + 1) * grid.block_kv]
            yield row, column, block.any(), block.all()


@settings(deadline=None, max_examples=60)
@given(placed_masks(max_len=11))
def test_no_block_is_called_emptier_or_fuller_than_it_is(drawn):
    mask, q_len, kv_len = drawn
    grid = Grid(q_len, kv_len, 3, 4)
    kinds = np.asarray(kinds_of(mask.canonical(), grid))
    for row, column, some, full in _blocks_of(mask, q_len, kv_len, grid):
        assert not (kinds[row, column] == BlockKind.EMPTY and some), (row, column)
        assert not (kinds[row, column] == BlockKind.FULL and not full), (row, column)


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
    kinds = kinds_of(mask.canonical(), Grid(64, 64, 16, 16))
    assert int(visits_of_queries(kinds).some.sum()) == visited
    assert int(visits_of_keys(kinds).some.sum()) == visited


def test_blocks_within_one_segment_need_no_mask():
    kinds = kinds_of(masks.Segments(jnp.asarray(PACKED)).canonical(), Grid(64, 64, 16, 16))
    assert int(visits_of_queries(kinds).full.sum()) == 4


def test_ids_that_int32_cannot_hold_are_left_to_the_mask():
    ids = jnp.asarray([[2**31 + 5] * 8], jnp.uint32)
    kinds = kinds_of(masks.Segments(ids).canonical(), Grid(8, 8, 4, 4))
    assert (np.asarray(kinds) == BlockKind.PARTIAL).all()


@pytest.mark.parametrize("tiling", [(8, 5), (5, 16)], ids=str)
def test_conformance_holds_over_small_blocks(tiling):
    small = Tiling.of(block_q=tiling[0], block_kv=tiling[1])
    report = run(dataclasses.replace(BLOCKWISE, tilings=lambda _: (small,)), quick=True)
    assert report.ok, [(case.name, case.detail) for case in report.failures]


@settings(deadline=None, max_examples=15)
@given(placed_masks(max_len=11))
def test_outputs_and_gradients_agree_with_the_oracle_under_any_mask(drawn):
    mask, q_len, kv_len = drawn
    rng = np.random.default_rng(q_len * 16 + kv_len)
    shapes = ((q_len, Q_HEADS), (kv_len, KV_HEADS), (kv_len, KV_HEADS), (q_len, Q_HEADS))
    query, key, value, d_out = (rng.standard_normal((BATCH, *shape, 4), np.float32) for shape in shapes)

    def attend(*operands):
        return kernelry.attention(*operands, mask=mask, kernel="blockwise")

    with kernelry.use(tiling={"block_q": 3, "block_kv": 4}):
        out, pull = jax.vjp(attend, query, key, value)
        gradients = pull(d_out)
    wanted = reference_attention(query, key, value, mask=mask)
    np.testing.assert_allclose(out, wanted.out, rtol=2e-6, atol=2e-6)
    right = reference_gradients(query, key, value, mask=mask, d_out=d_out)
    for found, of in zip(gradients, (right.query, right.key, right.value), strict=True):
        np.testing.assert_allclose(found, of, rtol=2e-5, atol=2e-5)


def _gradient(length):
    arrays = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3

    def loss(query, key, value):
        return kernelry.attention(query, key, value, mask=masks.Causal(), kernel="blockwise").sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), arrays


def test_the_program_does_not_grow_with_the_length():
    sizes = []
    for length in (1024, 8192):
        function, arrays = _gradient(length)
        sizes.append(len(function.lower(*arrays).as_text().splitlines()))
    assert sizes[0] == sizes[1]


def test_temporary_memory_grows_with_the_length_not_its_square():
    short, long = (
        function.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
        for function, arrays in map(_gradient, (1024, 8192))
    )
    assert long < 8 * 1.5 * short


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


def test_a_request_says_the_blocks_that_its_window_wants():
    request = Request(q_len=4096, mask=masks.SlidingWindow(63))
    assert BLOCKWISE.tilings(request)[0]["block_q"] < BLOCKWISE.tilings(Request(q_len=4096))[0]["block_q"]
