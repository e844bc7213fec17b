"""What the tests of compiled programs share. They need libtpu, of which `make test-aot` makes an environment."""

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import aot, masks


def _shapes(length=512, *, kv_len=None, heads=4, kv_heads=2, head_dim=128, value_dim=None, dtype="bfloat16"):
    """Shapes of query, key and value."""
    kv_len, value_dim = kv_len or length, value_dim or head_dim
    sizes = ((length, heads, head_dim), (kv_len, kv_heads, head_dim), (kv_len, kv_heads, value_dim))
    return tuple(jax.ShapeDtypeStruct((1, *size), jnp.dtype(dtype)) for size in sizes)


def _training(kernel, **options):
    """Attention's value and gradients, as a function of query, key, value."""
    options = {"mask": masks.Causal(), **options}

    def loss(query, key, value):
        return kernelry.attention(query, key, value, kernel=kernel, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def _compile(target, function, arguments, **options):
    with kernelry.record() as resolutions:
        found = aot.compile_for(target, function, *arguments, **options)
    if found.ok:
        for resolution in resolutions:
            resolution.verify(found.compiled)
    return found


@pytest.fixture
def shapes():
    return _shapes


@pytest.fixture
def training():
    return _training


@pytest.fixture
def compile_for():
    return _compile
