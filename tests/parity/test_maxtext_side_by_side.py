"""MaxText's own AttentionOp, where it is installed, beside kernelry on fresh arrays.

MaxText 0.2.5 needs Python 3.12; without it these tests say what is missing. AttentionOp is given only
the settings that its dot_product path reads.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import types
import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, moba

_BATCH, _KV_LEN, _Q_HEADS, _KV_HEADS, _HEAD_DIM = 2, 60, 4, 2, 16
_PREFILLED = 36  # how many keys stand before the queries of a second chunk, or lie in the first cache
_COMPILE_FAST = {"xla_backend_optimization_level": 0}  # arrays are tiny: compiling is nearly all the time
_SETTINGS = {
    "attention_type": "global",
    "context_parallel_strategy": "all_gather",
    "ulysses_context_sharding": "",
    "shard_mode": None,
    "debug_sharding": False,
    "ici_context_autoregressive_parallelism": 0,
    "matmul_precision": "default",
    "causal_block_size": 16,
    "moba": False,
    "moba_chunk_size": 8,
    "moba_topk": 3,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One call, in kernelry's words and in MaxText's."""

    mask: Callable[[Mapping], masks.Mask]
    options: Mapping = dataclasses.field(default_factory=dict)  # of AttentionOp
    settings: Mapping = dataclasses.field(default_factory=dict)  # of its config
    passes: tuple[str, ...] = ()  # arrays that AttentionOp is called with
    soft_cap: float | None = None
    before: int = 0  # keys before the first query: a chunked prefill


def _packed(arrays):
    return masks.Segments(arrays["ids"])


def _second_chunk(positional):
    def mask(arrays):
        ids = arrays["ids"]
        return positional.at(query_offset=_PREFILLED) & masks.Segments(ids[:, _PREFILLED:], ids)

    return mask


def _moba(arrays):
    chosen = moba.select_blocks(
        arrays["query"], arrays["key"], chunk_size=8, top_k=3, query_positions=np.arange(_KV_LEN)
    )
    return masks.Causal() & _packed(arrays) & chosen


_LOCAL = {"attention_type": "local_sliding", "sliding_window_size": 7}
_CHUNK = {"attention_type": "chunk", "chunk_attn_window_size": 16}
_QUESTIONS = {
    "causal": Question(lambda arrays: masks.Causal() & _packed(arrays)),
    "full": Question(_packed, {"attention_type": "full"}),
    "window": Question(lambda arrays: masks.SlidingWindow(6) & _packed(arrays), _LOCAL),
    "chunk": Question(lambda arrays: masks.Chunked(16) & _packed(arrays), _CHUNK),
    "block_diffusion": Question(
        lambda arrays: masks.BlockCausal(16) & _packed(arrays), {"attention_type": "block_diffusion"}
    ),
    "soft_cap": Question(lambda arrays: masks.Causal() & _packed(arrays), {"attn_logits_soft_cap": 3.0}, soft_cap=3.0),
    "window_with_sinks": Question(lambda arrays: masks.SlidingWindow(6) & _packed(arrays), _LOCAL, passes=("sinks",)),
    "image_spans": Question(
        lambda arrays: (masks.Causal() & _packed(arrays)) | masks.BidirectionalSpans.from_flags(arrays["flags"]),
        passes=("bidirectional_mask",),
    ),
    "indexer": Question(
        lambda arrays: masks.Causal() & _packed(arrays) & masks.Dense(arrays["keep"][:, None]),
        passes=("indexer_mask",),
    ),
    "moba": Question(_moba, settings={"moba": True}),
    "second_chunk": Question(_second_chunk(masks.Causal()), before=_PREFILLED),
    "second_chunk_window": Question(_second_chunk(masks.SlidingWindow(6)), _LOCAL, before=_PREFILLED),
    "second_chunk_chunk": Question(_second_chunk(masks.Chunked(16)), _CHUNK, before=_PREFILLED),
}


