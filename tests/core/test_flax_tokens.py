"""Tokens: a pytree that keeps known places static; what it and the mask made of it refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_cases import B, N, T, qkv

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig, MoBA
from kernelry.errors import ArgumentError, ShapeError
from kernelry.flax import AttentionOp, CachedPart, Tokens

pytestmark = [pytest.mark.versions, pytest.mark.xdist_group("flax")]

GLOBAL = AttentionConfig()
IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, -1, -1], [3, 3, 3, 3, 3, 3, 3, 3, 3, 5, 5, 5]], np.int32)
FLAGS = IDS % 2 == 0


# Tokens as a pytree


def test_places_known_before_tracing_stay_static_through_jit():
    seen = []

    @jax.jit
    def run(tokens):
        seen.append((tokens.query_offset, tokens.positions))
        return tokens.segment_ids

    for tokens in (Tokens(query_offset=3, segment_ids=IDS), Tokens(positions=np.arange(T), segment_ids=IDS)):
        for _ in range(2):
            np.testing.assert_array_equal(run(tokens), IDS)
    assert seen[0] == (3, None)
    assert isinstance(seen[1][1], np.ndarray)
    np.testing.assert_array_equal(seen[1][1], np.arange(T))
    assert len(seen) == 2


def test_static_positions_leave_the_mask_static_under_remat():
    order = np.arange(T)[::-1].copy()
    with kernelry.record() as resolutions:
        jax.checkpoint(lambda tokens, q, k, v: AttentionOp()(q, k, v, tokens=tokens))(Tokens(positions=order), *qkv(B))
    assert resolutions[0].request.mask == masks.Causal().at(query_positions=order, kv_positions=order).form


def test_tokens_survive_flattening_and_vmap():
    tokens = Tokens(segment_ids=jnp.asarray(IDS), query_offset=2)
    leaves, tree = jax.tree.flatten(tokens)
    assert len(leaves) == 1
    assert jax.tree.unflatten(tree, leaves).query_offset == 2
    np.testing.assert_array_equal(jax.vmap(lambda tokens: tokens.segment_ids * tokens.query_offset)(tokens), IDS * 2)


# What is refused


def test_positions_together_with_an_offset_are_refused():
    with pytest.raises(ArgumentError, match="both positions and query_offset"):
        Tokens(positions=np.arange(T), query_offset=0)


def test_kv_positions_alone_are_refused():
    with pytest.raises(ArgumentError, match=r"add positions= or query_offset="):
        Tokens(kv_positions=np.arange(T))


@pytest.mark.parametrize(
    ("indexer", "message"),
    [(jnp.zeros((B, T, T)), "pass mask == 0"), (jnp.ones((B, 2, T, T), bool), r"\[B, 1, T, S\]")],
)
def test_an_indexer_of_another_kind_is_refused(indexer, message):
    with pytest.raises(ShapeError, match=message):
        Tokens(indexer=indexer)


def refused(error, message, config=GLOBAL, q_len=T, **call):
    with pytest.raises(error, match=message):
        AttentionOp(config)(*qkv(B, q_len=q_len), **call)


@pytest.mark.parametrize("name", ["segment_ids", "bidirectional"])
def test_per_key_arrays_without_an_offset_are_refused(name):
    value = {"segment_ids": IDS, "bidirectional": FLAGS}[name]
    full = AttentionConfig(type="full")
    refused(ShapeError, r"pass query_offset=", full, 3, tokens=Tokens(**{name: value}))
    both = Tokens(**{name: value}, query_offset=3, kv_positions=np.arange(T))
    refused(ShapeError, r"and no kv_positions", full, 3, tokens=both)
    refused(ShapeError, rf"{name} must be \[B, S\] or \[S\] with S=12", tokens=Tokens(**{name: value[:, :-1]}))


@pytest.mark.parametrize(("q_len", "offset"), [(3, 10), (3, -1), (T, 1)])
def test_an_offset_that_leaves_the_keys_is_refused_where_ids_are_read_there(q_len, offset):
    refused(
        ShapeError, f"query_offset={offset} .*outside", q_len=q_len, tokens=Tokens(segment_ids=IDS, query_offset=offset)
    )


def test_a_type_that_compares_positions_needs_an_offset():
    refused(ShapeError, r"query_offset=9", q_len=3)


def test_moba_without_an_offset_is_refused():
    config = AttentionConfig(type="full", moba=MoBA(3, 1))
    refused(ShapeError, r"moba needs .*query_offset=, e.g. 9", config, 3)


@pytest.mark.parametrize("tokens", [{"positions": np.arange(T)}, {"query_offset": 0, "kv_positions": np.arange(T)}])
def test_moba_with_keys_elsewhere_is_refused(tokens):
    refused(
        ArgumentError, "leave positions and kv_positions out", AttentionConfig(moba=MoBA(3, 1)), tokens=Tokens(**tokens)
    )


def test_arrays_in_the_wrong_place_are_refused():
    refused(ArgumentError, r"tokens must be kernelry.flax.Tokens", tokens=IDS)
    cached = CachedPart(*qkv(B)[1:])
    refused(ShapeError, r"booleans of shape .*; write masks.Dense", mask=jnp.ones((T, T), bool), cached=cached)
    with pytest.raises(ShapeError, match=r"query must be \[B, T, N, H\], rank 4"):
        AttentionOp()(jnp.zeros((B, T, N)), *qkv(B)[1:])
