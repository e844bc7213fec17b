"""Values that are stored with the keys, on a mesh: whatever cuts the call, it is the call on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.cache import PagedArray, QuantizedArray, ValueInKey
from kernelry.parallel import Sharding
from kernelry.testing import reference_attention, reference_gradients

B, T, N, K, H, D = 2, 16, 8, 2, 12, 8
CAUSAL = masks.Causal()
CUTS = {
    "rows and repeated heads": ({"d": 2, "t": 4}, {"batch": "d", "heads": "t"}),
    "a ring": ({"c": 4}, {"sequence": "c", "strategy": "ring"}),
    "gathered keys": ({"c": 4}, {"sequence": "c", "strategy": "all_gather"}),
    "exchanged heads": ({"c": 4}, {"sequence": "c", "strategy": "ulysses"}),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def cut(name):
    sizes, axes = CUTS[name]
    count = int(np.prod([*sizes.values()]))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:count]).reshape(tuple(sizes.values())), tuple(sizes))
    return kernelry.use(sharding=Sharding(**axes, mesh=mesh))


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
@pytest.mark.parametrize("name", list(CUTS))
def test_values_in_the_keys_and_both_shares_of_the_gradient(name, kernel):
    query, key, cotangent = normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, N, D)

    @jax.jit
    def run(query, key):
        def attend(query, key):
            return kernelry.attention(query, key, ValueInKey(D), mask=CAUSAL, kernel=kernel)

        out, pull = jax.vjp(attend, query, key)
        return out, *pull(cotangent)

    with cut(name):
        out, d_query, d_key = run(query, key)
    value = key[..., :D]
    np.testing.assert_allclose(out, reference_attention(query, key, value, mask=CAUSAL).out, atol=1e-5)
    wanted = reference_gradients(query, key, value, mask=CAUSAL, d_out=cotangent, d_lse=None)
    both = np.array(wanted.key)
    both[..., :D] += wanted.value
    np.testing.assert_allclose(d_query, wanted.query, atol=1e-4)
    np.testing.assert_allclose(d_key, both, atol=1e-4)


def test_quantised_keys_of_several_devices():
    query, key = normal(0, B, 1, N, H), QuantizedArray.quantize(normal(1, B, T, K, H))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("c",))
    with kernelry.use(sharding=Sharding(kv_sequence="c", mesh=mesh)):
        out = jax.jit(lambda query, key: kernelry.attention(query, key, ValueInKey(D), mode="decode"))(query, key)
    plain = key.dequantize()
    np.testing.assert_allclose(out, reference_attention(query, plain, plain[..., :D], mask=masks.Full()).out, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("interleaved", [True, False])
def test_heads_of_pages_are_cut_and_repeated_as_pairs(devices, interleaved):
    """Of four devices two share a key/value head."""
    query, pages, width = (
        normal(0, B, 1, N, H),
        normal(1, 9, 4, 2 * K if interleaved else K, H),
        H if interleaved else D,
    )
    table = jnp.array([[5, 1, 2, 8], [3, 4, 7, 6]])
    held = PagedArray(pages, table, interleaved=interleaved)
    lengths = masks.Lengths(np.array([14, 5], np.int32))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("t",))
    with kernelry.use(sharding=Sharding(heads="t", mesh=mesh)):
        out = jax.jit(lambda q, k: kernelry.attention(q, k, ValueInKey(width), mask=lengths, mode="decode"))(
            query, held
        )
    key, value = held.gather_pair() if interleaved else (held.gather(), held.gather()[..., :D])
    np.testing.assert_allclose(out, reference_attention(query, key, value, mask=lengths).out, atol=1e-5)
