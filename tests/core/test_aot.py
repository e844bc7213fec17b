"""What kernelry.aot does without a compiler: work from requests, reasons from words, errors with what to do."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernelry
from kernelry import ModelShape, Request, aot, masks
from kernelry.aot import layers
from kernelry.aot.compilation import Compilation, CompileFailure
from kernelry.aot.pairs import count_pairs
from kernelry.config.layer import AttentionConfig, MoBA
from kernelry.errors import ConfigError, PluginError
from kernelry.parallel import load_balanced_order

pytestmark = pytest.mark.versions


def _near(query, key):
    return abs(query - key) * 3 % 7 < 4


SMALL = 37
ORDER = np.r_[0:9, 28:37, 9:28]
POSITIONAL = (
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(7, 2),
    masks.SlidingWindow(7) & masks.Causal(),
    masks.Chunked(5),
    masks.BlockCausal(4),
    masks.PrefixLM(6),
    masks.PrefixLM(np.array([3, 20])),
    masks.Predicate(_near) & masks.Causal(),
)
"""Masks whose visible pairs depend on no array that is known only at run time."""
COMPOSED = st.recursive(
    st.sampled_from(POSITIONAL),
    lambda inside: st.one_of(
        st.tuples(inside, inside).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inside, inside).map(lambda pair: pair[0] | pair[1]),
        inside.map(lambda mask: ~mask),
    ),
    max_leaves=5,
)
PLACES = st.sampled_from(
    [
        {},
        {"query_offset": 11},
        {"kv_offset": -4},
        {"query_positions": ORDER, "kv_positions": ORDER},
        {"kv_positions": np.stack([ORDER, ORDER[::-1]])},
        {"query_offset": np.array([2, 30])},
    ]
)


def _request(mask, **facts):
    return Request(**{"target": "tpu:v5e", "mode": "prefill", "q_len": 256, "dtype": "bfloat16", "mask": mask, **facts})


def _exactly(mask, q_len, kv_len, batch=2):
    """Pairs, queries that see a key, keys that are seen: one head's, over the batch."""
    visible = np.asarray(mask.materialize(q_len, kv_len))[:, 0]
    visible = np.broadcast_to(visible, (batch, q_len, kv_len))
    return visible.sum(), visible.any(axis=2).sum(), visible.any(axis=1).sum()


@given(COMPOSED, PLACES)
def test_what_a_mask_shows_is_counted_exactly(mask, places):
    placed = mask.at(**places)
    found = count_pairs(placed, 2, SMALL, SMALL)
    assert (found.pairs, found.queries, found.keys) == _exactly(placed, SMALL, SMALL)
    assert found.assumed == ()


@pytest.mark.parametrize("mask", POSITIONAL, ids=repr)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 130), (130, 1), (257, 300)])
def test_lengths_are_counted_exactly(mask, q_len, kv_len):
    placed = mask.at(query_offset=kv_len - q_len if kv_len > q_len else 0)
    found = count_pairs(placed, 2, q_len, kv_len)
    assert (found.pairs, found.queries, found.keys) == _exactly(placed, q_len, kv_len)


def _window_pairs(window, length):
    return window * (window + 1) // 2 + (length - window) * window


@pytest.mark.parametrize("length", [65_536, 262_144])
def test_a_window_is_counted_exactly_at_long_lengths(length):
    assert count_pairs(masks.SlidingWindow(127), 1, length, length).pairs == _window_pairs(128, length)
    assert count_pairs(masks.Causal(), 1, length, length).pairs == length * (length + 1) // 2
    assert count_pairs(masks.Chunked(128), 1, length, length).pairs == length // 128 * (128 * 129 // 2)


def test_load_balanced_positions_are_counted_exactly_at_long_lengths():
    length = 32_768
    order = np.asarray(load_balanced_order(length, 8))
    mask = masks.SlidingWindow(127).at(query_positions=order, kv_positions=order)
    assert count_pairs(mask, 1, length, length).pairs == _window_pairs(128, length)


def test_what_takes_too_long_to_count_is_said_to_be_left_out():
    mask = masks.Predicate(_near) & masks.SlidingWindow(127)
    found = count_pairs(mask, 1, 65_536, 65_536)
    assert (found.pairs, found.assumed) == (_window_pairs(128, 65_536), ("predicate",))


