"""Arrays, modules and comparisons that the tests of the Flax front ends share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernelry
from kernelry import masks
from kernelry.flax import AttentionOp
from kernelry.policy.rules import Condition, Rule
from kernelry.testing import reference_attention

B, T, F, N = 2, 12, 32, 4
BLOCKWISE = Rule(Condition(), ("blockwise",))


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(*batch, q_len=T, kv_len=T, kv_heads=N, dtype=jnp.float32):
    shapes = (q_len, N), (kv_len, kv_heads), (kv_len, kv_heads)
    return [array(*batch, *shape, 8, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def close(got, want, tolerance=2e-5):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance), got, want)


def kernels_of(function, *arguments, **call):
    with kernelry.record() as resolutions:
        jax.eval_shape(functools.partial(function, **call), *arguments)
    return [resolution.kernel for resolution in resolutions]


class Wrapped(nnx.Module):
    """An AttentionOp inside a module with a parameter of its own."""

    def __init__(self, *arguments, **settings):
        self.project = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.attend = AttentionOp(*arguments, **settings)

    def __call__(self, q, k, v, **call):
        return self.attend(self.project(q), k, v, **call)


def nnx_mha(attention_fn=nnx.dot_product_attention, **settings):
    settings = {"decode": False, **settings}
    return nnx.MultiHeadAttention(N, F, attention_fn=attention_fn, rngs=nnx.Rngs(0), **settings)


def linen_mha(attention_fn=nn.dot_product_attention, **settings):
    return nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=attention_fn, **settings)


def oracle(q, k, v, visible, **settings):
    """The float64 output for a mask written out as booleans that broadcast to B N T S."""
    visible = np.asarray(visible).reshape((1,) * (4 - np.ndim(visible)) + np.shape(visible))
    return reference_attention(q, k, v, mask=masks.Dense(visible), **settings).out