@pytest.fixture(scope="module")
def maxtext():
    """MaxText's module attention_op."""
    if importlib.util.find_spec("maxtext") is None:
        pytest.skip("the real AttentionOp needs the package maxtext (Python 3.12), which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        try:
            return importlib.import_module("maxtext.layers.attention_op")
        except ModuleNotFoundError as error:
            pytest.skip(f"maxtext is installed without {error.name}, which its attention_op imports")


def _arrays(seed, *, before=0):
    rng = np.random.default_rng(seed)
    keep = rng.random((_BATCH, _KV_LEN, _KV_LEN)) < 0.4
    shapes = {
        "query": (_BATCH, _KV_LEN - before, _Q_HEADS, _HEAD_DIM),
        "key": (_BATCH, _KV_LEN, _KV_HEADS, _HEAD_DIM),
        "value": (_BATCH, _KV_LEN, _KV_HEADS, _HEAD_DIM),
        "sinks": (_Q_HEADS,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | {
        "ids": np.sort(rng.integers(0, 4, (_BATCH, _KV_LEN)), axis=1),
        "flags": rng.random((_BATCH, _KV_LEN)) < 0.7,
        "keep": keep | np.eye(_KV_LEN, dtype=bool),  # every query keeps its own key: no row is fully masked
    }


def _operation(module, question):
    """The real AttentionOp on one CPU device."""
    return module.AttentionOp(
        config=types.SimpleNamespace(**(_SETTINGS | question.settings)),
        mesh=jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("data",)),
        attention_kernel="dot_product",
        max_target_length=_KV_LEN,
        num_query_heads=_Q_HEADS,
        num_kv_heads=_KV_HEADS,
        **({"attention_type": "global"} | question.options),
    )


def _passed(module, question, arrays):
    every = {
        "sinks": arrays["sinks"],
        "bidirectional_mask": jnp.asarray(arrays["flags"], jnp.int32),
        "indexer_mask": jnp.where(arrays["keep"], 0.0, module.DEFAULT_MASK_VALUE),
    }
    return {name: every[name] for name in question.passes}


@contextlib.contextmanager
def _their_manners():
    """Rank promotion and warnings of MaxText are its own business."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        yield


def _theirs(module, question, arrays, query, key, value):
    with _their_manners():
        call = functools.partial(_operation(module, question), query, key, value, arrays["ids"], None)
        passed = _passed(module, question, arrays)
        if not question.before:
            return call("train", **passed)
        previous = jnp.zeros((_BATCH, question.before))  # only its length is read
        return call("prefill", cached_values=((key, value, arrays["ids"]), None), previous_chunk=previous, **passed)


def _ours(question, arrays, query, key, value):
    arrays = arrays | {"query": query, "key": key, "value": value}
    return kernelry.attention(
        query,
        key,
        value,
        mask=question.mask(arrays),
        scale=1.0,
        soft_cap=question.soft_cap,
        sinks=arrays["sinks"] if "sinks" in question.passes else None,
        mode="prefill" if question.before else "train",
        gradients=["query", "key", "value"],
    )


def _output_and_gradients(attend, arrays):
    @functools.partial(jax.jit, compiler_options=_COMPILE_FAST)
    def run(query, key, value):
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(jnp.cos(out))

    return run(arrays["query"], arrays["key"], arrays["value"])


@pytest.mark.parametrize("name", _QUESTIONS)
def test_attention_equals_the_real_attention_op(name, maxtext):
    question = _QUESTIONS[name]
    arrays = _arrays(seed=list(_QUESTIONS).index(name), before=question.before)
    wanted, wanted_gradients = _output_and_gradients(functools.partial(_theirs, maxtext, question, arrays), arrays)
    found, gradients = _output_and_gradients(functools.partial(_ours, question, arrays), arrays)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    for operand, gradient, right in zip(("query", "key", "value"), gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient, right, rtol=0, atol=5e-5, err_msg=operand)


def _caches(arrays):
    """Keys, values and slots in use (id 1) of a prefill cache and of an autoregressive cache."""
    used = (np.arange(_KV_LEN) < [[30], [_PREFILLED]]) | np.isin(np.arange(_KV_LEN), [41, 42, 43])
    for piece in (slice(_PREFILLED), slice(_PREFILLED, None)):
        yield arrays["key"][:, piece], arrays["value"][:, piece], used[:, piece].astype(np.int32)


def test_decode_over_two_caches_equals_the_real_attention_op(maxtext):
    arrays = _arrays(seed=99)
    query, caches = arrays["query"][:, -1:], tuple(_caches(arrays))

    def theirs(query):
        cached = (caches[0], (*caches[1], None))
        with _their_manners():
            operation = _operation(maxtext, Question(_packed))
            return operation(
                query, None, None, None, None, "autoregressive", cached_values=cached, sinks=arrays["sinks"]
            )

    def ours(query):
        parts = [_decode_part(query, *cache) for cache in caches]
        return kernelry.finalize(kernelry.merge(parts), arrays["sinks"])

    np.testing.assert_allclose(jax.jit(ours)(query), jax.jit(theirs)(query), rtol=0, atol=2e-5)


def _decode_part(query, key, value, used):
    mask = masks.Segments(np.ones((_BATCH, 1), np.int32), used)
    return kernelry.attention(query, key, value, mask=mask, scale=1.0, mode="decode", return_partial=True)
