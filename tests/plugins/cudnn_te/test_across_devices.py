"""Sequences over four devices, through transformer-engine's ring and all-gather."""

import functools

import cudnn_te_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from transformer_engine.jax import attention as te

import kernelry
from kernelry import masks
from kernelry.errors import ConfigError
from kernelry.parallel import ContextParallel, load_balanced_order, reorder_for_load_balance, undo_reorder

LENGTH, DEVICES = 64, 4
CAUSAL = masks.Causal()
IDS = np.stack([np.repeat([0, 4, 2], [37, 3, 24]), np.repeat([3, -1, 5], [30, 9, 25])])

pytestmark = [
    pytest.mark.filterwarnings("ignore:TransformerEngine logical axes:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_resources:DeprecationWarning"),
    pytest.mark.te(served=True),
]


def _check(mesh, strategy, order, *, mask=CAUSAL, ids=None):
    def reordered(array, axis=1):
        return array if order is None else reorder_for_load_balance(array, DEVICES, axis=axis, order=order)

    def there(array):
        return jax.device_put(reordered(array), NamedSharding(mesh, PartitionSpec(None, "context")))

    *operands, d_out = cases.arrays(LENGTH)
    wanted = cases.results("dot_product", operands, d_out, mask=mask if ids is None else mask & masks.Segments(ids))
    moved = mask
    if order is not None:
        places = load_balanced_order(LENGTH, DEVICES, order)
        moved = mask.at(query_positions=places, kv_positions=places)
    if ids is not None:
        moved = moved & masks.Segments(reordered(jnp.asarray(ids)))
    context = ContextParallel("context", strategy)
    with (
        kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32], context_parallel=context),
        kernelry.record() as resolutions,
    ):
        found = cases.results(cases.IN_FLOAT32.name, [there(array) for array in operands], there(d_out), mask=moved)
    back = (lambda array: array) if order is None else (lambda array: undo_reorder(array, DEVICES, order=order))
    (out, _, _), gradients = found
    cases.same((back(out), tuple(back(gradient) for gradient in gradients)), (wanted[0][0], wanted[1]))
    assert resolutions[0].request.context_parallel == f"{strategy}:context:{DEVICES}"


@pytest.mark.parametrize("order", [None, "dual_chunk"])
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_causal(mesh, strategy, order):
    _check(mesh, strategy, order)


@pytest.mark.te(since="2.20")
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_full(mesh, strategy):
    _check(mesh, strategy, None, mask=masks.Full())


@pytest.mark.te(since="2.20")
def test_packed_rows_in_stripes(mesh):
    _check(mesh, "ring", "striped", ids=IDS)


@pytest.mark.te(before="2.20")
def test_packed_rows_in_stripes_are_an_error_in_releases_that_get_them_wrong(mesh):
    with pytest.raises(ConfigError, match="packed rows in a ring"):
        _check(mesh, "ring", "striped", ids=IDS)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "native"])
def test_a_sharding_whose_shards_it_does_not_serve_is_left_to_it(mesh, strategy):
    *operands, d_out = cases.arrays(LENGTH)
    wanted = cases.results("dot_product", operands, d_out, mask=CAUSAL)

    def there(array):
        moved = reorder_for_load_balance(array, DEVICES)
        return jax.device_put(moved, NamedSharding(mesh, PartitionSpec(None, "context")))

    with (
        kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32], sharding=f"sequence=context {strategy} dual"),
        kernelry.record() as resolutions,
    ):
        found = cases.results(cases.IN_FLOAT32.name, [there(array) for array in operands], there(d_out), mask=CAUSAL)
    (out, _, _), gradients = found
    cases.same(
        (undo_reorder(out, DEVICES), tuple(undo_reorder(gradient, DEVICES) for gradient in gradients)),
        (wanted[0][0], wanted[1]),
    )
    assert resolutions[0].shards is None
    assert resolutions[0].request.sharding == f"sequence=context:{DEVICES} {strategy} dual_chunk"


@pytest.mark.parametrize(("order", "strategy"), [("dual_chunk", "DualChunkSwap"), ("striped", "Striped")])
def test_orders_are_transformer_engines(order, strategy):
    tokens = jnp.arange(LENGTH)[None]
    theirs = te.reorder_causal_load_balancing(tokens, te.ReorderStrategy[strategy], DEVICES, 1)
    np.testing.assert_array_equal(theirs[0], load_balanced_order(LENGTH, DEVICES, order))
    np.testing.assert_array_equal(undo_reorder(theirs, DEVICES, order=order), tokens)


@pytest.mark.parametrize("name", ["dp", "fsdp"])
def test_gradients_of_sinks_are_summed_over_the_batch(name):
    mesh = jax.make_mesh((DEVICES,), (name,), axis_types=(AxisType.Auto,))
    *operands, d_out = cases.arrays(batch=DEVICES)
    options = {"mask": masks.Causal(), "sinks": jnp.asarray([0.3, -1.0, 2.0, 0.0])}
    wanted = cases.results("dot_product", operands, d_out, **options)
    with jax.set_mesh(mesh), kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        there = [jax.device_put(array, NamedSharding(mesh, PartitionSpec(name))) for array in (*operands, d_out)]
        cases.same(cases.results(cases.IN_FLOAT32.name, there[:3], there[3], **options), wanted)


