"""Sequences over a mesh axis: what a call says of them, and the orders in which their tokens stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelry
from kernelry.errors import ArgumentError, KernelRefusedError
from kernelry.parallel import ContextParallel, load_balanced_order, reorder_for_load_balance, undo_reorder
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
