"""What the tests of accelerator kernels share: arrays, the comparison with dense attention, lowering."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, testing


def _arrays(q_len=256, kv_len=None, *, heads=2, kv_heads=1, head_dim=32, value_dim=None, dtype="float32", batch=1):
    """query, key, value and a cotangent of the output."""
    rng = np.random.default_rng(0)
    kv_len, value_dim = kv_len or q_len, value_dim or head_dim
    shapes = (
        (batch, q_len, heads, head_dim),
        (batch, kv_len, kv_heads, head_dim),
        (batch, kv_len, kv_heads, value_dim),
        (batch, q_len, heads, value_dim),
    )
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _value_and_gradients(kernel, operands, d_out, options):
    def attend(*operands):
        query, key, value, *sinks = operands
        extra = {"sinks": sinks[0]} if sinks else {}
        return kernelry.attention(query, key, value, kernel=kernel, **extra, **options)

    def run(*operands):
        out, pull = jax.vjp(attend, *operands)
        return out, pull(d_out.astype(out.dtype))

    return jax.jit(run)(*operands)


def _of_the_oracle(operands, d_out, options):
    """The output and the gradients of the operands in float64, which compiles nothing."""
    query, key, value, *sinks = (np.asarray(array, np.float64) for array in operands)
    known = {"sinks": sinks[0] if sinks else None, **options}
    out = testing.reference_attention(query, key, value, **known).out
    found = testing.reference_gradients(query, key, value, d_out=np.asarray(d_out, np.float64), **known)
    return out, (found.query, found.key, found.value, found.sinks)


def _check_against_dense(kernel, arrays, *, sinks=None, forward=2e-6, gradient=2e-5, tiling=None, **options):
    """Compares a kernel in interpret mode with dense attention in float64; returns the kernel's plan."""
    operands = arrays[:3] if sinks is None else (*arrays[:3], sinks)
    with testing.interpret(), kernelry.use(tiling=tiling), kernelry.record() as resolutions:
        out, gradients = _value_and_gradients(kernel, operands, arrays[3], options)
    wanted, wanted_gradients = _of_the_oracle(operands, arrays[3], {"mask": masks.Full(), **options})
    assert out.dtype == arrays[0].dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, rtol=forward, atol=forward)
    for name, found, right in zip(("query", "key", "value", "sinks"), gradients, wanted_gradients, strict=False):
        np.testing.assert_allclose(
            np.asarray(found, np.float32), right, rtol=gradient, atol=gradient, err_msg=f"gradient of {name}"
        )
    return resolutions[0].plan


def _lower(function, arrays, target, mesh=None):
    """Lowers for a foreign target; returns the resolutions made on the way and the lowered program."""
    platform = "cuda" if target.startswith("gpu") else "tpu"
    around = contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)
    with kernelry.use(target=target), around, kernelry.record() as resolutions:
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,))
    return resolutions, lowered


@pytest.fixture
def make_arrays():
    return _arrays


@pytest.fixture
def check_against_dense():
    return _check_against_dense


@pytest.fixture
def lower():
    return _lower
