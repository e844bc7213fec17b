"""AttentionOp, nnx and linen: settings, Flax's transforms, the choice of the kernel, dropout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import BLOCKWISE, B, F, N, T, Wrapped, array, close, kernels_of, oracle, qkv

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError, NoKernelError
from kernelry.flax import AttentionOp, CachedPart, Tokens, attention_op_as_linen
from kernelry.policy.policy import Policy
from kernelry.testing import reference_attention

pytestmark = [pytest.mark.versions, pytest.mark.xdist_group("flax")]

LOCAL = AttentionConfig(type="local_sliding", window=5)
DROPPING = AttentionConfig(dropout_rate=0.5)
CAUSAL = np.tril(np.ones((T, T), bool))


def requests_of(function, *arguments, **call):
    with kernelry.record() as resolutions:
        jax.eval_shape(functools.partial(function, **call), *arguments)
    return [resolution.request for resolution in resolutions]


def test_op_is_causal_unless_told_otherwise():
    def mask_of(*settings, **call):
        (request,) = requests_of(AttentionOp(*settings), *qkv(B), **call)
        return request.mask

    window = masks.SlidingWindow(2)
    assert mask_of() == masks.Causal().form
    assert mask_of(mask=window) == window.form
    for mask in (masks.Full(), window):
        (request,) = requests_of(AttentionOp(mask=mask), *qkv(B))
        assert request.mask == mask.form
    close(AttentionOp()(*qkv(B)), oracle(*qkv(B), CAUSAL))


def test_op_hands_every_setting_on():
    q, k, v = qkv(B)
    config = AttentionConfig(scale=0.4, soft_cap=3.0)
    op = AttentionOp(config, sink_heads=N)
    op.sinks[...] = array(N, seed=7)
    found = op(q, k, v, return_max_logits=True)
    settings = {"mask": masks.Dense(CAUSAL), "scale": 0.4, "soft_cap": 3.0, "sinks": array(N, seed=7)}
    want = reference_attention(q, k, v, **settings)
    close(found, (want.out, want.max_logits))


@pytest.mark.parametrize("cached", [False, True])
def test_what_the_config_asks_for_is_in_the_request(cached):
    q, k, v = qkv(B)
    op = AttentionOp(AttentionConfig(precision="highest", logits_dtype="bfloat16", scale=0.3, soft_cap=2.0))
    run = (lambda q, k, v: op(q, cached=CachedPart(k, v))) if cached else op
    (request,) = requests_of(run, q, k, v)
    assert (request.precision, request.logits_dtype) == ("highest", "bfloat16")
    assert (request.scale, request.soft_cap) == (0.3, 2.0)


def test_op_hands_every_argument_on():
    q, k, v = qkv(B)
    bias = array(1, N, T, T, seed=8)
    with kernelry.record() as resolutions:
        partial = AttentionOp()(q, k, v, bias=bias, mode="prefill", gradients=("query",), return_partial=True)
    close(partial.out, oracle(q, k, v, CAUSAL, bias=bias))
    request = resolutions[0].request
    assert request.mode is kernelry.Mode.PREFILL
    assert [operand.value for operand in request.gradients] == ["query"]


@functools.cache
def wrapped_gradients():
    """The gradients of a Wrapped by its parameters, from a function without modules."""
    module = Wrapped(sink_heads=N)
    q, k, v = qkv(B)

    def loss(kernel, bias, sinks):
        return (kernelry.attention(q @ kernel + bias, k, v, mask=masks.Causal(), sinks=sinks) ** 2).sum()

    parameters = module.project.kernel[...], jnp.zeros((1, 1, 1, 8)), module.attend.sinks[...]
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*parameters)


def test_op_under_nnx_jit_and_grad():
    q, k, v = qkv(B)
    module = Wrapped(sink_heads=N)

    def loss(module):
        return (module(q, k, v) ** 2).sum()

    got = nnx.jit(nnx.grad(loss))(module)
    close_to_wrapped(got)
    assert np.abs(got["attend"]["sinks"][...]).max() > 0


def test_op_under_nnx_remat():
    q, k, v = qkv(B)

    def loss(module):
        return (nnx.remat(lambda m, *arrays: m(*arrays))(module, q, k, v) ** 2).sum()

    close_to_wrapped(nnx.jit(nnx.grad(loss))(Wrapped(sink_heads=N)))


def close_to_wrapped(got):
    kernel, bias, sinks = wrapped_gradients()
    close(got["project"]["kernel"][...], kernel)
    close(got["project"]["bias"][...], bias[0, 0, 0])
    close(got["attend"]["sinks"][...], sinks)


def test_op_under_nnx_vmap_and_scan_over_layers():
    q, k, v = qkv(B)

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        module = Wrapped(sink_heads=N)
        module.attend.sinks[...] = jax.random.normal(key, (N,))
        return module

    layers = make(jax.random.split(jax.random.key(0), 3))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x, k, v)

    state = nnx.split(layers)
    want = q
    for place in range(3):
        layer = nnx.merge(state[0], jax.tree.map(lambda leaf, place=place: leaf[place], state[1]))
        want = layer(want, k, v)
    close(run(q, layers), want)


def test_op_with_a_mask_that_carries_arrays():
    q, k, v = qkv(B)
    ids = jnp.asarray(np.arange(T) // 5)
    mask = masks.Causal() & masks.Segments(ids)
    module = Wrapped(mask=mask)
    out = nnx.jit(lambda m: m(q, k, v))(module)
    close(out, module.attend(module.project(q), k, v, mask=mask))
    assert jax.tree.leaves(nnx.state(module, nnx.Param)) != []
    assert "mask" not in nnx.state(module, nnx.Param).get("attend", {})


def test_op_decodes_at_a_traced_offset():
    q, k, v = qkv(B)
    op = AttentionOp(LOCAL)
    whole = op(q, k, v)
    step = nnx.jit(lambda op, q, place: op(q, k, v, tokens=Tokens(query_offset=place), mode="decode"))
    for place in (0, 5, T - 1):
        close(step(op, q[:, place : place + 1], jnp.int32(place)), whole[:, place : place + 1])


def test_config_rules_choose_the_kernel():
    assert kernels_of(AttentionOp(), *qkv(B)) == ["dot_product"]
    assert kernels_of(AttentionOp(AttentionConfig(rules=(BLOCKWISE,))), *qkv(B)) == ["blockwise"]
    assert kernels_of(AttentionOp(AttentionConfig(kernel="blockwise")), *qkv(B)) == ["blockwise"]


def test_an_enclosing_policy_goes_before_the_config():
    op = AttentionOp(AttentionConfig(kernel="dot_product"))
    with kernelry.use(policy=Policy.shipped(rules=(BLOCKWISE,))):
        assert kernels_of(op, *qkv(B)) == ["blockwise"]
    with kernelry.use("blockwise"):
        assert kernels_of(op, *qkv(B)) == ["blockwise"]


def test_an_enclosing_policy_reaches_a_module_already_jitted():
    op, (q, k, v) = AttentionOp(), qkv(B)
    run = nnx.jit(lambda op, *arrays: op(*arrays))
    run(op, q, k, v)
    with kernelry.use(policy=Policy.shipped(rules=(BLOCKWISE,))), kernelry.record() as resolutions:
        run(op, q, k, v)
    assert [resolution.kernel for resolution in resolutions] == ["blockwise"]


def test_a_kernel_that_refuses_stops_the_trace():
    op = AttentionOp(AttentionConfig(kernel="blockwise", logits_dtype="bfloat16"))
    with pytest.raises(NoKernelError, match=r"blockwise: logits_dtype=bfloat16 is not supported"):
        jax.eval_shape(op, *qkv(B))


def test_op_drops_what_its_stream_says():
    q, k, v = qkv(B)
    op = AttentionOp(DROPPING, rngs=nnx.Rngs(dropout=3))
    run = nnx.jit(lambda op: op(q, k, v))
    assert not np.allclose(run(op), run(op))
    close(op(q, k, v, deterministic=True), AttentionOp()(q, k, v))
    keyed = functools.partial(op, q, k, v)
    close(keyed(rngs=jax.random.key(1)), keyed(rngs=jax.random.key(1)))
    close(keyed(rngs=nnx.Rngs(dropout=1)), keyed(rngs=nnx.Rngs(dropout=1).dropout))


def test_eval_turns_dropout_off():
    q, k, v = qkv(B)
    module = Wrapped(DROPPING, rngs=nnx.Rngs(0))
    module.eval()
    close(module(q, k, v), module(q, k, v))


def test_dropout_with_nothing_to_draw_from_is_refused():
    with pytest.raises(ArgumentError, match="nothing to draw from"):
        AttentionOp(DROPPING)(*qkv(B))


# The linen twin


def test_linen_twin_equals_the_nnx_module_forward_and_backward():
    q, k, v = qkv(B)
    sinks = array(N, seed=9)
    config = AttentionConfig(type="local_sliding", window=5, soft_cap=4.0)
    op = AttentionOp(config, sink_heads=N)
    op.sinks[...] = sinks
    twin = attention_op_as_linen(config, sink_heads=N)
    variables = twin.init(jax.random.key(0), q, k, v)
    np.testing.assert_array_equal(variables["params"]["sinks"], 0)
    grads = jax.grad(lambda p: (twin.apply({"params": p}, q, k, v) ** 2).sum())({"sinks": sinks})
    want = nnx.grad(lambda op: (op(q, k, v) ** 2).sum())(op)
    close(twin.apply({"params": {"sinks": sinks}}, q, k, v), op(q, k, v))
    close(grads["sinks"], want["sinks"][...])


def test_linen_twin_obeys_its_config_and_takes_call_arguments():
    q, k, v = qkv(B, q_len=1)
    twin = attention_op_as_linen(AttentionConfig(kernel="dot_product", rules=(BLOCKWISE,)))
    with kernelry.record() as resolutions:
        out = jax.jit(functools.partial(twin.apply, tokens=Tokens(query_offset=5), mode="decode"))({}, q, k, v)
    assert [(r.kernel, r.request.mode.value) for r in resolutions] == [("dot_product", "decode")]
    close(out, oracle(q, k, v, CAUSAL[5:6]))


def test_linen_twin_as_a_submodule():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((N, 8), name=name)(x) for name in "qkv")
            return attention_op_as_linen(sink_heads=N, name="attend")(q, k, v)

    variables = jax.eval_shape(Block().init, jax.random.key(0), array(B, T, F))
    assert variables["params"]["attend"]["sinks"].shape == (N,)


def test_linen_twin_draws_dropout_from_its_collection():
    q, k, v = qkv(B)
    twin = attention_op_as_linen(DROPPING)
    variables = twin.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, q, k, v)
    run = [twin.apply(variables, q, k, v, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)]
    close(run[0], run[1])
    assert not np.allclose(run[0], run[2])
    close(twin.apply(variables, q, k, v, deterministic=True), AttentionOp()(q, k, v))
