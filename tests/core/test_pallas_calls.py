"""The Pallas calls of a program: names, grids and bytes, against the blocks that the index maps give step by step."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import kernelry
from kernelry import ModelShape, masks
from kernelry.aot.kernel_speeds import grid_of
from kernelry.aot.layers import arguments_of, program_of
from kernelry.aot.pallas_calls import PallasCall, pallas_calls
from kernelry.config.layer import AttentionConfig
from kernelry.phases.calls import calls
from kernelry.request.target import Target

pytestmark = pytest.mark.versions

TARGET = Target.parse("tpu:v5e")


def _copy(*references):
    references[-1][...] = references[-2][...]


INDICES = {
    "first": lambda *step: (step[0], 0),
    "second": lambda *step: (step[1], 0),
    "third": lambda *step: (0, step[2]),
    "first and third": lambda *step: (step[0], step[2]),
    "none": lambda *_: (0, 0),
}


def _kernel(array, grid, index):
    spec = pl.BlockSpec((8, 128), index)
    return pl.pallas_call(_copy, grid=grid, in_specs=[spec], out_specs=spec, out_shape=array, name="copies")(array)


def _copies(grid, index):
    """How often a block's index changes when the grid's steps run one after the other."""
    places = [index(*step) for step in itertools.product(*map(range, grid))]
    return 1 + sum(one != other for one, other in itertools.pairwise(places))


@given(st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from(sorted(INDICES)))
def test_blocks_are_copied_as_often_as_their_index_changes(grid, name):
    array = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    [found] = pallas_calls(jax.make_jaxpr(functools.partial(_kernel, grid=grid, index=INDICES[name]))(array))
    assert (found.name, found.grid, found.steps) == ("copies", grid, math.prod(grid))
    assert found.bytes(1.0) == 2 * 8 * 128 * 4 * _copies(grid, INDICES[name])
    assert found.arrays == 2 * 64 * 1024 * 4


def test_an_index_that_may_not_change_counts_as_changing():
    array = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    [found] = pallas_calls(jax.make_jaxpr(functools.partial(_kernel, grid=(4, 1, 1), index=_every_fourth))(array))
    assert found.bytes(1.0) == 2 * 8 * 128 * 4 * 4
    assert _copies((4, 1, 1), _every_fourth) == 1


def _every_fourth(first, *_):
    return first // 4, 0


def _by_table(table, array, blocks):
    spec = pl.BlockSpec((8, 128), lambda _, step, places: (places[step], 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(2, blocks), in_specs=[spec], out_specs=spec)
    return pl.pallas_call(_copy, grid_spec=grid, out_shape=array, name="chosen")(table, array)


def test_steps_that_are_skipped_copy_no_block_whose_place_is_in_a_table():
    table, array = jax.ShapeDtypeStruct((6,), jnp.int32), jax.ShapeDtypeStruct((64, 128), jnp.float32)
    [found] = pallas_calls(jax.make_jaxpr(functools.partial(_by_table, blocks=6))(table, array))
    block = 8 * 128 * 4
    assert [found.bytes(share) - 6 * 4 for share in (1.0, 0.5)] == [2 * 12 * block, 2 * 6 * block]


def test_a_grid_that_only_the_running_program_knows_counts_the_blocks_of_its_table():
    shapes = jax.ShapeDtypeStruct((6,), jnp.int32), jax.ShapeDtypeStruct((64, 128), jnp.float32)
    [found] = pallas_calls(jax.make_jaxpr(_by_table)(*shapes, jax.ShapeDtypeStruct((), jnp.int32)))
    assert (found.grid, found.known) == ((2, 6), (True, False))


def _looped(array):
    def turn(carry, _):
        return _kernel(carry, (2, 1, 1), INDICES["first"]), None

    return jax.lax.scan(turn, array, None, length=5)[0]


def _branched(array):
    few = functools.partial(_kernel, grid=(1, 1, 1), index=INDICES["first"])
    many = functools.partial(_kernel, grid=(4, 1, 1), index=INDICES["first"])
    return jax.lax.cond(array[0, 0] > 0, few, many, array)


def _differentiated(array):
    function = jax.custom_vjp(lambda array: _kernel(array, (3, 1, 1), INDICES["first"]))
    function.defvjp(
        lambda array: (_kernel(array, (3, 1, 1), INDICES["first"]), None),
        lambda _, tangent: (_kernel(tangent, (2, 2, 1), INDICES["second"]),),
    )
    return jax.grad(lambda array: jax.jit(function)(array).sum())(array)


@pytest.mark.parametrize(
    ("function", "grids"),
    [(_looped, [((2, 1, 1), 5)]), (_branched, [((4, 1, 1), 1)]), (_differentiated, [((3, 1, 1), 1), ((2, 2, 1), 1)])],
)
def test_calls_inside_other_operations_are_found(function, grids):
    found = pallas_calls(jax.make_jaxpr(function)(jnp.zeros((64, 1024))))
    assert [(call.grid, call.runs) for call in found] == grids


def _traced(call, kernel, tiling):
    with kernelry.use(kernel, target=call.request.target, tiling=tiling):
        return pallas_calls(jax.jit(program_of(call)).trace(*arguments_of(call)).jaxpr)


TILING = {"block_q": 256, "block_kv": 512, "block_kv_compute": 256, "block_q_dkv": 512, "block_kv_dkv": 256}
TILING |= {"block_kv_dkv_compute": 256, "block_q_dq": 128, "block_kv_dq": 512, "backward_kernels": 2}


@pytest.mark.parametrize(
    ("config", "more", "mask"),
    [
        ({}, "config", masks.Causal()),
        ({"type": "local_sliding", "window": 300}, "config", masks.SlidingWindow(299)),
        ({}, "segments", masks.Causal()),
    ],
)
def test_the_mask_says_which_steps_visit_a_block_and_which_blocks_it_cuts(config, more, mask):
    shape = ModelShape(q_len=1024, max_len=1024, q_heads=4, kv_heads=2, head_dim=128, mask=more)
    train = calls(AttentionConfig(**config), shape, TARGET)[0]
    forward, dkv, dq = _traced(train, "splash", TILING)
    visible = np.asarray(mask.materialize(1024, 1024))[0, 0]
    for kernel, block_q, block_kv in ((forward, 256, 512), (dkv, 512, 256), (dq, 128, 512)):
        blocks = visible.reshape(1024 // block_q, block_q, 1024 // block_kv, block_kv)
        some, every = blocks.any(axis=(1, 3)), blocks.all(axis=(1, 3)) & (more == "config")
        grid, share = grid_of(kernel, train, TILING)
        assert grid.steps == 4 * some.size == kernel.steps
        assert (grid.visited, grid.cut) == (4 * some.sum(), 4 * (some & ~every).sum()), kernel.name
        assert share == some.mean()
        assert grid.rows == grid.steps // kernel.grid[-1]


def test_a_list_of_blocks_has_only_visited_steps():
    shape = ModelShape(q_len=1024, max_len=1024, q_heads=4, kv_heads=2, head_dim=128)
    prefill = calls(AttentionConfig(), shape, TARGET)[1]
    tiling = {"block_q": 256, "block_kv": 256, "block_kv_compute": 256}
    [forward] = _traced(prefill, "tokamax_splash", tiling)
    grid, share = grid_of(forward, prefill, tiling)
    assert (grid.steps, grid.visited, grid.cut, share) == (4 * 10, 4 * 10, 4 * 4, 1.0)


def test_decode_visits_a_full_cache():
    for cache in ("contiguous", "paged:128"):
        shape = ModelShape(q_len=64, max_len=4096, batch=2, q_heads=8, kv_heads=2, head_dim=128, cache=cache)
        decode = calls(AttentionConfig(), shape, TARGET)[-1]
        [step] = _traced(decode, "ragged", {"block_kv": 512})
        grid, _ = grid_of(step, decode, {"block_kv": 512})
        assert (grid.steps, grid.visited, grid.shape[-1]) == (2 * 8, 2 * 8, 0)
        operands = 2 * 2 * 4096 * 2 * 128 * 2
        assert operands <= step.bytes(1.0) <= 1.02 * operands


def test_programs_without_pallas_have_no_calls():
    assert pallas_calls(jax.make_jaxpr(jnp.sin)(1.0)) == ()
    assert PallasCall("none", (), (), 1, (), 7, 9).bytes(1.0) == 7
