"""What the tests of cudnn_te share: its spec for float32, arrays, and the comparison with dot_product.

Needs `transformer_engine_on_cpu.register()`; the target is a GPU by name, so that vendors are assumed and nothing is
probed, and what was traced runs on the CPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import kernelry
from kernelry import masks
from kernelry_cudnn_te.cudnn_te.spec import CUDNN_TE

TARGET = "gpu:h100"
IN_FLOAT32 = dataclasses.replace(
    CUDNN_TE,
    name="cudnn_te_in_float32",
    capabilities=dataclasses.replace(CUDNN_TE.capabilities, dtypes=frozenset({"float32"})),
)
"""transformer-engine's Python has nothing against float32, and rounding would hide a wrong argument."""

LENGTH = 32
IDS = np.repeat([[0, 0, 4, 2], [3, 3, -1, 5]], LENGTH // 4, axis=1).astype(np.int32)

MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(5),
    "window ahead": masks.SlidingWindow(5, 3),
    "lengths": masks.Lengths(jnp.asarray([5, 0])),
    "lengths of both": masks.Lengths(jnp.asarray([5, 9]), jnp.asarray([7, 30])),
    "causal, lengths": masks.Causal() & masks.Lengths(jnp.asarray([5, 32])),
    "window, lengths": masks.SlidingWindow(4) & masks.Lengths(jnp.asarray([5, 0])),
    "packed": masks.Segments(jnp.asarray(IDS)),
    "causal, packed": masks.Causal() & masks.Segments(jnp.asarray(IDS)),
    "window, packed": masks.SlidingWindow(5) & masks.Segments(jnp.asarray(IDS)),
}


def arrays(q_len=LENGTH, kv_len=None, *, heads=4, kv_heads=2, head_dim=16, value_dim=None, batch=2, dtype="float32"):
    """query, key, value and a cotangent of the output."""
    rng = np.random.default_rng(0)
    kv_len, value_dim = kv_len or q_len, value_dim or head_dim
    shapes = ((batch, q_len, heads, head_dim), (batch, kv_len, kv_heads, head_dim))
    shapes += ((batch, kv_len, kv_heads, value_dim), (batch, q_len, heads, value_dim))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def results(kernel, operands, d_out, **options):
    """All that a call returns, and the gradients of its operands; bias and sinks among the options are operands, too.

    Of a Partial, the lse is differentiated with the output.
    """
    named = [name for name in ("bias", "sinks") if name in options]

    def loss(*operands):
        extra = dict(zip(named, operands[3:], strict=True))
        found = kernelry.attention(*operands[:3], kernel=kernel, **{**options, **extra})
        found, largest = found if options.get("return_max_logits") else (found, None)
        out = kernelry.finalize(found) if options.get("return_partial") else found
        total = (out.astype(jnp.float32) * d_out).sum()
        lse = None
        if options.get("return_partial"):
            lse = found.lse
            total += jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum()
        return total, (out, lse, largest)

    operands = (*operands, *(options[name] for name in named))
    (_, found), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(operands))), has_aux=True))(*operands)
    return found, gradients


def check(given=None, **options):
    """Compares cudnn_te with dot_product, outputs and gradients; returns the adapters that it took."""
    *operands, d_out = given or arrays()
    with kernelry.use(target=TARGET, kernels=[IN_FLOAT32]), kernelry.record() as resolutions:
        found = results(IN_FLOAT32.name, operands, d_out, **options)
    wanted = results("dot_product", operands, d_out, **options)
    same(found, wanted)
    return [step.adapter.name for step in resolutions[0].plan.steps]


def same(found, wanted):
    """Raises AssertionError where two trees of arrays differ."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
