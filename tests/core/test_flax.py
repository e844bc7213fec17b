"""The Flax front ends against Flax's own attention."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError, NoKernelError, ShapeError
from kernelry.flax import AttentionOp, attention_fn, attention_op_as_linen
from kernelry.policy import Condition, Policy, Rule

B, T, F, N = 2, 12, 32, 4
BLOCKWISE = Rule(Condition(), ("blockwise",))


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(*batch, q_len=T, kv_len=T, kv_heads=N, dtype=jnp.float32):
    shapes = (q_len, N), (kv_len, kv_heads), (kv_len, kv_heads)
    return [array(*batch, *shape, 8, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def visible_array(*shape):
    """Random booleans in which every query sees itself."""
    return jnp.asarray((np.random.default_rng(5).random(shape) > 0.5) | np.eye(T, dtype=bool))


def close(got, want, tolerance=2e-5):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance), got, want)


def padding_mask():
    lengths = np.array([[7], [12]])
    return nnx.make_attention_mask(jnp.ones((B, T)), jnp.asarray(np.arange(T) < lengths))


CAUSAL = nnx.make_causal_mask(jnp.ones((B, T)))
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "padding": padding_mask(),
    "both": nnx.combine_masks(CAUSAL, padding_mask()),
    "boolean": CAUSAL > 0,
}


def nnx_mha(attention_fn=nnx.dot_product_attention, **settings):
    settings = {"decode": False, **settings}
    return nnx.MultiHeadAttention(N, F, attention_fn=attention_fn, rngs=nnx.Rngs(0), **settings)


def linen_mha(attention_fn=nn.dot_product_attention, **settings):
    return nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=attention_fn, **settings)


def nnx_value_and_grad(module, inputs, **call):
    loss = nnx.value_and_grad(lambda m, x: (m(x, **call) ** 2).sum(), argnums=(0, 1))
    return nnx.jit(loss)(module, inputs)


def linen_value_and_grad(module, inputs, **call):
    variables = linen_mha().init(jax.random.key(0), inputs)
    loss = jax.value_and_grad(lambda v, x: (module.apply(v, x, **call) ** 2).sum(), argnums=(0, 1))
    return jax.jit(loss)(variables, inputs)


# attention_fn inside Flax's modules


@pytest.mark.parametrize(("mask", "kv_heads"), [*((name, N) for name in MASKS), ("both", 2), ("causal", 1)])
def test_nnx_mha_agrees_with_flax_forward_and_backward(mask, kv_heads):
    inputs = array(B, T, F)
    got = nnx_value_and_grad(nnx_mha(attention_fn, num_kv_heads=kv_heads), inputs, mask=MASKS[mask])
    want = nnx_value_and_grad(nnx_mha(num_kv_heads=kv_heads), inputs, mask=MASKS[mask])
    close(got, want, 1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_linen_mha_agrees_with_flax_forward_and_backward(mask):
    inputs = array(B, T, F)
    got = linen_value_and_grad(linen_mha(attention_fn), inputs, mask=MASKS[mask])
    close(got, linen_value_and_grad(linen_mha(), inputs, mask=MASKS[mask]), 1e-4)


def test_is_causal_agrees_with_flax():
    inputs = array(B, T, F)
    got = nnx_mha(attention_fn)(inputs, is_causal=True, mask=padding_mask())
    close(got, nnx_mha()(inputs, is_causal=True, mask=padding_mask()))


def test_nnx_mha_accepts_a_kernelry_mask():
    inputs = array(B, T, F)
    close(nnx_mha(attention_fn)(inputs, mask=masks.Causal()), nnx_mha()(inputs, mask=CAUSAL))


@pytest.mark.parametrize("make", [nnx_mha, linen_mha])
def test_what_a_partial_binds_survives_flax(make):
    """linen inspects the signature of the partial, and both hand it mask=None."""
    bound = functools.partial(attention_fn, layer_mask=masks.SlidingWindow(3), kernel="blockwise", mode="prefill")
    module, inputs = make(bound), array(B, T, F)
    with kernelry.record() as resolutions:
        module(inputs) if make is nnx_mha else module.init(jax.random.key(0), inputs)
    request = resolutions[0].request
    assert (resolutions[0].kernel, str(request.mode.value)) == ("blockwise", "prefill")
    assert request.mask == masks.SlidingWindow(3).form


def test_nnx_mha_decode_cache_agrees_with_flax():
    inputs = array(B, T, F)
    ours, theirs = nnx_mha(functools.partial(attention_fn, mode="decode"), decode=True), nnx_mha(decode=True)
    for module in (ours, theirs):
        module.init_cache(inputs.shape)
    for place in range(T):
        close(ours(inputs[:, place : place + 1]), theirs(inputs[:, place : place + 1]))


def test_linen_mha_decode_cache_agrees_with_flax():
    inputs = array(B, T, F)
    ours, theirs = linen_mha(functools.partial(attention_fn, mode="decode"), decode=True), linen_mha(decode=True)
    variables = theirs.init(jax.random.key(0), inputs)
    cache = {"ours": variables["cache"], "theirs": variables["cache"]}
    for place in range(T):
        out = {}
        for name, module in (("ours", ours), ("theirs", theirs)):
            out[name], changed = module.apply(
                {"params": variables["params"], "cache": cache[name]},
                inputs[:, place : place + 1],
                mutable=["cache"],
            )
            cache[name] = changed["cache"]
        close(out["ours"], out["theirs"])


# attention_fn called directly


@pytest.mark.parametrize(
    ("batch", "mask_batch"),
    [((), ()), ((3,), (1,)), ((2, 3), ()), ((2, 3), (2, 1)), ((2, 3), (2, 3)), ((2, 1, 3), (1, 1, 3))],
)
def test_any_number_of_batch_dimensions(batch, mask_batch):
    q, k, v = qkv(*batch)
    visible, bias = visible_array(*mask_batch, 1, T, T), array(*mask_batch, 1, T, T, seed=6)
    full = (*batch, N, T, T)
    got = jax.jit(attention_fn)(q, k, v, bias, visible)
    want = jax.jit(nn.dot_product_attention)(q, k, v, jnp.broadcast_to(bias, full), jnp.broadcast_to(visible, full))
    close(got, want)


def test_a_mask_per_head_is_folded_with_its_heads():
    q, k, v = qkv(2, 3)
    visible = visible_array(2, 3, N, T, T)
    close(attention_fn(q, k, v, mask=visible), nn.dot_product_attention(q, k, v, mask=visible))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_casts_query_key_and_value(dtype):
    with kernelry.record() as resolutions:
        out = attention_fn(*qkv(B), dtype=dtype)
    assert out.dtype == dtype
    assert resolutions[0].request.dtype == np.dtype(dtype).name


def test_without_dtype_query_key_and_value_are_promoted():
    q, k, v = qkv(B)
    assert attention_fn(q.astype(jnp.bfloat16), k, v).dtype == jnp.float32


def test_precision_reaches_the_request():
    with kernelry.record() as resolutions:
        attention_fn(*qkv(B), precision="highest")
    assert resolutions[0].request.precision == "highest"


def test_a_fully_masked_row_is_zero():
    out = attention_fn(*qkv(B), mask=jnp.zeros((1, 1, T, T), bool))
    np.testing.assert_array_equal(out, 0)


def test_integer_and_float_masks_mean_their_positive_entries():
    q, k, v = qkv(B)
    for dtype in (jnp.int32, jnp.float32, jnp.bool_):
        close(attention_fn(q, k, v, mask=CAUSAL.astype(dtype)), attention_fn(q, k, v, is_causal=True))


def test_sinks_and_soft_cap_are_bound_by_partial():
    sinks = array(N)
    q, k, v = qkv(B)
    out = functools.partial(attention_fn, sinks=sinks, soft_cap=5.0, scale=0.3)(q, k, v)
    close(out, kernelry.attention(q, k, v, sinks=sinks, soft_cap=5.0, scale=0.3))


# Dropout


def test_dropout_is_drawn_from_the_key():
    q, k, v = qkv(B)
    drop = functools.partial(attention_fn, q, k, v, dropout_rate=0.5, broadcast_dropout=False)
    first = drop(dropout_rng=jax.random.key(1))
    close(first, kernelry.attention(q, k, v, dropout_rate=0.5, dropout_rng=jax.random.key(1)))
    assert not np.allclose(first, drop(dropout_rng=jax.random.key(2)))


def test_deterministic_means_no_dropout():
    q, k, v = qkv(B)
    got = attention_fn(q, k, v, dropout_rate=0.5, deterministic=True, dropout_rng=jax.random.key(1))
    close(got, attention_fn(q, k, v))


def test_dropout_inside_nnx_mha():
    module = nnx_mha(attention_fn, dropout_rate=0.5, broadcast_dropout=False)
    inputs = array(B, T, F)
    assert not np.allclose(module(inputs, deterministic=False), module(inputs, deterministic=False))
    close(module(inputs, deterministic=True), nnx_mha()(inputs))


def test_dropout_inside_linen_mha():
    module = linen_mha(attention_fn, dropout_rate=0.5, broadcast_dropout=False)
    inputs = array(B, T, F)
    variables = linen_mha().init(jax.random.key(0), inputs)
    run = functools.partial(module.apply, variables, inputs)
    dropped = run(deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(dropped, run(deterministic=True))
    close(run(deterministic=True), linen_mha().apply(variables, inputs))


def test_active_dropout_without_a_key_is_refused():
    with pytest.raises(ArgumentError, match="needs dropout_rng="):
        attention_fn(*qkv(B), dropout_rate=0.5, broadcast_dropout=False)


@pytest.mark.parametrize("make", [nnx_mha, linen_mha])
def test_broadcast_dropout_is_refused_where_dropout_is_active(make):
    module, inputs = make(attention_fn, dropout_rate=0.5), array(B, T, F)
    if make is linen_mha:
        variables = linen_mha().init(jax.random.key(0), inputs)
        module = functools.partial(module.apply, variables, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(ArgumentError, match="build the module with broadcast_dropout=False"):
        module(inputs, deterministic=False)
    module(inputs, deterministic=True)


# What is refused


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("module", "leave it False"),
        ("input_positions", "dot_product_attention_with_rope"),
        ("einsum_dot_general", "use precision="),
        ("qk_attn_weights_einsum", "leave qk_attn_weights_einsum_cls None"),
        ("attn_weights_value_einsum", "leave attn_weights_value_einsum_cls None"),
    ],
)
def test_what_no_kernel_can_honour_is_refused(name, advice):
    with pytest.raises(ArgumentError, match=rf"attention_fn got {name}=.*{advice}"):
        attention_fn(*qkv(B), **{name: jnp.arange(T)})


def test_nnx_sow_weights_is_refused():
    with pytest.raises(ArgumentError, match="sow_weights"):
        nnx_mha(attention_fn)(array(B, T, F), sow_weights=True)


def test_linen_sow_weights_is_refused():
    with pytest.raises(ArgumentError, match="sow_weights"):
        linen_mha(attention_fn).init(jax.random.key(0), array(B, T, F), sow_weights=True)


def test_linen_custom_einsum_is_refused():
    module = linen_mha(
        attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(ArgumentError, match="qk_attn_weights_einsum"):
        module.init(jax.random.key(0), array(B, T, F))


def test_linen_force_fp32_for_softmax_is_the_case_anyway():
    inputs = array(B, T, F)
    variables = linen_mha().init(jax.random.key(0), inputs)
    settings = {"dtype": jnp.bfloat16, "force_fp32_for_softmax": True}
    got = linen_mha(attention_fn, **settings).apply(variables, inputs)
    want = linen_mha(**settings).apply(variables, inputs)
    close(np.float32(got), np.float32(want), 5e-2)


def test_two_precisions_are_refused():
    with pytest.raises(ArgumentError, match="one precision for both"):
        attention_fn(*qkv(B), precision=("high", "default"))


def test_is_causal_with_unequal_lengths_is_refused():
    with pytest.raises(ShapeError, match=r"layer_mask=masks.Causal\(\).at\(query_offset=11\)"):
        attention_fn(*qkv(B, q_len=1), is_causal=True)


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword"):
        attention_fn(*qkv(B), window=3)


@pytest.mark.parametrize("shape", [(3, 1, T, T), (1, 1, 1, 1, T, T)])
def test_a_mask_that_does_not_broadcast_is_refused(shape):
    with pytest.raises(ShapeError, match="mask must broadcast to"):
        attention_fn(*qkv(B), mask=jnp.ones(shape))


def test_different_batches_are_refused():
    q, k, v = qkv(B)
    with pytest.raises(ShapeError, match="got value of shape"):
        attention_fn(q, k, v[:1])
    with pytest.raises(ShapeError, match="got query of shape"):
        attention_fn(q[0, 0], k, v)


def test_without_flax_the_import_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("kernelry.flax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"pip install 'kernelry\[flax\]'"):
        import kernelry.flax  # noqa: F401


# AttentionOp


class Wrapped(nnx.Module):
    def __init__(self, **settings):
        self.project = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.attend = AttentionOp(**settings)

    def __call__(self, q, k, v, **call):
        return self.attend(self.project(q), k, v, **call)


def kernels_of(function, *arguments, **call):
    with kernelry.record() as resolutions:
        jax.eval_shape(functools.partial(function, **call), *arguments)
    return [resolution.kernel for resolution in resolutions]


def test_op_is_causal_unless_told_otherwise():
    q, k, v = qkv(B)
    close(AttentionOp()(q, k, v), kernelry.attention(q, k, v, mask=masks.Causal()))
    close(AttentionOp(mask=masks.Full())(q, k, v), kernelry.attention(q, k, v))
    close(AttentionOp()(q, k, v, mask=masks.SlidingWindow(2)), AttentionOp(mask=masks.SlidingWindow(2))(q, k, v))


def test_op_hands_every_setting_on():
    q, k, v = qkv(B)
    op = AttentionOp(scale=0.4, soft_cap=3.0, sink_heads=N)
    op.sinks[...] = array(N, seed=7)
    out, top = op(q, k, v, return_max_logits=True)
    settings = {"mask": masks.Causal(), "scale": 0.4, "soft_cap": 3.0, "sinks": array(N, seed=7)}
    want, want_top = kernelry.attention(q, k, v, return_max_logits=True, **settings)
    close((out, top), (want, want_top))


def test_op_hands_every_argument_on():
    q, k, v = qkv(B)
    bias = array(1, N, T, T, seed=8)
    with kernelry.record() as resolutions:
        partial = AttentionOp()(q, k, v, bias=bias, mode="prefill", gradients=("query",), return_partial=True)
    close(partial.out, kernelry.attention(q, k, v, mask=masks.Causal(), bias=bias))
    request = resolutions[0].request
    assert request.mode is kernelry.Mode.PREFILL
    assert [operand.value for operand in request.gradients] == ["query"]


def test_op_under_nnx_jit_and_grad():
    q, k, v = qkv(B)
    module = Wrapped(sink_heads=N)

    def loss(module):
        return (module(q, k, v) ** 2).sum()

    eager, jitted = nnx.grad(loss)(module), nnx.jit(nnx.grad(loss))(module)
    close(jitted, eager)
    assert np.abs(eager["attend"]["sinks"][...]).max() > 0


def test_op_under_nnx_remat():
    q, k, v = qkv(B)
    module = Wrapped()

    def loss(module, run):
        return (run(module, q, k, v) ** 2).sum()

    plain = nnx.grad(loss)(module, lambda m, *arrays: m(*arrays))
    rematerialised = nnx.grad(loss)(module, nnx.remat(lambda m, *arrays: m(*arrays)))
    close(rematerialised, plain)


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
    op = AttentionOp(mask=masks.SlidingWindow(4))
    whole = op(q, k, v)
    step = nnx.jit(lambda op, q, place: op(q, k, v, mask=op.mask.at(query_offset=place), mode="decode"))
    for place in (0, 5, T - 1):
        close(step(op, q[:, place : place + 1], jnp.int32(place)), whole[:, place : place + 1])


def test_config_rules_choose_the_kernel():
    assert kernels_of(AttentionOp(), *qkv(B)) == ["dot_product"]
    assert kernels_of(AttentionOp(AttentionConfig(rules=(BLOCKWISE,))), *qkv(B)) == ["blockwise"]
    assert kernels_of(AttentionOp(AttentionConfig(kernel="blockwise")), *qkv(B)) == ["blockwise"]
    assert kernels_of(attention_fn, *qkv(B), config=AttentionConfig(kernel="blockwise")) == ["blockwise"]


def test_the_kernel_setting_goes_before_the_config():
    op = AttentionOp(AttentionConfig(kernel="blockwise"), kernel="dot_product")
    assert kernels_of(op, *qkv(B)) == ["dot_product"]


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
    op = AttentionOp(AttentionConfig(kernel="blockwise"))
    with pytest.raises(NoKernelError, match=r"blockwise: bias=.* is not supported"):
        jax.eval_shape(functools.partial(op, bias=jnp.zeros((1, 1, T, T))), *qkv(B))


def test_op_drops_what_its_stream_says():
    q, k, v = qkv(B)
    op = AttentionOp(dropout_rate=0.5, rngs=nnx.Rngs(dropout=3))
    run = nnx.jit(lambda op: op(q, k, v))
    assert not np.allclose(run(op), run(op))
    close(op(q, k, v, deterministic=True), AttentionOp()(q, k, v))
    keyed = functools.partial(op, q, k, v)
    close(keyed(rngs=jax.random.key(1)), keyed(rngs=jax.random.key(1)))
    close(keyed(rngs=nnx.Rngs(dropout=1)), keyed(rngs=nnx.Rngs(dropout=1).dropout))


def test_eval_turns_dropout_off():
    q, k, v = qkv(B)
    module = Wrapped(dropout_rate=0.5, rngs=nnx.Rngs(0))
    module.eval()
    close(module(q, k, v), module(q, k, v))


def test_dropout_with_nothing_to_draw_from_is_refused():
    with pytest.raises(ArgumentError, match="nothing to draw from"):
        AttentionOp(dropout_rate=0.5)(*qkv(B))


# The linen twin


def test_linen_twin_equals_the_nnx_module_forward_and_backward():
    q, k, v = qkv(B)
    sinks = array(N, seed=9)
    op = AttentionOp(mask=masks.SlidingWindow(4), sink_heads=N, soft_cap=4.0)
    op.sinks[...] = sinks
    twin = attention_op_as_linen(mask=masks.SlidingWindow(4), sink_heads=N, soft_cap=4.0)
    variables = twin.init(jax.random.key(0), q, k, v)
    np.testing.assert_array_equal(variables["params"]["sinks"], 0)
    grads = jax.grad(lambda p: (twin.apply({"params": p}, q, k, v) ** 2).sum())({"sinks": sinks})
    want = nnx.grad(lambda op: (op(q, k, v) ** 2).sum())(op)
    close(twin.apply({"params": {"sinks": sinks}}, q, k, v), op(q, k, v))
    close(grads["sinks"], want["sinks"][...])


def test_linen_twin_obeys_its_config_and_takes_call_arguments():
    q, k, v = qkv(B, q_len=1)
    twin = attention_op_as_linen(AttentionConfig(rules=(BLOCKWISE,)), kernel="dot_product")
    with kernelry.record() as resolutions:
        out = twin.apply({}, q, k, v, mask=masks.Causal().at(query_offset=5), mode="decode")
    assert [(r.kernel, r.request.mode.value) for r in resolutions] == [("dot_product", "decode")]
    close(out, kernelry.attention(q, k, v, mask=masks.Causal().at(query_offset=5)))


def test_linen_twin_as_a_submodule():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((N, 8), name=name)(x) for name in "qkv")
            return attention_op_as_linen(sink_heads=N, name="attend")(q, k, v)

    variables = Block().init(jax.random.key(0), array(B, T, F))
    assert variables["params"]["attend"]["sinks"].shape == (N,)


def test_linen_twin_draws_dropout_from_its_collection():
    q, k, v = qkv(B)
    twin = attention_op_as_linen(dropout_rate=0.5)
    variables = twin.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, q, k, v)
    run = [twin.apply(variables, q, k, v, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)]
    close(run[0], run[1])
    assert not np.allclose(run[0], run[2])
    close(twin.apply(variables, q, k, v, deterministic=True), AttentionOp()(q, k, v))
