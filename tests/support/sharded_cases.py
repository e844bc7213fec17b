"""Calls in a `shard_map` over batch and heads, two devices each, and the whole call that they are together."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import kernelry
from kernelry import masks, testing
from kernelry.testing import reference_attention, reference_gradients

B, T, N, K, H = 2, 128, 4, 2, 16
PLAIN = ("dot_product", "blockwise")
BY_HEAD = P("batch", None, "heads")
SPECS = {"query": BY_HEAD, "key": BY_HEAD, "value": BY_HEAD, "sinks": P("heads"), "bias": P(None, "heads")}
STATISTIC = P("batch", "heads")
IDS = np.stack([np.repeat([0, 1, 2, 1], 32), np.repeat([3, 0, -1], [50, 50, 28])])
CAUSAL, PACKED = masks.Causal(), masks.Causal() & masks.Segments(IDS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operands(*, q_len=T, kv_heads=K, dim=H, **more):
    shapes = {"query": (B, q_len, N, dim), "key": (B, T, kv_heads, dim), "value": (B, T, kv_heads, dim), **more}
    return {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@functools.cache
def mesh(kind="Auto"):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    return jax.make_mesh((2, 2), ("batch", "heads"), axis_types=types)


def place(kernel):
    return contextlib.nullcontext() if kernel in PLAIN else testing.interpret()


def close(found, wanted, tolerance, name=""):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=tolerance, atol=tolerance, err_msg=name)


def of_rows(tree):
    """Specs of a mask's arrays: those of every row are sharded."""
    return jax.tree.map(lambda array: P("batch") if np.ndim(array) and array.shape[0] == B else P(), tree)


def mapped(call, arrays, mask, *, check=True, where=None, **options):
    """The call inside a shard_map over batch and heads."""
    in_specs = {name: SPECS[name] for name in arrays}, of_rows(mask)
    options = {"mesh": where or mesh(), "out_specs": BY_HEAD, **options}
    return jax.shard_map(call, in_specs=in_specs, check_vma=check, **options)(arrays, mask)


def derived(function, arrays, mask, **options):
    """The output and all gradients of `function(arrays, mask)` in a shard_map, for a cotangent of ones."""

    @jax.jit
    def run(arrays, mask):
        found, pull = jax.vjp(lambda arrays: mapped(function, arrays, mask, **options), arrays)
        return found, pull(jnp.ones_like(found))[0]

    return run(arrays, mask)


def assert_is_the_whole_call(found, arrays, mask, **options):
    out, gradients = found
    close(out, reference_attention(**arrays, mask=mask, **options).out, 2e-6)
    wanted = reference_gradients(**arrays, mask=mask, d_out=np.ones(out.shape), **options)
    for name in gradients:
        close(gradients[name], getattr(wanted, name), 2e-5, name)


def attending(kernel, **options):
    return lambda arrays, mask: kernelry.attention(**arrays, mask=mask, kernel=kernel, **options)
