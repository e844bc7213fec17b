"""The sharding of a layer: from its config, its arguments and its mesh, to every call."""

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from tests.support.flax_cases import close, qkv

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError, ShapeError
from kernelry.flax import AttentionOp, CachedPart, Tokens, attention_fn, attention_op_as_linen
from kernelry.parallel import ContextParallel, Sharding, load_balanced_order

MESH = AbstractMesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
ONE = jax.make_mesh((1, 1), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
TEXT = "batch=data sequence=context ring"
LOCATED = "batch=data:2 sequence=context:4 ring"
CONFIG = AttentionConfig(sharding=TEXT)
ARRAYS = qkv(2, q_len=32, kv_len=32)


def shardings_of(call, *arrays):
    """What requests say of the sharding, in a call of which nothing is run."""
    with kernelry.record() as resolutions:
        jax.eval_shape(call, *(arrays or ARRAYS))
    return [resolution.request.sharding for resolution in resolutions]


@pytest.mark.parametrize(
    "op",
    [
        AttentionOp(CONFIG, mesh=MESH),
        AttentionOp(mesh=MESH, sharding=TEXT),
        AttentionOp(AttentionConfig(sharding="batch=context"), mesh=MESH, sharding=Sharding.parse(TEXT)),
        functools.partial(attention_fn, config=CONFIG, mesh=MESH),
        functools.partial(attention_fn, mesh=MESH, sharding=TEXT),
        lambda *arrays: attention_op_as_linen(CONFIG, mesh=MESH).apply({}, *arrays),
        lambda *arrays: attention_op_as_linen(mesh=MESH, sharding=TEXT).apply({}, *arrays),
    ],
    ids=["config", "argument", "argument over config", "function", "function's argument", "linen", "linen's argument"],
)
def test_the_sharding_of_a_layer_reaches_the_call(op):
    assert shardings_of(op) == [LOCATED]


def test_the_active_mesh_has_the_axes_where_none_is_given():
    with jax.sharding.use_abstract_mesh(MESH):
        assert shardings_of(AttentionOp(CONFIG)) == [LOCATED]


def test_a_scope_around_the_call_decides():
    op = AttentionOp(CONFIG, mesh=MESH)
    with kernelry.use(sharding=Sharding(batch="data", heads="context", mesh=MESH)):
        assert shardings_of(op) == ["batch=data:2 heads=context:4"]
    with kernelry.use(sharding=""):
        assert shardings_of(op) == [None]
    with kernelry.use(context_parallel=ContextParallel("context", size=1)):
        assert shardings_of(op) == [None]


def test_on_one_device_the_call_is_as_without_a_sharding():
    assert shardings_of(AttentionOp(CONFIG, mesh=ONE)) == [None]
    close(AttentionOp(CONFIG, mesh=ONE)(*ARRAYS), AttentionOp()(*ARRAYS))


def test_a_sharding_is_a_static_part_of_the_module():
    op = AttentionOp(CONFIG, mesh=ONE)
    close(nnx.jit(lambda module, *arrays: module(*arrays))(op, *ARRAYS), AttentionOp()(*ARRAYS))
    graph, state = nnx.split(op)
    assert nnx.merge(graph, state).sharding == op.sharding == dataclasses.replace(Sharding.parse(TEXT), mesh=ONE)


def test_without_a_mesh_only_an_empty_sharding_is_as_on_one_device():
    assert shardings_of(AttentionOp(AttentionConfig(sharding=""))) == [None]
    with pytest.raises(ArgumentError, match=f"sharding={TEXT}: no mesh is active; enter one"):
        AttentionOp(CONFIG)(*ARRAYS)
    with pytest.raises(ArgumentError, match=f"sharding={TEXT}: no mesh is active; enter one"):
        attention_fn(*ARRAYS, config=CONFIG)


def _decode(op, kv_len, **call):
    step = functools.partial(op, tokens=Tokens(query_offset=kv_len - 1), **call)
    return functools.partial(shardings_of, step, *qkv(2, q_len=1, kv_len=kv_len))


@pytest.mark.parametrize("mode", ["decode", "autoregressive"])
def test_in_decode_axes_of_the_sequence_cut_the_keys_alone(mode):
    op = AttentionOp(AttentionConfig(sharding="batch=data:2 sequence=context:4 ring dual"), mesh=MESH)
    assert _decode(op, 32, mode=mode)() == ["batch=data:2 kv_sequence=context:4"]
    with pytest.raises(ShapeError, match=r"query length T=1 does not divide over context: 1 % 4 = 1"):
        _decode(op, 32, mode="prefill")()


def test_in_decode_keys_that_do_not_divide_are_whole_on_each_device():
    op = AttentionOp(AttentionConfig(sharding="batch=data sequence=context ring dual"), mesh=MESH)
    whole = AttentionOp(AttentionConfig(sharding="batch=data sequence=context kv_sequence=none"), mesh=MESH)
    with pytest.warns(UserWarning, match="S=30, which does not divide over context: 30 % 4 = 2"):
        assert _decode(op, 30, mode="decode")() == ["batch=data:2"]
    assert _decode(whole, 32, mode="decode")() == ["batch=data:2"]
    query, key, value = qkv(2, q_len=1, kv_len=32)
    parts = functools.partial(op, cached=[CachedPart(key, value)], mode="decode", mask=masks.Full())
    with pytest.warns(UserWarning, match="S=1, which does not divide over context"):
        assert shardings_of(parts, query, key[:, :1], value[:, :1]) == ["batch=data:2"] * 2
    assert shardings_of(parts, query) == ["batch=data:2 kv_sequence=context:4"]


def test_a_function_in_decode_cuts_the_keys_alone():
    query, key, value = qkv(2, q_len=1, kv_len=32)
    step = functools.partial(attention_fn, config=CONFIG, mesh=MESH, mode="decode")
    assert shardings_of(step, query, key, value) == ["batch=data:2 kv_sequence=context:4"]


def test_in_decode_axes_of_keys_alone_cut_them():
    op = AttentionOp(mesh=MESH, sharding="batch=data kv_sequence=context")
    assert _decode(op, 32, mode="decode")() == ["batch=data:2 kv_sequence=context:4"]


def test_parts_of_a_cache_are_sharded_too():
    op = AttentionOp(CONFIG, mesh=MESH)
    query, key, value = ARRAYS
    parts = functools.partial(op, cached=[CachedPart(key, value)], mask=masks.Full())
    assert shardings_of(parts, query, key, value) == [LOCATED] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: AttentionOp(mesh=MESH),
            "mesh= has axes data:2, context:4, and nothing says what they cut: pass sharding=, e.g. 'batch=data', or",
        ),
        (lambda: AttentionOp(mesh={"data": 2}), r"mesh must be a jax\.sharding\.Mesh, got dict"),
        (lambda: AttentionOp(mesh=MESH, sharding="batch=dat"), "has no such axis; did you mean 'data'"),
        (
            lambda: AttentionOp(mesh=ONE, sharding=Sharding(batch="data", mesh=MESH)),
            "mesh= is Mesh.*, and that of sharding=batch=data is AbstractMesh.*; pass one of them",
        ),
        (lambda: AttentionOp(sharding=3), "a sharding is written e.g. 'batch=d:4 sequence=c:8 ring', got 3"),
        (lambda: attention_fn(*ARRAYS, mesh=MESH), "mesh= has axes data:2, context:4"),
    ],
)
def test_what_a_mesh_cannot_do_says_so(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_explicit_axes_need_no_sharding():
    explicit = AbstractMesh((2, 4), ("data", "context"), axis_types=(AxisType.Explicit,) * 2)
    assert AttentionOp(mesh=explicit).sharding is None
    assert AttentionOp(mesh=ONE).sharding is None


def test_another_mesh_than_the_active_one_is_an_error():
    other = AbstractMesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    words = r"is for a mesh {'data': 2, 'context': 4}, and the active one is {'data': 4, 'context': 2}"
    with jax.sharding.use_abstract_mesh(other), pytest.raises(ArgumentError, match=words):
        jax.eval_shape(AttentionOp(CONFIG, mesh=MESH), *ARRAYS)


# Load-balanced orders

BALANCED = AttentionOp(AttentionConfig(sharding=f"{TEXT} dual"), mesh=MESH)
POSITIONS = load_balanced_order(32, 4)


def test_traced_positions_under_an_order_warn():
    def call(*arrays, positions):
        return BALANCED(*arrays, tokens=Tokens(positions=positions))

    words = r"Tokens\.positions is a JAX array, .* order='dual_chunk' .*leave it out, .* or pass a NumPy array"
    with pytest.warns(UserWarning, match=words):
        jax.eval_shape(call, *ARRAYS, positions=jnp.asarray(POSITIONS))
    tokens = Tokens(positions=POSITIONS, kv_positions=jnp.asarray(POSITIONS))
    with pytest.warns(UserWarning, match=r"Tokens\.kv_positions is a JAX array"):
        jax.eval_shape(functools.partial(BALANCED, tokens=tokens), *ARRAYS)


def test_static_positions_and_no_positions_are_silent():
    assert shardings_of(BALANCED) == [f"{LOCATED} dual_chunk"]
    assert shardings_of(functools.partial(BALANCED, tokens=Tokens(positions=POSITIONS))) == [f"{LOCATED} dual_chunk"]


def test_traced_positions_are_silent_where_nothing_is_reordered():
    tokens = Tokens(positions=jnp.arange(32))
    for op in (
        AttentionOp(CONFIG, mesh=MESH),
        AttentionOp(AttentionConfig(sharding=f"{TEXT} dual"), mesh=ONE),
        AttentionOp(AttentionConfig(sharding="batch=data heads=context"), mesh=MESH),
    ):
        jax.eval_shape(functools.partial(op, tokens=tokens), *ARRAYS)


@pytest.mark.parametrize("order", ["dual", "striped", "order=auto"])
def test_what_is_about_neighbouring_keys_is_refused_under_an_order(order):
    moba = {"chunk_size": 8, "top_k": 2}
    config = kernelry.config.load_config({"sharding": f"{TEXT} {order}", "moba": moba})
    with pytest.raises(ArgumentError, match=r"config\.moba averages blocks of consecutive keys, .*order='contiguous'"):
        jax.eval_shape(AttentionOp(config, mesh=MESH), *ARRAYS)
    op = AttentionOp(AttentionConfig(sharding=f"{TEXT} {order}"), mesh=MESH)
    flags = Tokens(bidirectional=np.zeros(32, bool))
    with pytest.raises(ArgumentError, match=r"bidirectional flags are about neighbouring keys, .*BidirectionalSpans"):
        jax.eval_shape(functools.partial(op, tokens=flags), *ARRAYS)


ON_EIGHT_DEVICES = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    from kernelry.config import AttentionConfig, from_maxtext
    from kernelry.flax import AttentionOp, Tokens
    from kernelry.parallel import load_balanced_order, reorder_for_load_balance, undo_reorder
    from tests.support.flax_cases import qkv

    ids = jnp.repeat(jnp.arange(2), 16)[None]

    def mesh_of(**sizes):
        kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)

    def loss(op, tokens, *arrays):
        out = op(*arrays, tokens=tokens)
        return (out * jnp.cos(jnp.arange(out.shape[-1]))).sum(), out

    def stages(op, *arrays, tokens):
        return jax.vmap(functools.partial(op, tokens=tokens), spmd_axis_name="stage")(*arrays)

    @functools.partial(jax.jit, static_argnums=0)
    def both(op, tokens, *arrays):
        run = functools.partial(loss, op, tokens)
        (_, out), gradients = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return out, *gradients

    def equal(op, size, order, arrays, axis, positions=None, alone=AttentionOp()):
        ways = reorder_for_load_balance, undo_reorder
        move, undo = (functools.partial(way, size=size, order=order) for way in ways)
        tokens = Tokens(segment_ids=move(ids), positions=positions)
        got = both(op, tokens, *(move(array, axis=axis) for array in arrays))
        want = both(alone, Tokens(segment_ids=ids), *arrays)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(undo(g, axis=axis), w, rtol=2e-5, atol=2e-5, err_msg=str(op))

    arrays = qkv(2, q_len=32, kv_len=32, kv_heads=2)
    striped = AttentionConfig(sharding="batch=data sequence=context ring striped")
    op = AttentionOp(striped, mesh=mesh_of(data=2, context=4))
    equal(op, 4, "striped", arrays, 1, load_balanced_order(32, 4, "striped"))

    options = {"mesh_axes": ["data", "context", "context_usp_ulysses"], "context_parallel_strategy": "usp"}
    options |= {"ici_context_parallelism": 2, "ici_context_usp_ulysses_parallelism": 2}
    with jax.set_mesh(mesh_of(data=2, context=2, context_usp_ulysses=2)):
        equal(AttentionOp(sharding=from_maxtext(options).sharding), 2, "dual_chunk", arrays, 1)

    piped = AttentionOp(mesh=mesh_of(stage=2, data=2, context=2), sharding="batch=data sequence=context ring dual")
    arrays = qkv(2, 2, q_len=32, kv_len=32, kv_heads=2)
    alone = functools.partial(stages, AttentionOp(mesh=mesh_of(stage=1), sharding=""))
    equal(functools.partial(stages, piped), 2, "dual_chunk", arrays, 2, alone=alone)
    print("equal")
"""


def test_a_layer_on_eight_devices_computes_what_it_does_on_one():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environ = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(ON_EIGHT_DEVICES)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stderr
