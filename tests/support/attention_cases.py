"""One attention call beside its float64 oracle, and masks of every class to call it with."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mask_strategies import near

import kernelry
from kernelry import masks
from kernelry.testing import reference_attention, reference_gradients, reference_mask

BATCH = 2
WHOLE, SUFFIX, STEP = (12, 12), (5, 12), (1, 12)
"""T and S. Tests that share shapes share what JAX compiles, eager operations included."""

QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """N, K, H and D."""

    query: int = 4
    kv: int = 2
    dim: int = 8
    value_dim: int = 8


GROUPED = Heads()


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a call returns, and the gradients of its arrays by name; None where it was not asked for."""

    out: Any
    lse: Any
    max_logits: Any
    gradients: dict[str, Any]


def arrays_of(q_len, kv_len, heads=GROUPED, *, seed=0, dtype=np.float32, bias=None, sinks=False):
    """Draws the arrays of a call from N(0, 1), by argument name; `bias` is its shape."""
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (BATCH, q_len, heads.query, heads.dim),
        "key": (BATCH, kv_len, heads.kv, heads.dim),
        "value": (BATCH, kv_len, heads.kv, heads.value_dim),
    }
    shapes |= {} if bias is None else {"bias": bias}
    shapes |= {"sinks": (heads.query,)} if sinks else {}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def cotangents_of(arrays, *, lse=False, seed=1):
    """Draws d_out, and d_lse where the call returns a Partial."""
    rng = np.random.default_rng(seed)
    batch, q_len, q_heads, _ = arrays["query"].shape
    d_out = jnp.asarray(rng.standard_normal((batch, q_len, q_heads, arrays["value"].shape[3])), arrays["query"].dtype)
    return {
        "out": d_out,
        "lse": jnp.asarray(rng.standard_normal((batch, q_heads, q_len)), jnp.float32) if lse else None,
    }


def attend(mask, arrays, **arguments):
    """Calls `dot_product` with arrays by name."""
    others = {name: array for name, array in arrays.items() if name not in QKV}
    return kernelry.attention(*(arrays[name] for name in QKV), mask=mask, kernel="dot_product", **others, **arguments)


def answer(mask, arrays, cotangents, **arguments):
    """Runs a call forward and backward; the result and every gradient asked for."""
    wanted = arguments.get("gradients") or tuple(arrays)

    def forward(moving):
        result = attend(mask, arrays | moving, **arguments)
        result, max_logits = result if arguments.get("return_max_logits") else (result, None)
        is_partial = isinstance(result, kernelry.Partial)
        returned = {"out": result.out, "lse": result.lse} if is_partial else {"out": result, "lse": None}
        return returned, max_logits

    returned, pull, max_logits = jax.vjp(forward, {name: arrays[name] for name in wanted}, has_aux=True)
    gradients = pull(cotangents)[0]
    return returned["out"], returned["lse"], max_logits, gradients


def compiled_answer(mask, arrays, cotangents, *, dropout_rng=None, **arguments):
    """Answers by one program for each form of mask, shapes and arguments; the arrays of the mask are traced."""
    return Answer(*_compiled_answer(mask, arrays, cotangents, dropout_rng, tuple(sorted(arguments.items()))))


@functools.partial(jax.jit, static_argnames="items")
def _compiled_answer(mask, arrays, cotangents, dropout_rng, items):
    return answer(mask, arrays, cotangents, dropout_rng=dropout_rng, **dict(items))


def compiled_attend(mask, arrays, *, dropout_rng=None, **arguments):
    """Calls `attend` as `compiled_answer` does, forward only."""
    return _compiled_attend(mask, arrays, dropout_rng, tuple(sorted(arguments.items())))


@functools.partial(jax.jit, static_argnames="items")
def _compiled_attend(mask, arrays, dropout_rng, items):
    return attend(mask, arrays, dropout_rng=dropout_rng, **dict(items))


def oracle_answer(mask, arrays, cotangents, **arguments):
    """Answers as `compiled_answer` does, in float64; statistics are given even where nobody asked."""
    options = ("scale", "soft_cap", "bias_after_cap", "dropout_rate")
    known = {name: arguments[name] for name in options if name in arguments}
    known |= {"dropout_keep": arguments["dropout_keep"]} if "dropout_keep" in arguments else {}
    qkv = [arrays[name] for name in QKV]
    known |= {name: array for name, array in arrays.items() if name not in QKV}
    found = reference_attention(*qkv, mask=mask, **known)
    gradients = reference_gradients(*qkv, mask=mask, d_out=cotangents["out"], d_lse=cotangents["lse"], **known)
    return Answer(found.out, found.lse, found.max_logits, {name: getattr(gradients, name) for name in arrays})


