"""Core's one custom_vjp: a kernel with `backward` gets the output and lse of the whole attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from careless_kernel import CARELESS

import kernelry
from kernelry import masks

pytestmark = pytest.mark.versions


def test_rows_that_see_nothing_contribute_nothing_though_a_sink_makes_their_lse_finite():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 5, 2, 8)), jnp.float32) for _ in range(3))
    sinks = jnp.array([-0.5, 1.0])
    mask = masks.Lengths(jnp.array([0, 3], jnp.int32))

    def gradients(kernel):
        def loss(*arrays):
            out = kernelry.attention(*arrays[:3], sinks=arrays[3], mask=mask, kernel=kernel)
            return jnp.sin(out + 1.0).sum()

        with kernelry.use(kernels=[CARELESS]):
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, sinks)

    for found, expected in zip(gradients("careless"), gradients("dot_product"), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)
