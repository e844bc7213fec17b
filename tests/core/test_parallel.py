"""Sequences over a mesh axis: what a call says of them, and the orders in which their tokens stand."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError, KernelRefusedError, NoKernelError, ShapeError
from kernelry.parallel import (
    ContextParallel,
    Sharding,
    choose_order,
    load_balanced_order,
    reorder_for_load_balance,
    undo_reorder,
)
from kernelry.policy.scope import current_scope
from kernelry.request.request import Request

ORDERS = ("dual_chunk", "striped")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 5), st.sampled_from(ORDERS))
def test_an_order_is_a_permutation_that_is_undone(size, pieces, order):
    tokens = jnp.arange(2 * size * pieces)[None, :, None]
    moved = reorder_for_load_balance(tokens, size, order=order)
    assert sorted(np.ravel(moved)) == list(range(tokens.size))
    np.testing.assert_array_equal(undo_reorder(moved, size, order=order), tokens)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.sampled_from(ORDERS))
def test_causal_attention_costs_every_device_about_the_same(size, pieces, order):
    length = 2 * size * pieces
    seen = (load_balanced_order(length, size, order) + 1).reshape(size, -1).sum(axis=1)
    assert seen.max() - seen.min() <= (0 if order == "dual_chunk" else length)


def test_orders_of_eight_tokens_on_two_devices():
    assert load_balanced_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert load_balanced_order(8, 2, "striped").tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_another_axis_is_reordered():
    tokens = jnp.arange(8)
    np.testing.assert_array_equal(reorder_for_load_balance(tokens, 2, axis=0), load_balanced_order(8, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: load_balanced_order(12, 4), r"12 tokens cannot be shared out .*dual_chunk"),
        (lambda: load_balanced_order(8, 2, "stripes"), "unknown order 'stripes'; did you mean 'striped'"),
        (lambda: ContextParallel("context", "rings"), "unknown strategy 'rings'; did you mean 'ring'"),
        (lambda: ContextParallel("", "ring"), "axis must be the name of a mesh axis"),
        (lambda: ContextParallel("context", size=0), "size must be a positive integer, got 0"),
        (lambda: ContextParallel.parse("ring:context"), "written strategy:axis:size, e.g. ring:context:4"),
        (lambda: Request(q_len=8, context_parallel="ring"), "written strategy:axis:size"),
        (lambda: Request(q_len=8, context_parallel=4), "written strategy:axis:size"),
    ],
)
def test_errors_say_what_was_found(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


@pytest.mark.parametrize("text", ["ring:context:4", "all_gather:cp:2"])
def test_texts_are_read_back(text):
    assert str(ContextParallel.parse(text)) == text
    request = Request(q_len=8, context_parallel=text)
    assert Request.from_json(request.to_json()) == request
    assert f"context_parallel={text}" in str(request)


def _attend(kernel="dot_product"):
    query = jnp.ones((1, 8, 2, 16))
    return kernelry.attention(query, query, query, kernel=kernel)


def test_a_kernel_that_does_not_attend_across_devices_refuses():
    with (
        kernelry.use(context_parallel=ContextParallel("context", "ring", size=4)),
        pytest.raises(KernelRefusedError, match="context_parallel=ring:context:4 is not supported"),
    ):
        _attend()


def test_one_device_has_whole_sequences():
    mesh = jax.make_mesh((1,), ("context",))
    with jax.set_mesh(mesh), kernelry.use(context_parallel=ContextParallel("context")), kernelry.record() as made:
        _attend()
    assert made[0].request.context_parallel is None


def test_its_text_alone_is_an_error():
    with pytest.raises(ArgumentError, match="takes a ContextParallel, got 'ring:context:4'"):
        kernelry.use(context_parallel="ring:context:4").__enter__()


def test_an_inner_scope_of_size_one_takes_it_back():
    whole = ContextParallel("context", size=1)
    with kernelry.use(context_parallel=ContextParallel("context", size=4)), kernelry.use(context_parallel=whole):
        assert _attend().shape == (1, 8, 2, 16)


def test_of_it_and_a_sharding_the_one_that_an_inner_scope_gives_holds():
    context, taken_back = ContextParallel("c", "ring", size=4), ContextParallel("c", size=1)
    cut = Sharding(batch="d", sequence="c")

    def found(*scopes):
        with contextlib.ExitStack() as inside:
            for scope in scopes:
                inside.enter_context(kernelry.use(**scope))
            scope = current_scope()
            return scope.context_parallel, scope.sharding

    assert found({"context_parallel": context}, {"sharding": cut}) == (None, cut)
    assert found({"sharding": cut}, {"context_parallel": context}) == (context, None)
    assert found({"sharding": cut}, {"context_parallel": taken_back}) == (taken_back, cut)
    assert found({"context_parallel": context}, {"sharding": Sharding()}) == (context, Sharding())


def test_it_and_a_sharding_in_one_scope_are_an_error():
    with pytest.raises(ArgumentError, match=r"'batch=d'\): both say how sequences are cut; name the axis in sharding"):
        kernelry.use(context_parallel=ContextParallel("c"), sharding="batch=d")


@pytest.mark.parametrize("given", [jax.sharding.PartitionSpec("d"), 3, {"batch": "d"}])
def test_a_scopes_sharding_of_another_kind_is_an_error(given):
    with pytest.raises(ArgumentError, match=r"or its text, e\.g\. 'batch=data .*; Sharding\.of_specs reads .*; got"):
        kernelry.use(sharding=given)


@pytest.mark.parametrize("sharding", ["sequence=c:4 ring", "kv_sequence=c:4", "sequence=c:4 kv_sequence=none"])
def test_results_of_several_shards_are_not_merged_in_float64(sharding):
    facts = {"q_len": 128, "q_heads": 4, "dtype": "float64", "logits_dtype": "float64", "target": "cpu"}
    with pytest.raises(NoKernelError, match=r"logits_dtype=float64 of keys in several shards, .* merged in float32"):
        kernelry.resolve(Request(**facts, sharding=sharding))
    assert kernelry.resolve(Request(**facts, sharding="sequence=c:4")).shards.shards.sharding.strategy == "ulysses"


def test_an_axis_that_the_mesh_lacks_is_an_error():
    with (
        kernelry.use(context_parallel=ContextParallel("context")),
        pytest.raises(ArgumentError, match="no mesh is active"),
    ):
        _attend()
    mesh = jax.make_mesh((1,), ("contexts",))
    with (
        jax.set_mesh(mesh),
        kernelry.use(context_parallel=ContextParallel("context")),
        pytest.raises(ArgumentError, match="has no axis 'context'; did you mean 'contexts'"),
    ):
        _attend()


def test_a_size_that_is_not_the_meshs_is_an_error():
    mesh = jax.make_mesh((1,), ("context",))
    with (
        jax.set_mesh(mesh),
        kernelry.use(context_parallel=ContextParallel("context", size=4)),
        pytest.raises(ArgumentError, match="the axis has size 1 in the mesh"),
    ):
        _attend()


def test_it_is_part_of_the_key_of_a_jitted_function():
    attend = jax.jit(_attend)
    attend()
    with (
        kernelry.use(context_parallel=ContextParallel("context", size=4)),
        pytest.raises(KernelRefusedError, match="context_parallel"),
    ):
        attend()


# Which order suits a mask

CAUSAL = masks.Causal()
IDS = masks.Segments(jnp.zeros((1, 8192), jnp.int32))


@pytest.mark.parametrize(
    ("mask", "order"),
    [
        (CAUSAL, "dual_chunk"),
        (CAUSAL & IDS, "dual_chunk"),
        (masks.BlockCausal(32), "dual_chunk"),
        (masks.Chunked(8192), "dual_chunk"),
        (masks.SlidingWindow(1023), "contiguous"),
        (masks.SlidingWindow(511, 511), "contiguous"),
        (masks.SlidingWindow(1023) & IDS, "contiguous"),
        (masks.Chunked(2048), "contiguous"),
        (masks.Full(), "contiguous"),
        (IDS, "contiguous"),
        (CAUSAL.at(query_positions=load_balanced_order(8192, 8), kv_positions=np.arange(8192)), "contiguous"),
    ],
    ids=str,
)
def test_the_order_follows_the_mask(mask, order):
    assert choose_order(mask, 8192, 8) == order


def test_one_device_needs_no_order():
    assert choose_order(CAUSAL, 7, 1) == "contiguous"


def test_an_order_that_does_not_divide_is_not_chosen():
    assert choose_order(CAUSAL, 12, 4) == "striped"
    assert choose_order(CAUSAL, 4, 4) == "contiguous"


def _waited(mask, length, size, order):
    """The cells of 1 × 1 that a ring waits for, counted one by one."""
    tokens = np.arange(length) if order == "contiguous" else load_balanced_order(length, size, order)
    seen = np.broadcast_to(mask.materialize(length, length), (1, 1, length, length))[0, 0][tokens][:, tokens]
    work = seen.reshape(size, length // size, size, length // size).sum(axis=(1, 3))
    return sum(max(work[device, (device - step) % size] for device in range(size)) for step in range(size))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 5),
    st.integers(1, 4),
    st.sampled_from([CAUSAL, masks.Full(), masks.SlidingWindow(3), masks.Chunked(6), masks.SlidingWindow(9, 2)]),
)
def test_no_order_that_divides_waits_for_less(size, pieces, mask):
    length = 2 * size * pieces
    waited = {order: _waited(mask, length, size, order) for order in ("contiguous", *ORDERS)}
    best = min(("dual_chunk", "striped"), key=waited.__getitem__)
    chosen = choose_order(mask, length, size)
    assert chosen == (best if waited[best] <= 0.9 * waited["contiguous"] else "contiguous")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("causal", 8, 2), ShapeError, "choose_order takes a kernelry mask, got 'causal'"),
        ((CAUSAL, 8.0, 2), ArgumentError, "choose_order: length must be a positive integer, got 8.0"),
        ((CAUSAL, 8, 0), ArgumentError, "choose_order: size must be a positive integer, got 0"),
        ((CAUSAL, 9, 2), ShapeError, "9 does not divide .*9 % 2 = 1"),
    ],
)
def test_what_has_no_order_says_why(arguments, error, words):
    with pytest.raises(error, match=words):
        choose_order(*arguments)


@pytest.mark.parametrize(
    ("mask", "kv_len", "text", "order"),
    [
        (CAUSAL, 128, "sequence=c:4 order=auto", "dual_chunk"),
        (masks.SlidingWindow(31), 128, "sequence=c:4 order=auto", "contiguous"),
        (CAUSAL, 128, "sequence=c:2,u:2 ulysses=u usp order=auto", "dual_chunk"),
        (CAUSAL, 128, "sequence=c:4 ulysses order=auto", "contiguous"),
        (CAUSAL.at(query_offset=0), 256, "sequence=c:4 kv_sequence=none order=auto", "contiguous"),
    ],
)
def test_order_auto_is_chosen_where_mask_and_length_are_known(mask, kv_len, text, order):
    request = Request(q_len=128, kv_len=kv_len, q_heads=4, head_dim=8, mask=mask, sharding=text, target="cpu")
    assert kernelry.resolve(request).shards.shards.sharding.order == order
    assert "order=auto" in request.sharding


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sequence=c:2,d:2 native", "over one axis that cuts queries and keys alike, not by sharding=sequence=c:2,d:2"),
        ("sequence=c:4 kv_sequence=none native", "by ring or all_gather, over one axis"),
        ("sequence=c:4 native", "dot_product: context_parallel=ring:c:4 is not supported"),
    ],
)
def test_what_no_kernel_does_across_devices_itself_says_so(text, words):
    request = Request(q_len=128, q_heads=4, head_dim=8, mask=CAUSAL, sharding=text, target="cpu")
    with pytest.raises(NoKernelError, match=words):
        kernelry.resolve(request)
