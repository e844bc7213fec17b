"""What a call on a mesh sends, holds and computes: against the collectives of its program, and numbers noted before."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import kernelry
from kernelry import Request, masks
from kernelry.parallel import Sharding
from kernelry.resolution.balance import balances, blocks_by_pair
from kernelry.resolution.communication import communication_of
from kernelry.resolution.published import DEVICE_RATES, Link, links_between
from kernelry.resolution.shards import grid_of

CAUSAL = masks.Causal()
MILLION = Request(
    target="tpu:v5e",
    q_len=2**20,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    mask=CAUSAL,
    sharding="sequence=c:16 ring dual",
)
SMALL = Request(batch=4, q_len=256, q_heads=8, kv_heads=4, mask=CAUSAL, sharding="batch=d:2 sequence=c:4 ring")


def explained(request, **changed):
    return kernelry.explain(dataclasses.replace(request, **changed), changes=False)


def communication(request, **changed):
    found = explained(request, **changed)
    return communication_of(found.request, found.shards.shards)


# Bytes, against the collectives of the program.

SENT = {
    "ppermute": lambda _: 1,
    "all_gather": lambda devices: devices - 1,
    "all_to_all": lambda devices: (devices - 1) / devices,
    "reduce_scatter": lambda devices: (devices - 1) / devices,
    "psum": lambda devices: 2 * (devices - 1) / devices,
}
"""What a device sends of an operand."""


def sent(jaxpr, sizes):
    """The bytes that a device sends in a program, and how many collectives it takes part in."""
    count = total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removesuffix("_invariant")
        for inside in jaxprs_in_params(equation.params):
            more, size = sent(inside, sizes)
            times = equation.params["length"] if name == "scan" else 1
            count, total = count + more * times, total + size * times
        if name not in SENT:
            continue
        axes = equation.params.get("axis_name", equation.params.get("axes"))
        devices = math.prod(sizes[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
        count += len(equation.invars)
        total += sum(SENT[name](devices) * each.aval.size * each.aval.dtype.itemsize for each in equation.invars)
    return count, total


def programs(request):
    """The jaxprs of a call and of its gradients on a mesh of devices that are only described."""
    sharding = Sharding.parse(request.sharding)
    mesh = jax.sharding.AbstractMesh(*zip(*((size, axis) for axis, size in sharding.sizes), strict=True))
    query = jnp.zeros((request.batch, request.q_len, request.q_heads, request.head_dim), request.dtype)
    key = jnp.zeros((request.batch, request.kv_len, request.kv_heads, request.head_dim), request.dtype)
    mask = masks.SlidingWindow(20, 20) if "window" in str(request.mask) else CAUSAL
    mask = mask if request.q_len > 1 else CAUSAL.at(query_offset=request.kv_len - 1)

    def attend(query, key, value):
        out = kernelry.attention(query, key, value, mask=mask, mode=request.mode.value, kernel="blockwise")
        return out.astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh), kernelry.use(sharding=sharding):
        yield jax.make_jaxpr(attend)(query, key, key).jaxpr
        yield jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(query, key, key).jaxpr


STRATEGIES = (
    "batch=d:2 sequence=c:4 ring",
    "sequence=c:4 ring dual",
    "sequence=c:2 ring",
    "batch=d:2 heads=t:2 sequence=c:4 all_gather",
    "batch=d:2 sequence=c:4 ulysses",
    "sequence=c:8 ulysses",
    "sequence=c:4,u:2 ulysses=u:2 usp",
    "batch=d:2 heads=t:2",
    "heads=t:8",
    "batch=d:2 heads=t:8 sequence=c:4 ring",
    "batch=d:2 heads=t:2 sequence=c:4 kv_sequence=none",
)


@pytest.mark.versions
@pytest.mark.parametrize(
    "changed",
    [
        *({"sharding": text} for text in STRATEGIES),
        {"sharding": "sequence=c:8 ring", "mask": masks.SlidingWindow(20, 20)},
        {"sharding": "batch=d:2 kv_sequence=c:4", "q_len": 1, "mask": CAUSAL.at(query_offset=255)},
    ],
    ids=lambda changed: changed["sharding"],
)
def test_bytes_are_those_of_the_collectives_in_the_program(changed):
    request = dataclasses.replace(SMALL, kv_len=256, dtype="bfloat16", head_dim=16, value_dim=16, scale=None, **changed)
    sizes = dict(Sharding.parse(request.sharding).sizes)
    forward, both = (sent(program, sizes) for program in programs(request))
    found = communication(request)
    assert forward == (sum(each.count for each in found.forward.transfers), found.forward.bytes)
    passes = found.forward.transfers + found.backward.transfers
    assert both == (sum(each.count for each in passes), sum(each.bytes for each in passes))


def test_keys_that_are_quantised_travel_as_they_are_stored():
    asked = dataclasses.replace(SMALL, mode="prefill", gradients=(), dtype="bfloat16", sharding="sequence=c:4 ring")
    plain, stored = communication(asked), communication(asked, kv_quantization="int8:head_dim")
    per_token = 4 * (64 + 64) + 2 * 4 * 2  # a byte for each number, and a scale for each head of K and of V
    assert stored.forward.bytes == 4 * 4 * 64 * per_token
    assert plain.forward.bytes == 4 * 4 * 64 * 4 * (64 + 64) * 2
    assert str(stored.forward.transfers[0]) == "16 permutes of K and V"


@pytest.mark.parametrize(
    ("sharding", "forward", "backward"),
    [
        ("sequence=c:4 ring", 2, 2 + 4),
        ("sequence=c:4 all_gather", 4, 4 + 8),
        ("batch=d:4", 0, 0),
        ("sequence=c:4 kv_sequence=none", 0, 0),
    ],
)
def test_what_is_held_is_counted_in_shards_of_keys(sharding, forward, backward):
    shard = 4 * 64 * 4 * (64 + 64) * 2  # of K and V in bfloat16; their gradients are in float32
    found = communication(SMALL, dtype="bfloat16", sharding=sharding)
    assert (found.forward.held, found.backward.held) == (forward * shard, backward * shard)


# Steps, orders, and what compute hides.


@pytest.mark.parametrize(
    ("mask", "steps"),
    [(CAUSAL, 8), (masks.SlidingWindow(127), 2), (masks.SlidingWindow(127, 127), 3), (masks.Full(), 8)],
    ids=str,
)
def test_steps_end_where_the_mask_ends(mask, steps):
    assert communication(SMALL, q_len=1024, kv_len=1024, mask=mask, sharding="sequence=c:8 ring").steps == steps


NOTED = {
    CAUSAL: {"contiguous": (36, 484, 484, 0.54), "dual_chunk": (260, 260, 260, 1.0), "striped": (288, 288, 288, 1.0)},
    masks.SlidingWindow(1023): {
        "contiguous": (36, 72, 72, 0.94),
        "dual_chunk": (46, 72, 108, 0.62),
        "striped": (120, 120, 120, 1.0),
    },
    masks.Chunked(2048): {
        "contiguous": (36, 100, 100, 0.68),
        "dual_chunk": (68, 68, 116, 0.59),
        "striped": (96, 96, 96, 1.0),
    },
}
"""Blocks of 128, 8192 tokens, 8 devices: the least and the most of a device, what all wait for, the efficiency."""


@pytest.mark.parametrize("mask", NOTED, ids=str)
def test_the_work_of_each_order_is_counted_in_blocks(mask):
    found = explained(SMALL, q_len=8192, kv_len=8192, mask=mask, sharding="sequence=c:8 ring")
    orders, block = balances(found.request, found.shards.shards)
    assert block == 128
    noted = NOTED[mask]
    assert {each.order: (each.least, each.most, each.waited) for each in orders} == {k: v[:3] for k, v in noted.items()}
    assert [each.efficiency for each in orders] == pytest.approx([each[3] for each in noted.values()], abs=0.0051)


def test_no_order_is_compared_where_there_is_no_choice():
    found = explained(SMALL, sharding="batch=d:2 heads=t:2")
    assert balances(found.request, found.shards.shards) == ((), 0)
    odd = explained(SMALL, q_len=132, kv_len=132, sharding="sequence=c:4 ring")  # dual chunks would need 2 * 4
    assert [each.order for each in balances(odd.request, odd.shards.shards)[0]] == ["contiguous", "striped"]


@pytest.mark.parametrize("length", [60, 128, 250, 2 * 1009])
def test_blocks_cover_what_a_mask_shows(length):
    request = dataclasses.replace(SMALL, q_len=length, kv_len=length, sharding=None)
    grid = grid_of(request, Sharding.parse("sequence=c:2 ring"))
    counts, (rows, columns) = blocks_by_pair(CAUSAL.form, grid)
    half = length // 2
    visible = np.array([[half * (half + 1) // 2, 0], [half * half, half * (half + 1) // 2]])
    assert (counts * rows * columns >= visible).all()
    assert counts[0, 1] == 0
    assert half % rows == half % columns == 0


def test_a_million_tokens_hide_the_ring_behind_compute():
    found = communication(MILLION)
    (link,) = found.links
    forward, backward = (each.times(link, found.flops) for each in (found.forward, found.backward))
    shard = 2 * 65536 * 8 * 128 * 2
    assert found.forward.bytes == 16 * shard
    assert found.backward.bytes == 16 * shard + 16 * 2 * shard
    assert forward.transfers == pytest.approx(16 * shard / 50e9)
    assert forward.compute == pytest.approx(5.715, rel=0.01)
    assert backward.compute == pytest.approx(2.5 * forward.compute)
    assert forward.not_hidden == 0
    assert backward.not_hidden == pytest.approx(2 * shard / 50e9)  # the last permute, home


def test_what_a_step_cannot_hide_is_waited_for():
    found = communication(MILLION, q_len=16 * 512, kv_len=16 * 512, q_heads=8)
    slow = Link("a string", 1e6, "")
    times = found.forward.times(slow, found.flops)
    assert times.not_hidden == pytest.approx(times.transfers - times.compute)
    gathered = communication(MILLION, sharding="sequence=c:16 all_gather")
    assert gathered.forward.times(slow, gathered.flops).not_hidden == gathered.forward.bytes / 1e6


@pytest.mark.parametrize(("kind", "speed"), [("v5e", 50), ("v5p", 100), ("v6e", 100), ("tpu7x", 100), ("h100", 450)])
def test_links_have_a_published_source(kind, speed):
    (link,) = links_between(kind, 4)
    assert link.bandwidth == speed * 1e9
    assert "per chip both ways" in link.source or "per GPU both ways" in link.source
    assert kind in DEVICE_RATES
