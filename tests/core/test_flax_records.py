"""What AttentionOp leaves behind: sinks, recorded max logits, the remat name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import B, N, T, Wrapped, array, close, oracle, qkv
from jax.ad_checkpoint import print_saved_residuals

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig, from_maxtext
from kernelry.errors import ArgumentError
from kernelry.flax import AttentionOp, attention_op_as_linen
from kernelry.testing import reference_attention

pytestmark = [pytest.mark.versions, pytest.mark.xdist_group("flax")]

RECORDING = AttentionConfig(record_max_logits=True)
CAUSAL = np.tril(np.ones((T, T), bool))


def top_logits(q, k, v):
    dense = masks.Dense(CAUSAL)
    return reference_attention(q, k, v, mask=dense).max_logits


# Sinks


def test_sinks_of_the_module_or_of_the_call_join_the_denominator():
    q, k, v = qkv(B)
    sinks = array(N, seed=9)
    want = oracle(q, k, v, CAUSAL, sinks=sinks)
    for config in (AttentionConfig(), AttentionConfig(sinks=True)):
        op = AttentionOp(config, sink_heads=N)
        op.sinks[...] = sinks
        close(op(q, k, v), want)
        close(AttentionOp(config)(q, k, v, sinks=sinks), want)


def test_sinks_have_a_gradient_from_the_module_and_from_the_call():
    q, k, v = qkv(B)
    sinks = array(N, seed=9)
    op = AttentionOp(sink_heads=N)
    op.sinks[...] = sinks
    own = nnx.grad(lambda op: jnp.sin(op(q, k, v)).sum())(op)["sinks"][...]
    given = jax.grad(lambda sinks: jnp.sin(AttentionOp()(q, k, v, sinks=sinks)).sum())(sinks)
    # Central differences of the float64 oracle.
    value = lambda shift: np.sin(oracle(q, k, v, CAUSAL, sinks=np.float64(sinks) + shift)).sum()  # noqa: E731
    want = np.array([(value(step) - value(-step)) / 2e-3 for step in 1e-3 * np.eye(N)])
    close(own, want, 1e-3)
    close(given, want, 1e-3)


def test_sinks_that_the_config_demands_and_nobody_gives_are_missed():
    op = AttentionOp(AttentionConfig(sinks=True))
    with pytest.raises(ArgumentError, match=r"sink_heads=.*or pass sinks="):
        op(*qkv(B))
    assert op(*qkv(B), return_partial=True).has_statistics  # they join in finalize


def test_sinks_given_twice_are_refused():
    with pytest.raises(ArgumentError, match="leave one of them out"):
        AttentionOp(sink_heads=N)(*qkv(B), sinks=array(N))


def test_sinks_with_a_partial_are_refused():
    with pytest.raises(ArgumentError, match=r"pass them to kernelry.finalize"):
        AttentionOp(sink_heads=N)(*qkv(B), return_partial=True)


# Recorded max logits


def intermediates(module):
    return jax.tree.leaves(nnx.pop(module, nnx.Intermediate))


def test_nothing_is_recorded_unless_the_config_says_so():
    module = Wrapped()
    module(*qkv(B), return_max_logits=True)
    assert intermediates(module) == []


@pytest.mark.parametrize("jitted", [False, True])
def test_max_logits_are_recorded_in_a_training_step(jitted):
    q, k, v = qkv(B)
    module = Wrapped(RECORDING)

    def step(module):
        return nnx.value_and_grad(lambda module: (module(q, k, v) ** 2).sum())(module)

    for _ in range(2):
        loss, _ = (nnx.jit(step) if jitted else step)(module)
        assert np.isfinite(loss)
        (recorded,) = intermediates(module)
        close(recorded, top_logits(module.project(q), k, v))


def test_recording_does_not_change_what_a_call_returns():
    q, k, v = qkv(B)
    want = oracle(q, k, v, CAUSAL)
    close(AttentionOp(RECORDING)(q, k, v), want)
    out, top = AttentionOp(RECORDING)(q, k, v, return_max_logits=True)
    close((out, top), (want, top_logits(q, k, v)))
    partial = AttentionOp(RECORDING)(q, k, v, return_partial=True)
    close(kernelry.finalize(partial), want)


def test_recording_does_not_change_gradients():
    q, k, v = qkv(B)
    got, want = (
        nnx.grad(lambda module: (module(q, k, v) ** 2).sum())(Wrapped(config))
        for config in (RECORDING, AttentionConfig())
    )
    close(nnx.to_pure_dict(got), nnx.to_pure_dict(want))


def test_repeated_calls_append():
    q, k, v = qkv(B)
    op = AttentionOp(RECORDING)
    op(q, k, v)
    op(2 * q, k, v)
    first, second = op.max_logits.get_value()
    close((first, second), (top_logits(q, k, v), top_logits(2 * q, k, v)))


def test_capture_collects_what_is_recorded():
    q, k, v = qkv(B)
    _, captured = nnx.capture(AttentionOp(RECORDING), nnx.Intermediate)(q, k, v)
    (recorded,) = jax.tree.leaves(captured)
    close(recorded, top_logits(q, k, v))


def test_recording_under_remat_and_scan_over_layers():
    q, k, v = qkv(B)
    module = Wrapped(RECORDING)
    nnx.grad(lambda m: nnx.remat(lambda m, *arrays: m(*arrays))(m, q, k, v).sum())(module)
    (recorded,) = intermediates(module)
    close(recorded, top_logits(module.project(q), k, v))
    layers = nnx.vmap(lambda _: Wrapped(RECORDING), in_axes=0, out_axes=0)(jnp.arange(3))
    nnx.scan(lambda x, layer: layer(x, k, v), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(q, layers)
    (recorded,) = intermediates(layers)
    assert recorded.shape == (3, B, N)
    close(recorded[0], top_logits(module.project(q), k, v))


def test_linen_keeps_what_is_recorded_among_the_intermediates():
    q, k, v = qkv(B)

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, q, k, v):
            attend = attention_op_as_linen(RECORDING, name="attend")
            return attend(q, k, v)

    variables = Twice().init(jax.random.key(0), q, k, v)
    assert "intermediates" not in variables
    close(Twice().apply(variables, q, k, v), oracle(q, k, v, CAUSAL))
    run = jax.jit(functools.partial(Twice().apply, mutable=["intermediates"]))
    _, changed = run(variables, q, k, v)
    (recorded,) = changed["intermediates"]["attend"]["max_logits"]
    close(recorded, top_logits(q, k, v))


# The remat name


def loss(q, k, v, w, op, **call):
    """Squares on both sides, so that the backward pass needs what is in between."""
    out = op(q * w, k, v, **call)
    out = kernelry.finalize(out) if isinstance(out, kernelry.Partial) else out
    return (jnp.sin(out) * w).sum()


@pytest.mark.parametrize("call", [{}, {"return_partial": True}])
def test_context_is_the_name_that_a_policy_saves(call, capsys):
    arguments = (*qkv(B), jnp.float32(1.3))
    run = functools.partial(loss, op=AttentionOp(), **call)
    policy = jax.checkpoint_policies.save_only_these_names("context")
    print_saved_residuals(jax.checkpoint(run, policy=policy), *arguments)
    saved = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    assert len(saved) == 1
    assert "'context'" in saved[0]
    assert f"f32[{B},{T},{N},8]" in saved[0]


def test_rematerialisation_by_name_changes_nothing():
    arguments = (*qkv(B), jnp.float32(1.3))
    run = functools.partial(loss, op=AttentionOp())
    policy = jax.checkpoint_policies.save_only_these_names("context")
    value_and_grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    close(value_and_grad(jax.checkpoint(run, policy=policy))(*arguments), value_and_grad(run)(*arguments))


# Options of a base.yml


def test_a_config_from_maxtext_reaches_the_kernel():
    q, k, v = qkv(B)
    options = {"attention_type": "local_sliding", "sliding_window_size": 4, "attn_logits_soft_cap": 3.0}
    op = AttentionOp(from_maxtext(options), mask=None)
    window = CAUSAL & ~np.tril(np.ones((T, T), bool), -4)
    close(op(q, k, v), oracle(q, k, v, window, soft_cap=3.0, scale=op.config.scale))