ARRAYS = {
    "segments": masks.Segments(np.repeat([0, 1], [20, 17])),
    "lengths": masks.Lengths(np.array([30, 37])),
    "dense": masks.Dense(np.eye(SMALL, dtype=bool)),
    "block_selection": masks.BlockSelection(np.ones((SMALL, 4), bool), 10),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_a_mask_are_taken_to_hide_nothing(name):
    found = count_pairs(masks.SlidingWindow(7) & ARRAYS[name], 2, SMALL, SMALL)
    alone = count_pairs(masks.SlidingWindow(7), 2, SMALL, SMALL)
    assert found == dataclasses.replace(alone, assumed=(name,))


def test_arrays_of_a_disjunction_are_taken_to_show_nothing():
    spans = masks.BidirectionalSpans(np.zeros(SMALL, np.int32))
    found = count_pairs((masks.Causal() & ARRAYS["segments"]) | spans, 1, SMALL, SMALL)
    assert (found.pairs, found.assumed) == (SMALL * (SMALL + 1) / 2, ("segments", "spans"))
    assert count_pairs(spans | ARRAYS["segments"], 1, SMALL, SMALL).pairs == SMALL**2


@pytest.mark.parametrize("length", [0, 5, SMALL])
def test_traced_prefixes_are_taken_to_be_empty_and_under_not_are_left_out(length):
    prefix = masks.PrefixLM(jnp.asarray([length]))
    for mask in (prefix, prefix | masks.Chunked(5), ~(~prefix & masks.SlidingWindow(7))):
        found = count_pairs(mask, 1, SMALL, SMALL)
        assert found.assumed == ()
        assert found.pairs <= _exactly(mask, SMALL, SMALL, batch=1)[0]
    for mask, rest in ((~prefix, masks.Full()), (~(prefix | masks.Chunked(5)), ~masks.Chunked(5))):
        alone = count_pairs(rest, 1, SMALL, SMALL)
        assert count_pairs(mask, 1, SMALL, SMALL) == dataclasses.replace(alone, assumed=("prefix_lm",))
        assert alone.pairs >= _exactly(mask, SMALL, SMALL, batch=1)[0]
    assert count_pairs(prefix, 1, SMALL, SMALL) == count_pairs(masks.Causal(), 1, SMALL, SMALL)


@pytest.mark.parametrize(
    ("mask", "keys"), [(masks.Causal(), 4096), (masks.SlidingWindow(127), 128), (masks.Chunked(1000), 96)]
)
def test_a_decode_step_reads_the_keys_that_it_sees(mask, keys):
    placed = mask.at(query_offset=jnp.zeros((), jnp.int32)) & masks.Lengths(np.array([4000, 90]))
    work = aot.Work.of(_request(placed, mode="decode", q_len=1, kv_len=4096, batch=2), placed)
    assert work.flops == 2 * 2 * keys * (64 + 64)
    assert work.bytes == 2 * 2 * (64 + 64) + 2 * 2 * keys * (64 + 64)
    assert work.assumed == ("lengths",)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_chosen_blocks_are_counted_from_below(top_k):
    """A query sees its own block up to itself, and as many earlier ones as it may."""
    size, length = 8, 64
    own = np.arange(length) // size
    chosen = (own[:, None] - np.arange(length // size)) % (length // size) < top_k
    mask = masks.Causal() & masks.BlockSelection(chosen[None, None], size)
    earlier = np.minimum(own, top_k - 1) * size + np.arange(length) % size + 1
    work = aot.Work.of(_request(mask, q_len=length), mask, MoBA(size, top_k))
    pairs = work.flops / (2 * 128)
    assert pairs <= earlier.sum() == np.asarray(mask.materialize(length, length)).sum()
    assert pairs >= earlier.sum() - length * (size - 1)
    assert work.assumed == ()
    selected = masks.BlockSelection(chosen[None, None, :1], size)
    step = (masks.Causal() & selected).at(query_offset=jnp.zeros((), jnp.int32))
    decode = aot.Work.of(_request(step, mode="decode", q_len=1, kv_len=length), step, MoBA(size, top_k))
    assert decode.flops == 2 * 128 * ((top_k - 1) * size + 1)
    assert decode.bytes == 2 * 128 * (1 + (top_k - 1) * size + 1)


@pytest.mark.parametrize(
    ("storage", "bits"), [("int8", 8 * 128 + 32), ("int4", 4 * 128 + 32), ("int8:heads_and_head_dim", 8 * 128 + 16)]
)
def test_quantised_keys_are_read_as_they_are_stored(storage, bits):
    facts = {"mode": "decode", "q_len": 1, "kv_len": 512, "q_heads": 2, "kv_heads": 2, "kv_quantization": storage}
    work = aot.Work.of(_request(masks.Full(), **facts), masks.Full())
    assert work.bytes == 2 * 2 * (64 + 64) + 512 * 2 * bits / 8


def test_work_of_training_counts_six_products_and_every_array_once():
    forward, whole = (aot.Work.of(_request(masks.Full(), mode=mode), masks.Full()) for mode in ("prefill", "train"))
    assert whole.flops == 3 * forward.flops
    operand = 256 * 64 * 2
    assert (forward.bytes, whole.bytes) == (4 * operand, 8 * operand)


@pytest.mark.parametrize(
    ("wanted", "head_dims", "value_dims", "arrays"),
    [(["query"], 2, 2, 6), (["key"], 2, 2, 6), (["value"], 1, 2, 6), (["query", "value"], 2, 3, 7), ([], 1, 1, 4)],
)
def test_work_of_training_counts_the_gradients_that_are_wanted(wanted, head_dims, value_dims, arrays):
    work = aot.Work.of(_request(masks.Full(), mode="train", gradients=wanted), masks.Full())
    assert work.flops == 2 * 256**2 * 64 * (head_dims + value_dims)
    assert work.bytes == arrays * 256 * 64 * 2


@pytest.mark.parametrize(("head_dim", "value_dim", "q_heads"), [(64, 64, 1), (16, 64, 2), (64, 16, 2)])
@pytest.mark.parametrize("mode", ["prefill", "train"])
def test_no_more_is_counted_than_the_compiler_counts(head_dim, value_dim, q_heads, mode):
    length = 128

    def loss(query, key, value):
        return (kernelry.attention(query, key, value, mask=masks.Full(), kernel="dot_product", mode=mode) ** 2).sum()

    dims = [(q_heads, head_dim), (1, head_dim), (1, value_dim)]
    operands = [jax.ShapeDtypeStruct((1, length, *dim), jnp.float32) for dim in dims]
    function = jax.value_and_grad(loss, argnums=(0, 1, 2)) if mode == "train" else loss
    cost = jax.jit(function).lower(*operands).compile().cost_analysis()
    facts = {"head_dim": head_dim, "value_dim": value_dim, "q_heads": q_heads, "kv_heads": 1, "dtype": "float32"}
    work = aot.Work.of(_request(masks.Full(), mode=mode, q_len=length, **facts), masks.Full())
    assert 0.5 * cost["flops"] < work.flops <= cost["flops"]
    assert work.bytes <= cost["bytes accessed"]


def test_the_roofline_is_the_longer_of_the_two():
    decode = aot.Work.of(_request(masks.Full(), mode="decode", q_len=1, kv_len=4096), masks.Full())
    assert decode.seconds == pytest.approx(decode.bytes / 819e9)
    prefill = aot.Work.of(_request(masks.Full(), q_len=8192), masks.Full())
    assert prefill.seconds == pytest.approx(prefill.flops / 197e12)
    assert prefill.intensity == pytest.approx(prefill.flops / prefill.bytes)
    assert aot.Work.of(_request(masks.Full(), target="cpu"), masks.Full()).seconds is None


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
            "allocating on stack for %x. Scoped allocation with size 21.84M and limit 16.00M exceeded scoped vmem "
            "limit by 5.84M. It should not be",
            "Scoped allocation with size 21.84M and limit 16.00M exceeded scoped vmem limit by 5.84M; set smaller "
            "blocks",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (785.51G) "
            "exceeds available HBM (15.75G).",
            "Ran out of memory on HBM, the total memory required for HLO temporaries (785.51G) exceeds available HBM "
            "(15.75G); shorten the sequence, shard it, or choose a kernel that keeps no T×S logits",
        ),
        (
            "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 327680, available: 232448, context: []",
            "Shared memory size limit exceeded: requested 327680, available: 232448; set smaller blocks",
        ),
        ("INTERNAL: heading:\n  the  reason\nmore", "the reason"),
        ("", "ValueError"),
    ],
)
def test_reasons_are_one_line_with_what_to_change(words, wanted):
    assert str(CompileFailure.of(ValueError(words))) == wanted