@pytest.mark.te(since="2.20")
@pytest.mark.filterwarnings("ignore:.*context manager has been deprecated:DeprecationWarning")
def test_a_mesh_that_is_entered_by_with_is_known_too():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    *operands, d_out = cases.arrays(batch=DEVICES)
    options = {"mask": masks.Causal(), "sinks": jnp.asarray([0.3, -1.0, 2.0, 0.0])}
    wanted = cases.results("dot_product", operands, d_out, **options)
    with mesh, kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        there = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in (*operands, d_out)]
        cases.same(cases.results(cases.IN_FLOAT32.name, there[:3], there[3], **options), wanted)


def test_sequences_that_no_mesh_shares_out_are_an_error():
    """Else tokens in another order would be attended to by their slots."""
    order = load_balanced_order(LENGTH, DEVICES)
    mask = CAUSAL.at(query_positions=order, kv_positions=order)
    context = ContextParallel("context", "ring", size=DEVICES)
    *operands, d_out = cases.arrays(LENGTH)
    with (
        kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32], context_parallel=context),
        pytest.raises(ConfigError, match=r"over 4 devices along 'context', and the active mesh is \{\}"),
    ):
        cases.results(cases.IN_FLOAT32.name, operands, d_out, mask=mask)


@pytest.mark.parametrize("name", ["causal, lengths", "causal, packed"])
def test_lengths_and_segments_are_cut_as_the_queries_are(name):
    """Rows of a batch on one device each, with lengths and ids of their own that jit closes over."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    *operands, d_out = cases.arrays(batch=DEVICES)
    ids = np.concatenate([cases.IDS, cases.IDS[::-1, ::-1]])
    mask = masks.Causal() & (masks.Segments(ids) if "packed" in name else masks.Lengths(np.asarray([5, 32, 17, 1])))
    wanted = cases.results("dot_product", operands, d_out, mask=mask)
    with jax.set_mesh(mesh), kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        there = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in (*operands, d_out)]
        cases.same(cases.results(cases.IN_FLOAT32.name, there[:3], there[3], mask=mask), wanted)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["causal, packed", "causal"])
def test_inside_a_shard_map_a_call_is_one_of_each_shard(name, check):
    """Rows and heads on two devices each; `check_vma` is JAX's check of what varies over them."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    *operands, d_out = cases.arrays()
    extra = {"sinks": jnp.asarray([0.3, -1.0, 2.0, 0.0])} if name == "causal" else {}
    by_head, mask = PartitionSpec("data", None, "tensor"), cases.MASKS[name]

    def attend(query, key, value, mask, extra, kernel):
        return kernelry.attention(query, key, value, mask=mask, kernel=kernel, **extra)

    def results(call):
        out, pull = jax.vjp(lambda operands, extra: call(*operands, mask, extra), operands, extra)
        return out, pull(d_out)

    wanted = results(functools.partial(attend, kernel="dot_product"))
    specs = (by_head, by_head, by_head, PartitionSpec("data"), PartitionSpec("tensor"))
    with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        call = functools.partial(attend, kernel=cases.IN_FLOAT32.name)
        call = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=check)
        found = jax.jit(lambda: results(call))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


def test_an_axis_that_nothing_is_known_of_is_an_error_where_gradients_are_summed():
    mesh = jax.make_mesh((DEVICES,), ("somewhere",), axis_types=(AxisType.Auto,))
    *operands, d_out = cases.arrays(batch=DEVICES)
    with (
        jax.set_mesh(mesh),
        kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]),
        pytest.raises(ConfigError, match="axis 'somewhere' of the mesh"),
    ):
        cases.results(cases.IN_FLOAT32.name, operands, d_out, sinks=jnp.zeros(4))


@pytest.mark.parametrize(
    "given", [{"sinks": jnp.zeros(4)}, {"bias": jnp.zeros((1, 4, 32, 32))}], ids=lambda given: next(iter(given))
)
def test_what_each_head_has_of_its_own_is_an_error_where_heads_are_shared_out(given):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    *operands, d_out = cases.arrays()
    with (
        jax.set_mesh(mesh),
        kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]),
        pytest.raises(ConfigError, match="on a mesh with the axis 'tensor' of heads"),
    ):
        cases.results(cases.IN_FLOAT32.name, operands, d_out, **given)


def test_sequences_that_are_sharded_unsaid_are_gathered():
    mesh = jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,))
    *operands, d_out = cases.arrays(LENGTH)
    wanted = cases.results("dot_product", operands, d_out, mask=masks.Causal())
    with jax.set_mesh(mesh), kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        there = [
            jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, "context"))) for array in (*operands, d_out)
        ]
        cases.same(cases.results(cases.IN_FLOAT32.name, there[:3], there[3], mask=masks.Causal()), wanted)


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, None, "data"), PartitionSpec()])
def test_explicit_axes_are_read_from_the_arrays(spec):
    """Core cuts the call, so that transformer-engine sees a shard on each device."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    *operands, d_out = cases.arrays(batch=DEVICES)
    operands = [operands[0], *(jnp.repeat(array, operands[0].shape[2] // array.shape[2], 2) for array in operands[1:])]
    wanted = cases.results("dot_product", operands, d_out, mask=masks.Causal())
    with jax.set_mesh(mesh), kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        there = [jax.device_put(array, NamedSharding(mesh, spec)) for array in (*operands, d_out)]
        cases.same(cases.results(cases.IN_FLOAT32.name, there[:3], there[3], mask=masks.Causal()), wanted)
