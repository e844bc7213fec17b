"""AttentionOp over the parts of a key/value cache: equal to attention over all keys at once.

All parts have four slots, and there are four queries or one, so that what is run eagerly is compiled twice only.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import B, N, T, array, close, oracle, qkv
from pairs import sweep_but

import kernelry
from kernelry import masks
from kernelry.config import AttentionConfig, MoBA
from kernelry.errors import ArgumentError, ShapeError
from kernelry.flax import AttentionOp, CachedPart, Tokens, attention_op_as_linen
from kernelry.testing import reference_attention, reference_gradients

pytestmark = [pytest.mark.versions, pytest.mark.xdist_group("flax")]

CUT, SLOTS = 8, 4
GLOBAL = AttentionConfig()
LAST = slice(T - 1, T)
LOCAL = AttentionConfig(type="local_sliding", window=6)
CHUNK = AttentionConfig(type="chunk", chunk_size=5)
BLOCKS = AttentionConfig(type="block_diffusion", block_size=4)
CONFIGS = [LOCAL, CHUNK, BLOCKS, GLOBAL]


def padded(array, start, end):
    """Slots start … end − 1 of an array, then rubbish, as in a cache that is not full."""
    spare = ((0, 0), (0, SLOTS - (end - start)), (0, 0), (0, 0))
    return jnp.asarray(np.pad(np.asarray(array[:, start:end]), spare, constant_values=7.0))


def part(k, v, start, end, *, located=False):
    active = jnp.asarray(np.arange(SLOTS) < end - start, jnp.int32)
    positions = start + np.arange(SLOTS) if located else None
    return CachedPart(padded(k, start, end), padded(v, start, end), active, positions)


def parts_of(k, v, *ends, **settings):
    return tuple(part(k, v, start, end, **settings) for start, end in itertools.pairwise((0, *ends)))


def all_parts(k, v, **settings):
    return parts_of(k, v, 3, 6, 9, T, **settings)


def causal(config, rows):
    """The mask of a config over all T keys, by hand."""
    query, key = np.arange(T)[rows, None], np.arange(T)[None]
    if config is LOCAL:
        return (key <= query) & (query - key < 6)
    if config is CHUNK:
        return (key <= query) & (query // 5 == key // 5)
    return key // 4 <= query // 4 if config is BLOCKS else key <= query


# Equal to the whole


@pytest.mark.parametrize("kind", ["global", "mla", "full"])
@pytest.mark.parametrize("make", [AttentionOp, attention_op_as_linen])
def test_decode_over_parts_equals_the_last_row_of_the_whole(kind, make):
    q, k, v = qkv(B, kv_heads=2)
    op = make(AttentionConfig(type=kind, soft_cap=4.0))
    run = op if make is AttentionOp else functools.partial(op.apply, {})
    out = run(q[:, LAST], cached=all_parts(k, v), mode="decode")
    close(out, oracle(q, k, v, causal(None, slice(None)), soft_cap=4.0)[:, LAST])


@pytest.mark.parametrize(
    ("config", "traced"),
    sweep_but(
        [(config, traced) for config in CONFIGS for traced in (False, True)],
        *((config, False) for config in CONFIGS),
        (LOCAL, True),
    ),
)
def test_positions_of_the_parts_place_the_mask(config, traced):
    q, k, v = qkv(B)
    parts = all_parts(k, v, located=True)

    def step(q, offset):
        return AttentionOp(config)(q, cached=parts, tokens=Tokens(query_offset=offset), mode="decode")

    out = jax.jit(step)(q[:, LAST], jnp.int32(T - 1)) if traced else step(q[:, LAST], T - 1)
    close(out, oracle(q, k, v, causal(config, slice(None)))[:, LAST])


def test_a_part_may_reach_beyond_the_query():
    q, k, v = qkv(B)
    out = AttentionOp()(q[:, 9:10], cached=all_parts(k, v, located=True), tokens=Tokens(query_offset=9), mode="decode")
    close(out, oracle(q[:, 9:10], k, v, causal(None, slice(9, 10))))


@pytest.mark.parametrize("tokens", [{"query_offset": CUT}, {"positions": np.arange(CUT, T)}])
@pytest.mark.parametrize("config", CONFIGS)
def test_chunked_prefill_with_previous_chunks_cached_equals_the_whole(config, tokens):
    q, k, v = qkv(B)
    cached = parts_of(k, v, 3, 6, CUT, located=True)
    out = AttentionOp(config)(
        q[:, CUT:], k[:, CUT:], v[:, CUT:], cached=cached, tokens=Tokens(**tokens), mode="prefill"
    )
    close(out, oracle(q, k, v, causal(config, slice(None)))[:, CUT:])


def test_parts_without_ids_are_full_and_one_part_needs_no_tuple():
    q, k, v = qkv(B)
    before = CachedPart(k[:, 4:CUT], v[:, 4:CUT])
    out = AttentionOp()(q[:, CUT:], k[:, CUT:], v[:, CUT:], cached=before, mode="prefill")
    close(out, oracle(q[:, CUT:], k[:, 4:], v[:, 4:], causal(None, slice(CUT, T))[:, 4:]))


def test_segment_ids_of_the_query_choose_the_slots():
    q, k, v = qkv(B)
    ids = np.array([[4] * 7 + [6] * 5, [6] * 9 + [4] * 3])
    cached = CachedPart(k[:, 4:CUT], v[:, 4:CUT], segment_ids=ids[:, 4:CUT])
    tokens = Tokens(segment_ids=ids[:, CUT:])
    out = AttentionOp()(q[:, CUT:], k[:, CUT:], v[:, CUT:], cached=(cached,), tokens=tokens, mode="prefill")
    same = ids[:, None, CUT:, None] == ids[:, None, None, 4:]
    close(out, oracle(q[:, CUT:], k[:, 4:], v[:, 4:], causal(None, slice(CUT, T))[:, 4:] & same))


def test_indexer_and_bias_run_over_the_slots_of_all_parts():
    q, k, v = qkv(B)
    rng = np.random.default_rng(3)
    keep, bias = rng.random((B, 4, T)) > 0.3, array(B, N, 4, T, seed=5)
    cached = CachedPart(k[:, :4], v[:, :4]), CachedPart(k[:, 4:CUT], v[:, 4:CUT])
    run = functools.partial(AttentionOp(), q[:, CUT:], k[:, CUT:], v[:, CUT:], cached=cached, mode="prefill")
    visible = causal(None, slice(CUT, T))
    close(run(tokens=Tokens(indexer=keep)), oracle(q[:, CUT:], k, v, visible & keep[:, None]))
    close(run(tokens=Tokens(indexer=keep[:, None])), oracle(q[:, CUT:], k, v, visible & keep[:, None]))
    close(run(bias=bias), oracle(q[:, CUT:], k, v, visible, bias=bias))
    close(run(bias=bias[..., :1]), oracle(q[:, CUT:], k, v, visible))


def test_sinks_join_once():
    q, k, v = qkv(B)
    sinks = array(N, seed=8)
    want = oracle(q, k, v, causal(None, slice(None)), sinks=sinks)[:, LAST]
    op = AttentionOp(AttentionConfig(sinks=True), sink_heads=N)
    op.sinks[...] = sinks
    close(op(q[:, LAST], cached=all_parts(k, v), mode="decode"), want)
    close(AttentionOp()(q[:, LAST], cached=all_parts(k, v), mode="decode", sinks=sinks), want)


def test_a_partial_of_some_parts_merges_with_another():
    q, k, v = qkv(B)
    first, *others = all_parts(k, v)
    attend = functools.partial(AttentionOp(), q[:, LAST], mode="decode", return_partial=True)
    merged = kernelry.merge([attend(cached=first), attend(cached=tuple(others))])
    close(kernelry.finalize(merged), oracle(q[:, LAST], k, v, True))


def test_max_logits_are_those_of_all_parts():
    q, k, v = qkv(B)
    config = AttentionConfig(record_max_logits=True)
    run = functools.partial(AttentionOp(config), q[:, LAST])
    _, got = run(cached=all_parts(k, v), mode="decode", return_max_logits=True)
    dense = masks.Dense(np.ones((1, T), bool))
    close(got, reference_attention(q[:, LAST], k, v, mask=dense).max_logits)


@functools.partial(jax.jit, static_argnames="gradients")
def gradients_of_parts(q, k, v, sinks, **call):
    """The gradients of sin(out) at the queries behind the cut, and the output."""

    def loss(q, k, v, sinks):
        before = CachedPart(k[:, :CUT], v[:, :CUT])
        out = AttentionOp()(q[:, CUT:], k[:, CUT:], v[:, CUT:], cached=before, sinks=sinks, **call)
        return jnp.sin(out).sum(), out

    places = (0, 3) if call else (0, 1, 2, 3)
    return jax.grad(loss, places, has_aux=True)(q, k, v, sinks)


def test_gradients_equal_those_of_the_whole():
    q, k, v = qkv(B)
    sinks, mask = array(N, seed=8), masks.Dense(causal(None, slice(CUT, T)))
    whole = functools.partial(reference_gradients, q[:, CUT:], k, v, mask=mask, sinks=sinks)
    got, out = gradients_of_parts(q, k, v, sinks)
    want = whole(d_out=np.cos(np.asarray(out, np.float64)))
    close(got, (np.pad(want.query, ((0, 0), (CUT, 0), (0, 0), (0, 0))), want.key, want.value, want.sinks))
    named, _ = gradients_of_parts(q, k, v, sinks, gradients=("query", "sinks"))
    close(named, (got[0], got[3]))


def test_each_part_drops_other_slots():
    """Two equal parts: with one pattern for both, the output would be that of a single part."""
    q, k, v = (array[:, :4] for array in qkv(B))
    twice = CachedPart(k, v)
    run = functools.partial(AttentionOp(AttentionConfig(dropout_rate=0.5)), q, mode="train")
    key = jax.random.key(0)
    assert not np.allclose(run(cached=(twice, twice), rngs=key), run(cached=(twice,), rngs=key))
    close(run(cached=(twice, twice), deterministic=True), run(cached=(twice,), deterministic=True))


def test_parts_cross_jit():
    q, k, v = qkv(B)
    run = nnx.jit(lambda op, q, parts: op(q, cached=parts, mode="decode"))
    close(run(AttentionOp(), q[:, LAST], parts_of(k, v, 4, 7)), oracle(q[:, LAST], k[:, :7], v[:, :7], True))


# What is refused


def refused(error, message, config=GLOBAL, *, parts=None, own=(), **call):
    q, k, v = qkv(B)
    parts = all_parts(k, v) if parts is None else parts
    with pytest.raises(error, match=message):
        AttentionOp(config)(q[:, LAST], *own, cached=parts, mode="decode", **call)


@pytest.mark.parametrize("config", [LOCAL, CHUNK, BLOCKS])
def test_a_mask_over_positions_needs_those_of_the_parts(config):
    refused(ArgumentError, r"cached part 0 .*CachedPart\(positions=", config, tokens=Tokens(query_offset=T - 1))
    refused(ArgumentError, r"cached part 0 .*CachedPart\(positions=", mask=config.mask)


def test_parts_at_positions_need_the_querys():
    parts = all_parts(*qkv(B)[1:], located=True)
    refused(ArgumentError, r"pass Tokens\(query_offset=", LOCAL, parts=parts)


@pytest.mark.parametrize(
    "mask", [masks.Dense(np.ones((1, 9), bool)), masks.Causal() & masks.Lengths(np.array([3, 4])), ~masks.Segments([1])]
)
def test_a_mask_over_slots_is_refused(mask):
    refused(ArgumentError, "the slots of one array of keys", mask=mask)


def test_a_mask_that_places_the_keys_is_refused():
    refused(ArgumentError, "with cached= each part does", mask=masks.Causal().at(query_offset=3, kv_offset=2))


def test_an_array_is_no_mask_with_parts_either():
    refused(ShapeError, "write masks.Dense", mask=np.ones((1, 9), bool))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"bidirectional": np.ones((B, T), bool)}, "concatenate the parts"),
        ({"kv_positions": np.arange(9), "query_offset": 3}, r"each part has positions of its own"),
    ],
)
def test_tokens_that_parts_cannot_honour_are_refused(tokens, message):
    refused(ArgumentError, message, tokens=Tokens(**tokens))


def test_moba_over_parts_is_refused():
    refused(ArgumentError, "concatenate the parts", AttentionConfig(moba=MoBA(4, 2)))


def test_segment_ids_of_the_query_need_those_of_the_parts():
    _, k, v = qkv(B)
    tokens = Tokens(segment_ids=np.ones((B, 1), np.int32))
    refused(ArgumentError, "cached part 0 has none", parts=CachedPart(k, v), tokens=tokens)


def test_an_indexer_or_bias_of_another_length_is_refused():
    refused(ShapeError, r"indexer .*4\+4\+4\+4=16 slots", tokens=Tokens(indexer=np.ones((B, 1, T), bool)))
    refused(ShapeError, r"bias .*4\+4\+4\+4=16 slots", bias=jnp.zeros((1, 1, 1, T)))


def test_other_keys_beside_parts_are_refused():
    refused(ShapeError, "one more CachedPart", own=qkv(B)[1:])


def test_parts_of_another_class_are_refused():
    refused(ArgumentError, "cached must hold CachedParts, got tuple", parts=(tuple(qkv(B)[1:]),))


def test_sinks_that_do_not_fit_are_refused():
    sinks = array(N)
    refused(ArgumentError, "pass them to kernelry.finalize", sinks=sinks, return_partial=True)
    refused(ShapeError, r"sinks must be \[N\] = \[4\]", sinks=sinks[:2])
    refused(ArgumentError, "gradients names sinks", gradients=("sinks",))


def test_nothing_to_attend_to_is_refused():
    q, k, _ = qkv(B)
    with pytest.raises(ArgumentError, match="nothing to attend to"):
        AttentionOp()(q)
    with pytest.raises(ArgumentError, match="value is None"):
        AttentionOp()(q, k)
