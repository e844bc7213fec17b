"""dot_product: equal calls are traced once, and nothing of a user's is run less often than it is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry_dot_product import dot_product

QUERY = jax.ShapeDtypeStruct((1, 24, 2, 8), jnp.float32)
OFFSET = [0]


def shifted(query_positions, kv_positions):
    """Reads what is no argument of its own."""
    return kv_positions <= query_positions + OFFSET[0]


@pytest.fixture
def traces(monkeypatch):
    """How often the kernel's own code ran."""
    counted = []
    attend = dot_product.attend_dense

    def counting(*args, **options):
        counted.append(1)
        return attend(*args, **options)

    monkeypatch.setattr(dot_product, "attend_dense", counting)
    jax.clear_caches()
    yield counted
    jax.clear_caches()


def attended(mask, **options):
    return lambda q: kernelry.attention(q, q, q, mask=mask, kernel="dot_product", **options)


def test_layers_of_a_model_are_traced_once(traces):
    layer = attended(masks.Causal())
    program = jax.jit(lambda q: layer(layer(layer(q)))).lower(QUERY).as_text()
    assert len(traces) == 1
    assert program.count("stablehlo.dot_general") == 6
    assert "call @" not in program  # they are copies in it, and no function of its own


def test_calls_that_differ_are_traced_apart(traces):
    for option in ({}, {"scale": 0.5}, {"mode": "prefill"}, {"return_partial": True}):
        jax.make_jaxpr(lambda q, option=option: attended(masks.Causal(), **option)(q).__class__ and q)(QUERY)
    assert len(traces) == 4


def test_predicates_are_run_in_every_call():
    array = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 8)), jnp.float32)
    found = []
    for offset in (0, 2):
        OFFSET[0] = offset
        found.append(np.asarray(attended(masks.Predicate(shifted))(array)))
        window = masks.SlidingWindow(5, offset)
        np.testing.assert_allclose(found[-1], attended(window)(array), atol=1e-6)
    assert not np.allclose(*found)
