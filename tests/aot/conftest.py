"""What the tests of compiled programs share. They need compilers, of which `make test-aot` makes an environment."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

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


_EVERYWHERE = PartitionSpec()
_HEADS = PartitionSpec(None, None, "chip")
_ROWS = PartitionSpec(None, "chip")
_OVER = {
    "heads": ((_HEADS, _HEADS, _HEADS), {"kv_heads": 4}),
    "queries": ((_ROWS, _EVERYWHERE, _EVERYWHERE), {"length": 2048}),
}


def _over_four_chips(kernel, over, target="tpu:v5e:2x2"):
    """Compiles value and gradients over heads, or over queries: each chip's stand where its place in the mesh says."""
    specs, sizes = _OVER[over]

    def part(query, key, value):
        first = jax.lax.axis_index("chip") * query.shape[1]
        mask = masks.Causal() if over == "heads" else masks.Causal().at(query_offset=first)
        return kernelry.attention(query, key, value, mask=mask, kernel=kernel).astype(jnp.float32)

    def loss(query, key, value):
        placed = {"in_specs": specs, "out_specs": specs[0]}
        attend = jax.shard_map(part, mesh=jax.sharding.get_abstract_mesh(), check_vma=False, **placed)
        return attend(query, key, value).sum()

    function = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return _compile(target, function, _shapes(**sizes), mesh_shape={"chip": 4}, specs=specs)


@pytest.fixture
def shapes():
    return _shapes


@pytest.fixture
def training():
    return _training


@pytest.fixture
def over_four_chips():
    return _over_four_chips


@pytest.fixture
def compile_for():
    return _compile