def test_smaller_blocks_are_half_of_those_that_were_too_large():
    reason = CompileFailure.of(ValueError("Ran out of memory in memory space vmem"))
    said = reason.about("mine", {"block_kv": 2048, "block_q": 512, "q_layout": 1})
    assert said.remedy == "set smaller blocks, e.g. [attention.tilings] mine = { block_kv = 1024, block_q = 256 }"
    assert reason.about("mine", {}) == reason
    assert CompileFailure("other").about("mine", {"block_q": 512}) == CompileFailure("other")


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(ConfigError, match=r"needs libtpu, their compiler; pip install 'kernelry\[aot-tpu\]'"):
        aot.topology_of("tpu:v5e:9x9")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cpu", "compiled ahead of time for tpu:kind and gpu:kind, e.g. tpu:v5e:2x2 or gpu:h100"),
        ("tpu", "names no kind of TPU to compile for; known: .*tpu:v5e"),
        ("gpu", "names no kind of GPU to compile for; known: .*gpu:h100"),
        ("gpu:l40s", r"'gpu:l40s' names no kind of GPU to compile for.* \(gpu:a100, gpu:h100, gpu:h200, gpu:b200\)"),
    ],
)
def test_targets_without_a_compiler_are_errors(target, words):
    with pytest.raises(ConfigError, match=words):
        aot.topology_of(target)


