"""The compiled program is the kernel's own: nothing is added but names."""

import re

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import Request, masks
from kernelry.plugin import Inputs

pytestmark = pytest.mark.versions

B, T, N, K, H = 2, 16, 4, 2, 8
Q = jnp.ones((B, T, N, H))
KV = jnp.ones((B, T, K, H))
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(3),
    "packed": masks.Causal() & masks.Segments(jnp.zeros((B, T), jnp.int32)),
}


def _operations(lowered):
    """The program without what only names things."""
    text = lowered.as_text()
    text = re.sub(r"module @\S+", "module", text)
    text = re.sub(r"loc\(.*?\)|#loc.*|jax\.result_info = \"[^\"]*\"", "", text)
    return re.sub(r"\s+", " ", text)


def _direct(mask, mode, name="dot_product"):
    request = Request(batch=B, q_len=T, q_heads=N, kv_heads=K, head_dim=H, mask=mask, mode=mode)
    spec = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == name)

    def call(q, k, v, mask):
        inputs = Inputs(q, k, v, mask.canonical())
        return spec.body().forward(inputs, request, spec.tilings(request)[0], statistics=False).out

    return call


def _ours(mode, kernel="dot_product"):
    return lambda q, k, v, mask: kernelry.attention(q, k, v, mask=mask, mode=mode, kernel=kernel)


@pytest.mark.parametrize("mode", ["train", "prefill"])
@pytest.mark.parametrize("name", MASKS)
def test_lowered_program_equals_the_direct_call(name, mode):
    arguments = (Q, KV, KV, MASKS[name])
    ours, direct = (jax.jit(f).lower(*arguments) for f in (_ours(mode), _direct(MASKS[name], mode)))
    assert "dot_general" in _operations(ours)
    assert _operations(ours) == _operations(direct)


@pytest.mark.parametrize("name", MASKS)
def test_lowered_gradient_equals_that_of_the_direct_call(name):
    def gradient(call):
        return jax.jit(jax.grad(lambda q, k, v, mask: call(q, k, v, mask).sum(), argnums=(0, 1, 2)))

    arguments = (Q, KV, KV, MASKS[name])
    ours, direct = (gradient(f).lower(*arguments) for f in (_ours("train"), _direct(MASKS[name], "train")))
    assert _operations(ours) == _operations(direct)


@pytest.mark.parametrize("name", MASKS)
def test_a_gradient_by_backward_multiplies_as_often_as_forward_and_backward_do(name):
    request = Request(batch=B, q_len=T, q_heads=N, kv_heads=K, head_dim=H, mask=MASKS[name])
    spec = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "blockwise")
    body, tiling = spec.body(), spec.tilings(request)[0]

    def direct(q, k, v, mask):
        inputs = Inputs(q, k, v, mask.canonical())
        found = body.forward(inputs, request, tiling, statistics=True)
        shares = body.backward(inputs, request, tiling, found.out, found.lse, found.out, None)
        return shares.query, shares.key, shares.value

    ours = jax.grad(lambda *arguments: _ours("train", "blockwise")(*arguments).sum(), argnums=(0, 1, 2))
    programs = [_operations(jax.jit(f).lower(Q, KV, KV, MASKS[name])) for f in (ours, direct)]
    for work in ("dot_general", "stablehlo.while", "stablehlo.exponential"):
        # The cotangents times exp(−rest) are one exponential of B N T more.
        assert programs[0].count(work) == programs[1].count(work) + (work == "stablehlo.exponential"), work


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
@pytest.mark.parametrize("options", [{}, {"bias": jnp.ones((1, 1, T, T))}, {"soft_cap": 3.0}], ids=str)
def test_the_order_of_cap_and_bias_costs_nothing_without_both(options, kernel):
    def gradient(**more):
        def loss(q, k, v):
            return kernelry.attention(q, k, v, mask=masks.Causal(), kernel=kernel, **options, **more).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(Q, KV, KV)

    assert _operations(gradient(bias_after_cap=True)) == _operations(gradient())


def test_names_and_locations_are_all_that_is_stripped():
    one, other = (jax.jit(f).lower(Q) for f in (lambda q: q + 1, lambda q: q + 2))
    assert _operations(one) != _operations(other)


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_work_shows_under_the_kernels_name(kernel):
    call = jax.jit(lambda q, k: kernelry.attention(q, k, k, mask=masks.Causal(), kernel=kernel))
    assert f"kernelry.{kernel}" in call.lower(Q, KV).as_text(debug_info=True)
    assert f"kernelry.{kernel}" in call.lower(Q, KV).compile().as_text()


def test_static_masks_put_no_dense_constant_into_the_program():
    text = jax.jit(_ours("train")).lower(Q, KV, KV, masks.SlidingWindow(3)).as_text()
    assert not re.search(rf"constant dense<\"0x[0-9A-F]+\"> : tensor<[0-9x]*{T}x{T}xi1>", text)


def test_blockwise_memory_does_not_grow_with_the_square_of_the_length():
    def temporary(kernel, length):
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        call = jax.grad(lambda q: kernelry.attention(q, q, q, mask=masks.SlidingWindow(32), kernel=kernel).sum())
        return jax.jit(call).lower(q).compile().memory_analysis().temp_size_in_bytes

    assert temporary("blockwise", 2048) < temporary("dot_product", 2048) / 8
    assert temporary("blockwise", 2048) < 3 * temporary("blockwise", 1024)
