"""What AttentionOp makes of its config's type and of Tokens: the float64 oracle at masks written by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import B, T, close, oracle, qkv
from pairs import sweep_but

from kernelry import masks
from kernelry.config import AttentionConfig, MoBA
from kernelry.flax import AttentionOp, Tokens, attention_op_as_linen
from kernelry.testing import reference_select_blocks

pytestmark = [pytest.mark.versions, pytest.mark.xdist_group("flax")]

Q, K = np.arange(T)[:, None], np.arange(T)[None]
CAUSAL = K <= Q
IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, -1, -1], [3, 3, 3, 3, 3, 3, 3, 3, 3, 5, 5, 5]], np.int32)
FLAGS = np.isin(np.arange(T), (1, 2, 3, 6, 7, 10))[None].repeat(B, 0)
FLAGS[1, 2] = False
SAME = (IDS[:, None, :, None] == IDS[:, None, None, :]) & (IDS[:, None, :, None] >= 0)
KEPT = np.random.default_rng(4).random((B, T, T)) > 0.4
TYPES = {
    "global": (AttentionConfig(), CAUSAL),
    "mla": (AttentionConfig(type="mla"), CAUSAL),
    "full": (AttentionConfig(type="full"), np.ones((T, T), bool)),
    "local_sliding": (AttentionConfig(type="local_sliding", window=3), CAUSAL & (Q - K < 3)),
    "chunk": (AttentionConfig(type="chunk", chunk_size=5), CAUSAL & (Q // 5 == K // 5)),
    "block_diffusion": (AttentionConfig(type="block_diffusion", block_size=4), K // 4 <= Q // 4),
}


def in_one_run():
    """FLAGS by hand: slots of one run of True."""
    same = np.zeros((B, 1, T, T), bool)
    for row, runs in enumerate([[(1, 2, 3), (6, 7), (10,)], [(1,), (3,), (6, 7), (10,)]]):
        for run in runs:
            same[row, 0][np.ix_(run, run)] = True
    return same


SPANS = in_one_run()


# Every option means what the oracle says


@pytest.mark.parametrize("kind", TYPES)
def test_the_type_says_which_keys_are_seen(kind):
    config, visible = TYPES[kind]
    close(AttentionOp(config)(*qkv(B)), oracle(*qkv(B), visible))


@pytest.mark.parametrize("kind", TYPES)
def test_the_type_is_placed_at_the_offset(kind):
    config, visible = TYPES[kind]
    q, k, v = qkv(B)
    out = AttentionOp(config)(q[:, 6:9], k, v, tokens=Tokens(query_offset=6))
    close(out, oracle(q[:, 6:9], k, v, visible[6:9]))


def test_a_mask_takes_the_place_of_the_type():
    config, visible = TYPES["chunk"]
    close(AttentionOp(TYPES["global"][0], mask=config.mask)(*qkv(B)), oracle(*qkv(B), visible))
    close(AttentionOp()(*qkv(B), mask=config.mask), oracle(*qkv(B), visible))


def test_a_mask_of_the_call_stands_where_the_tokens_do_unless_it_says_so_itself():
    q, k, v = qkv(B)
    run = functools.partial(AttentionOp(), q[:, 4:7], k, v, tokens=Tokens(query_offset=4))
    close(run(mask=masks.SlidingWindow(2)), oracle(q[:, 4:7], k, v, (CAUSAL & (Q - K < 3))[4:7]))
    close(run(mask=masks.Causal().at(query_offset=9)), oracle(q[:, 4:7], k, v, CAUSAL[9:12]))


@pytest.mark.parametrize("make", [AttentionOp, attention_op_as_linen])
@pytest.mark.parametrize("kind", ["global", "local_sliding"])
def test_all_tokens_arguments_compose_in_maxtexts_order(make, kind):
    config, base = TYPES[kind]
    tokens = Tokens(segment_ids=IDS, bidirectional=FLAGS, indexer=KEPT)
    op = make(config)
    run = op if make is AttentionOp else functools.partial(op.apply, {})
    close(run(*qkv(B), tokens=tokens), oracle(*qkv(B), ((base & SAME) | SPANS) & KEPT[:, None]))


@pytest.mark.parametrize(
    ("name", "value", "visible"),
    [
        ("segment_ids", IDS, CAUSAL & SAME),
        ("segment_ids", jnp.asarray(IDS), CAUSAL & SAME),
        ("segment_ids", IDS[1], CAUSAL & SAME[1:]),
        ("bidirectional", FLAGS, CAUSAL | SPANS),
        ("bidirectional", FLAGS[0], CAUSAL | SPANS[:1]),
        ("indexer", KEPT, CAUSAL & KEPT[:, None]),
        ("indexer", KEPT[:, None], CAUSAL & KEPT[:, None]),
    ],
)
def test_each_field_of_tokens_changes_what_is_seen(name, value, visible):
    assert not np.array_equal(np.broadcast_to(visible, (B, 1, T, T)), np.broadcast_to(CAUSAL, (B, 1, T, T)))
    close(AttentionOp()(*qkv(B), tokens=Tokens(**{name: value})), oracle(*qkv(B), visible))


OFFSETS = [4, np.int64(4), np.array(4), jnp.int32(4), np.array([4, 7]), jnp.array([4, 7], jnp.int32)]


@pytest.mark.parametrize("offset", OFFSETS, ids=lambda offset: f"{type(offset).__name__}{np.shape(offset)}")
@pytest.mark.parametrize("rows", [slice(None), 0])
def test_segments_and_spans_of_fewer_queries_are_read_at_the_offset(offset, rows):
    q, k, v = qkv(B)
    starts = np.broadcast_to(offset, (B,))
    whole = (CAUSAL & SAME[rows]) | SPANS[rows]
    whole = np.broadcast_to(whole, (B, 1, T, T))
    visible = np.stack([whole[b, :, start : start + 3] for b, start in enumerate(starts)])
    tokens = Tokens(segment_ids=IDS[rows], bidirectional=FLAGS[rows], query_offset=offset)
    close(AttentionOp()(q[:, :3], k, v, tokens=tokens), oracle(q[:, :3], k, v, visible))


def test_a_span_that_begins_before_the_queries_is_one_span():
    q, k, v = qkv(B)
    out = AttentionOp()(q[:, 2:5], k, v, tokens=Tokens(bidirectional=FLAGS, query_offset=2))
    close(out, oracle(q[:, 2:5], k, v, (CAUSAL | SPANS)[:, :, 2:5]))


def test_queries_beyond_the_segment_ids_see_nothing():
    q, k, v = qkv(B)
    out = AttentionOp()(q[:, :3], k, v, tokens=Tokens(segment_ids=IDS[1], query_offset=jnp.int32(T - 1)))
    assert np.abs(out[:, 0]).max() > 0
    np.testing.assert_array_equal(out[:, 1:], 0)


def test_permuted_tokens_give_the_permuted_output():
    q, k, v = qkv(B)
    order = np.random.default_rng(1).permutation(T)
    config, visible = TYPES["local_sliding"]
    for positions in (order, np.stack([order] * B), jnp.asarray(order)):
        tokens = Tokens(positions=positions, segment_ids=IDS[:, order])
        out = AttentionOp(config)(q[:, order], k[:, order], v[:, order], tokens=tokens)
        close(out, oracle(q, k, v, visible & SAME)[:, order])


def test_positions_of_fewer_queries_leave_the_keys_in_their_slots():
    q, k, v = qkv(B)
    places = np.array([7, 2, 5])
    close(
        AttentionOp()(q[:, places], k, v, tokens=Tokens(positions=places)), oracle(q[:, places], k, v, CAUSAL[places])
    )


def test_kv_positions_say_where_the_keys_stand():
    q, k, v = qkv(B)
    order = np.random.default_rng(2).permutation(T)
    want = oracle(q[:, 5:8], k, v, CAUSAL[5:8])
    for queries in ({"positions": np.array([5, 6, 7])}, {"query_offset": 5}):
        tokens = Tokens(kv_positions=order, **queries)
        close(AttentionOp()(q[:, 5:8], k[:, order], v[:, order], tokens=tokens), want)


@functools.partial(jax.jit, static_argnames="moba")
def attend_by_moba(q, k, v, tokens, *, moba):
    return AttentionOp(AttentionConfig(moba=moba))(q, k, v, tokens=tokens)


@pytest.mark.parametrize("offset", sweep_but([None, 6, np.int32(5)], None, np.int32(5)))
def test_moba_keeps_the_best_blocks(offset):
    q, k, v = qkv(B, kv_heads=2)
    first = 0 if offset is None else int(offset)
    q = q if offset is None else q[:, first : first + 4]
    places = first + np.arange(q.shape[1])
    keep = reference_select_blocks(q, k, chunk_size=3, top_k=2, query_positions=places)
    visible = CAUSAL[places] & np.repeat(keep, 3, axis=-1)[..., :T]
    assert visible.sum() < np.broadcast_to(CAUSAL[places], visible.shape).sum()
    tokens = Tokens(query_offset=jnp.int32(offset) if isinstance(offset, np.integer) else offset)
    close(attend_by_moba(q, k, v, tokens, moba=MoBA(chunk_size=3, top_k=2)), oracle(q, k, v, visible))


def test_moba_reads_the_positions_of_fewer_queries():
    q, k, v = qkv(B)
    places = np.array([9, 4])
    visible = (CAUSAL & (Q // 3 == K // 3))[places]
    out = attend_by_moba(q[:, places], k, v, Tokens(positions=places), moba=MoBA(chunk_size=3, top_k=1))
    close(out, oracle(q[:, places], k, v, visible))


# Prefill and decode


CUTS = [(3, 6, 9), (1, 4, 11), (5,)]  # of these the first has chunks of one shape, which other tests share


@pytest.mark.parametrize("cuts", sweep_but([(cuts,) for cuts in CUTS], (CUTS[0],)))
@pytest.mark.parametrize("kind", TYPES)
def test_chunked_prefill_over_one_cache_equals_the_whole(cuts, kind):
    config, visible = TYPES[kind]
    q, k, v = qkv(B)
    op, edges = AttentionOp(config), [0, *cuts, T]
    chunks = [
        op(q[:, start:end], k, v, tokens=Tokens(query_offset=start, segment_ids=IDS), mode="prefill")
        for start, end in itertools.pairwise(edges)
    ]
    close(np.concatenate(chunks, axis=1), oracle(q, k, v, visible & SAME))


@pytest.mark.parametrize("kind", sweep_but(list(TYPES), "chunk", "block_diffusion"))
def test_decode_at_a_traced_offset_equals_the_row_of_the_whole(kind):
    config, visible = TYPES[kind]
    q, k, v = qkv(B)
    traces = []

    @nnx.jit
    def step(op, q, tokens):
        traces.append(1)
        return op(q, k, v, tokens=tokens, mode="autoregressive")

    for place in (0, 5, T - 1):
        tokens = Tokens(query_offset=jnp.int32(place), segment_ids=jnp.asarray(IDS), bidirectional=jnp.asarray(FLAGS))
        row = slice(place, place + 1)
        want = oracle(q[:, row], k, v, ((visible & SAME) | SPANS)[:, :, row])
        close(step(AttentionOp(config), q[:, row], tokens), want)
    assert len(traces) == 1