def assert_twins(found, expected, *, atol=2e-6, gradient_atol=2e-5):
    """Holds an answer to the oracle's, as far as it was asked for."""
    for name in ("out", "lse", "max_logits"):
        if (mine := getattr(found, name)) is not None:
            theirs = np.asarray(getattr(expected, name), np.float64)
            np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, rtol=0, atol=atol, err_msg=name)
    for name, gradient in found.gradients.items():
        theirs = np.asarray(expected.gradients[name], np.float64)
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), theirs, rtol=0, atol=gradient_atol, err_msg=f"gradient of {name}"
        )


def masks_of_every_class(q_len, kv_len, heads=GROUPED):
    """Returns a mask of every class by name; the positional ones stand at the default positions."""
    rng = np.random.default_rng(2)
    own, other = rng.integers(-1, 2, (BATCH, q_len)), rng.integers(-1, 2, (BATCH, kv_len))
    segments = masks.Segments(own) if q_len == kv_len else masks.Segments(own, other)
    spans = masks.BidirectionalSpans(own[::-1].copy(), other)
    lengths = masks.Lengths(np.array([kv_len, kv_len // 3]), np.array([q_len, -(-q_len // 2)]))
    return {
        "full": masks.Full(),
        "causal": masks.Causal(),
        "window": masks.SlidingWindow(5, 1),
        "chunked": masks.Chunked(4),
        "block_causal": masks.BlockCausal(4),
        "prefix": masks.PrefixLM(np.array([3, 0])),
        "segments": segments,
        "spans": spans,
        "lengths": lengths,
        "dense": masks.Dense(rng.random((BATCH, heads.query, q_len, kv_len)) < 0.4),
        "selection": masks.BlockSelection(rng.random((BATCH, heads.kv, q_len, -(-kv_len // 3))) < 0.5, 3),
        "predicate": masks.Predicate(near, np.int32(4)),
        "and": masks.Causal() & segments & lengths,
        "or": (masks.Causal() & segments) | spans,
        "not": ~masks.SlidingWindow(2, 2) & lengths,
    }


MASKS = tuple(masks_of_every_class(1, 1))


def masks_that_hide(length):
    """Returns a mask of every class that hides some slots of the keys from all rows, and all keys from some rows.

    T = S = length ≥ 8, heads as in GROUPED.
    """
    slots = np.arange(length)
    ids = np.where(slots % 4 == 1, -1, slots // 4)
    keep = np.ones((BATCH, GROUPED.kv, length, -(-length // 3)), bool)
    keep[1, :, 2] = keep[:, 0, :, 1] = keep[:, 1, 3:6] = False  # a block is hidden from one group of heads alone
    seen = np.random.default_rng(3).random((BATCH, GROUPED.query, length, length)) < 0.5
    seen[:, :2, :, 4] = seen[1, :, 5] = seen[:, 3, 0] = seen[0, ..., 6] = False
    segments = masks.Segments(ids)
    return {
        "causal": masks.Causal().at(query_offset=-3),
        "window": masks.SlidingWindow(2, 1).at(query_offset=np.array([4, -5])),
        "chunked": masks.Chunked(4).at(query_positions=slots + 4),
        "block_causal": masks.BlockCausal(3).at(query_offset=jnp.int32(-5)),
        "prefix": masks.PrefixLM(np.array([0, -2])).at(query_offset=-3),
        "segments": segments,
        "spans": masks.BidirectionalSpans(ids, ids[::-1].copy()),
        "lengths": masks.Lengths(np.array([length - 2, 0]), np.array([length - 1, length])),
        "dense": masks.Dense(seen),
        "selection": masks.BlockSelection(keep, 3),
        "predicate": masks.Predicate(near, np.int32(2)).at(kv_positions=slots + 5),
        "and": masks.Causal() & segments,
        "or": segments | masks.Lengths(np.array([0, 2]), np.array([0, 3])),
        "not": ~masks.SlidingWindow(20, 20).at(kv_offset=-3, query_offset=np.array([13, 17])),
    }


HIDING = tuple(masks_that_hide(8))


def visible_by(mask, arrays):
    """Returns the definition's booleans, B N T S."""
    batch, q_len, q_heads, _ = arrays["query"].shape
    return reference_mask(mask, batch, q_heads, q_len, arrays["key"].shape[1])