@pytest.mark.parametrize(
    ("error", "outcome"), [(PluginError("cannot load"), "no"), (aot.NoCompilerError("needs ptxas"), "no compiler")]
)
def test_what_is_missing_while_compiling_is_said_in_the_row(error, outcome, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(layers, "compile_for", fails)
    shape = ModelShape(q_len=64, max_len=64, head_dim=64, dtype="float32")
    reports = aot.check_layers(AttentionConfig(kernel="dot_product"), shape, "gpu:h100")
    assert [(str(report.outcome), report.verdict) for report in reports] == [(outcome, str(error))] * 3


@pytest.mark.parametrize(
    ("cache", "mask", "rows"),
    [
        ("contiguous:int8", "segments", ["train", "prefill", "decode"]),
        ("rolling:int4", "config | spans", ["train", "prefill", "decode"]),
        ("paged:16:int8", "dense", ["train", "prefill", "prefill from the cache", "decode"]),
        (
            "two-part",
            "config & lengths",
            [
                "train",
                "prefill from the cache part 1",
                "prefill from the cache part 2",
                "prefill",
                "decode part 1",
                "decode part 2",
            ],
        ),
    ],
)
def test_every_call_of_a_model_can_be_traced_for_its_row(cache, mask, rows, monkeypatch):
    def traced(target, function, *arguments):
        jax.eval_shape(function, *arguments)
        return Compilation(target, 0.0, {}, None)

    monkeypatch.setattr(layers, "compile_for", traced)
    config = AttentionConfig(type="local_sliding", window=8, kernel="dot_product", sinks=True, record_max_logits=True)
    shape = ModelShape(q_len=16, max_len=48, q_heads=4, kv_heads=2, head_dim=32, cache=cache, mask=mask)
    assert [report.name for report in aot.check_layers(config, shape, "cpu")] == rows


def test_a_bias_is_compiled_in_every_phase_with_its_gradient(monkeypatch):
    made = []

    def traced(target, function, *arguments):
        made.append(jax.eval_shape(function, *arguments))
        return Compilation(target, 0.0, {}, None)

    monkeypatch.setattr(layers, "compile_for", traced)
    config = AttentionConfig(bias=True, sinks=True, q_heads=4, head_dim=32, kernel="dot_product")
    aot.check_layers(config, ModelShape(q_len=16, max_len=48), "cpu")
    (_, gradients), _, decoded = made
    assert [array.shape for array in gradients[3:]] == [(4,), (1, 4, 16, 16)]
    assert decoded.shape == (1, 1, 4, 32)


def test_an_axis_cuts_one_dimension_of_a_bias(monkeypatch):
    cut = []
    monkeypatch.setattr(
        layers, "compile_for", lambda *_, specs, **__: cut.append(specs[4]) or Compilation("", 0, {}, None)
    )
    config = AttentionConfig(bias=True, q_heads=4, head_dim=32, kernel="dot_product")
    aot.check_layers(config, ModelShape(q_len=16, max_len=48, sharding="heads=t:2 sequence=c:2"), "cpu")
    spec = jax.sharding.PartitionSpec
    assert cut == [spec(None, ("t",), ("c",), None)] * 2 + [spec(None, ("t",), None, ("c",))]


def test_chosen_blocks_can_be_traced_in_every_phase(monkeypatch):
    def traced(target, function, *arguments):
        jax.eval_shape(function, *arguments)
        return Compilation(target, 0.0, {}, None)

    monkeypatch.setattr(layers, "compile_for", traced)
    config = AttentionConfig(moba=MoBA(8, 2), kernel="dot_product")
    shape = ModelShape(q_len=16, max_len=48, q_heads=4, kv_heads=2, head_dim=32)
    reports = aot.check_layers(config, shape, "cpu")
    assert [report.work.flops for report in reports][1:] == [2 * 4 * 64 * (8 * 9 / 2 + 8 * 9), 2 * 4 * 64 * 9]


def test_shapes_are_told_apart_and_what_they_share_is_compiled_once(monkeypatch):
    monkeypatch.setattr(layers, "compile_for", lambda target, *_: Compilation(target, 0.0, {}, None))
    shape = ModelShape(q_len=16, max_len=32, head_dim=32)
    shapes = [dataclasses.replace(shape, cache=cache) for cache in ("contiguous", "paged:16")]
    reports = aot.check_layers(AttentionConfig(kernel="dot_product"), shapes, "cpu")
    assert [report.name for report in reports] == [
        "train (cache=contiguous)",
        "prefill (cache=contiguous)",
        "decode (cache=contiguous)",
        "prefill from the cache (cache=paged:16)",
        "decode (cache=paged:16)",
    ]
