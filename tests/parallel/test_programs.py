"""What a mesh costs, read from compiled programs: collectives by shape, work and memory of a device, their growth."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from jax import lax
from mesh_cases import Cut, Sizes, collectives, masks_of, packed_ids, program

import kernelry
from kernelry import Request, masks
from kernelry.masks.shard_pairs import EMPTY, ShardGrid, blocks_per_shard
from kernelry.mesh import pairs
from kernelry.parallel import Sharding

pytestmark = pytest.mark.versions

DEVICES = (2, 4, 8)
SIZES = Sizes(batch=8, kv_heads=8)
PACKED = masks_of(SIZES)["packed"]


def counted(cut, mask=PACKED, sizes=SIZES, kernel="blockwise", **options):
    return dict(collectives(program(cut, mask, sizes, kernel, **options)))


def along(axis, count):
    return Cut.of({axis: count}, **{{"d": "batch", "t": "heads"}[axis]: axis})


# Batch and heads: nothing is sent

INTERPRETED = {
    "splash": Sizes(batch=2, q_len=128, kv_len=128, q_heads=2, kv_heads=2, dim=32, value_dim=32),
    "tokamax_splash": Sizes(batch=2, q_len=128, kv_len=128, q_heads=2, kv_heads=2, dim=32, value_dim=32),
    "pallas_flash": Sizes(batch=2, q_heads=2, kv_heads=2, dim=16, value_dim=16),
    "pallas_mha": Sizes(batch=2, q_heads=2, kv_heads=2, dim=16, value_dim=16),
}
DECODING = {
    "blockwise": SIZES,
    "dot_product": SIZES,
    "pallas_decode": Sizes(batch=2, q_heads=4, kv_heads=2, dim=16, value_dim=16),
    "ragged": Sizes(batch=2, kv_len=256, q_heads=4, kv_heads=2, dim=128, value_dim=128),
}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("axis", ["d", "t"])
@pytest.mark.parametrize("kernel", ["blockwise", "dot_product"])
def test_batch_and_heads_send_nothing(kernel, axis, devices):
    assert counted(along(axis, devices), kernel=kernel) == {}


@pytest.mark.parametrize("axis", ["d", "t"])
@pytest.mark.parametrize("kernel", INTERPRETED)
def test_kernels_of_accelerators_send_nothing(kernel, axis):
    sizes = INTERPRETED[kernel]
    assert counted(along(axis, 2), masks.Causal() & masks.Segments(packed_ids(sizes)), sizes, kernel) == {}


@pytest.mark.parametrize("axis", ["d", "t"])
@pytest.mark.parametrize("kernel", DECODING)
def test_decoding_sends_nothing(kernel, axis):
    sizes = dataclasses.replace(DECODING[kernel], q_len=1)
    mask = masks.Lengths(np.full(sizes.batch, 7))
    assert counted(along(axis, 2), mask, sizes, kernel, backward=False, mode="decode") == {}


def test_gradients_of_what_every_device_has_are_summed():
    """Sinks over rows, and key/value heads that are fewer than the devices."""
    assert counted(along("d", 4), sinks=True) == {("all-reduce", "f32[8]"): 1}
    few = dataclasses.replace(SIZES, kv_heads=2)
    assert counted(along("t", 4), sizes=few) == {("all-reduce", "f32[8,64,2,8]"): 1}
    assert counted(along("t", 4), sizes=few, backward=False) == {}


# Sequences: what a strategy says, and no more


@pytest.mark.parametrize("devices", DEVICES)
def test_a_ring_sends_to_the_next_device_alone(devices):
    """Key and value once more than there are steps in a loop; two steps are written out.

    Backward: key and value again, and their gradients: in each step after the first, and home.
    """
    cut = Cut.of({"c": devices}, sequence="c", strategy="ring")
    shape = f"f32[8,{64 // devices},8,8]"
    loops = 1 if devices == 2 else 2
    assert counted(cut, masks.Causal(), backward=False) == {("collective-permute", shape): 2 * loops}
    assert counted(cut, masks.Causal()) == {("collective-permute", shape): 2 * (2 * loops) + 2}
    ids = ("collective-permute", f"s32[8,{64 // devices}]")
    assert set(counted(cut)) == {("collective-permute", shape), ids}


@pytest.mark.parametrize("devices", DEVICES)
def test_ulysses_exchanges_alone(devices):
    cut = Cut.of({"c": devices}, sequence="c", strategy="ulysses")
    forward = counted(cut, backward=False)
    assert {operation for operation, _ in forward} == {"all-to-all"}
    assert sum(forward.values()) == 4
    backward = counted(cut)
    assert {operation for operation, _ in backward} == {"all-to-all"}
    assert sum(backward.values()) <= 8


def test_all_gather_gathers_and_scatters_keys_alone():
    cut = Cut.of({"c": 4}, sequence="c", strategy="all_gather")
    assert counted(cut, masks.Causal()) == {
        ("all-gather", "f32[8,64,8,8]"): 2,
        ("reduce-scatter", "f32[8,16,8,8]"): 2,
    }


def test_keys_on_several_devices_are_merged_by_one_collective():
    cut, sizes = Cut.of({"c": 4}, kv_sequence="c"), dataclasses.replace(SIZES, q_len=1)
    mask = masks.Lengths(np.full(8, 50))
    assert counted(cut, mask, sizes, backward=False, mode="decode") == {("all-gather", "f32[4,8,1,8,10]"): 1}


def test_whole_keys_are_not_sent():
    cut = Cut.of({"c": 4}, sequence="c", kv_sequence=())
    assert counted(cut, masks.Causal(), backward=False) == {}


# Work


@pytest.mark.parametrize("kernel", ["blockwise", "dot_product"])
@pytest.mark.parametrize("cut", [along("d", 1), along("t", 1), Cut.of({"c": 1}, sequence="c", strategy="ulysses")])
def test_work_is_shared_out(kernel, cut):
    (axis, _), *_ = cut.mesh
    flops = [
        program(dataclasses.replace(cut, mesh=((axis, devices),)), PACKED, SIZES, kernel).cost_analysis()["flops"]
        for devices in (1, *DEVICES)
    ]
    for devices, own in zip(DEVICES, flops[1:], strict=True):
        assert 0.9 < own * devices / flops[0] < 1.25, (devices, flops)


def _calls(monkeypatch, mask, order, length=256):
    """How often each device of a ring of eight calls a kernel."""
    made = collections.Counter()
    run = pairs.run_part

    def counting(plan, inputs):
        jax.debug.callback(lambda device: made.update([int(device)]), lax.axis_index("c"))
        return run(plan, inputs)

    monkeypatch.setattr(pairs, "run_part", counting)
    cut = Cut.of({"c": 8}, sequence="c", strategy="ring", order=order)
    query = jnp.ones((1, length, 1, 8))
    with jax.set_mesh(mesh_cases.mesh_of(cut.mesh)), kernelry.use(sharding=cut.sharding):
        jax.block_until_ready(
            jax.jit(lambda query, mask: kernelry.attention(query, query, query, mask=mask, kernel="blockwise"))(
                query, mask
            )
        )
        jax.effects_barrier()
    return [made[device] for device in range(8)]


@pytest.mark.parametrize(
    ("mask", "order", "calls"),
    [
        (masks.Causal(), "contiguous", [1, 2, 3, 4, 5, 6, 7, 8]),
        (masks.Causal(), "dual_chunk", [8] * 8),
        (masks.Causal(), "striped", [8] * 8),
        (masks.SlidingWindow(20), "contiguous", [1, *[2] * 7]),
        (masks.Causal() & masks.Segments(np.repeat([[0, 1]], 128, axis=1)), "contiguous", [1, 2, 3, 4] * 2),
        (masks.Lengths(np.array([40])), "contiguous", [2] * 8),
    ],
)
def test_kernels_run_where_a_shard_shows_something(monkeypatch, mask, order, calls):
    assert _calls(monkeypatch, mask, order) == calls


def test_every_device_of_a_balanced_order_has_as_many_blocks():
    for order, equal in (("contiguous", False), ("dual_chunk", True), ("striped", True)):
        grid = ShardGrid(q_len=8192, kv_len=8192, q_shards=8, kv_shards=8, order=order)
        blocks = blocks_per_shard(masks.Causal().form, grid).sum(axis=1)
        assert (len(set(blocks.tolist())) == 1) is equal, (order, blocks)


def _table(mask, devices, order="contiguous", length=8192):
    sharding = str(Sharding(sequence="c", strategy="ring", order=order, sizes=(("c", devices),)))
    request = Request(q_len=length, q_heads=8, head_dim=64, mask=mask, sharding=sharding)
    return kernelry.resolve(request, kernel="blockwise").shards.shards.table


def test_steps_end_where_the_mask_ends():
    table = np.asarray(_table(masks.SlidingWindow(1023), 8).table)
    steps = {(i - j) % 8 for i, j in np.argwhere(table != EMPTY).tolist()}
    assert steps == {0, 1}
    cut = Cut.of({"c": 8}, sequence="c", strategy="ring")
    assert counted(cut, masks.SlidingWindow(7)) == {("collective-permute", "f32[8,8,8,8]"): 6}


@pytest.mark.parametrize(("mask", "most"), [(masks.Causal(), 3), (masks.SlidingWindow(255), 6), (masks.Full(), 1)])
@pytest.mark.parametrize("order", ["contiguous", "dual_chunk", "striped"])
def test_classes_do_not_grow_with_devices(mask, most, order):
    few, many = (len(_table(mask, devices, order).classes) for devices in (4, 16))
    assert many <= max(most, few) <= 9


def test_the_text_of_a_ring_does_not_grow_with_devices():
    def size(devices):
        cut = Cut.of({"c": devices}, sequence="c", strategy="ring", order="dual_chunk")
        return len(program(cut, masks.Causal(), SIZES).as_text())

    assert size(8) < 1.1 * size(4)


# Memory


def _temporary(strategy, devices, length):
    sizes = Sizes(batch=1, q_len=length, kv_len=length, q_heads=8, kv_heads=8, dim=64, value_dim=64)
    cut = Cut.of({"c": devices}, sequence="c", strategy=strategy)
    return program(cut, masks.Causal(), sizes).memory_analysis().temp_size_in_bytes


def test_a_ring_halves_its_memory_with_twice_the_devices():
    length = 32768  # at which a kernel's tiles are small next to keys and values
    held = [_temporary("ring", devices, length) for devices in DEVICES]
    for one, half in itertools.pairwise(held):
        assert 0.4 < half / one < 0.65, held
    assert held[2] < 100 * 2**20
    assert held[2] < _temporary("all_gather", 8, length)
