"""Hypothesis strategies that draw masks of every class, composed and placed at any level."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from kernelry import masks

BATCH, Q_HEADS, KV_HEADS = 2, 4, 2


def strided(query, kv):
    """Every other key."""
    return (query - kv) % 2 == 0


def near(query, kv, reach):
    """Keys within a distance."""
    return abs(query - kv) <= reach


@st.composite
def placed_masks(draw, depth=2, atoms=None, max_len=6, traced=True):
    """Draws (mask, T, S)."""
    q_len, kv_len = draw(st.integers(1, max_len)), draw(st.integers(1, max_len))
    mask = draw(masks_of(q_len, kv_len, depth, atoms, traced))
    return (mask if q_len == kv_len else mask.at(query_offset=0)), q_len, kv_len


@st.composite
def masks_of(draw, q_len, kv_len, depth=2, atoms=None, traced=True):
    """Draws a mask for T queries and S keys."""
    kind = draw(st.sampled_from(["atom", "and", "or", "not", "at"] if depth else ["atom"]))
    if kind == "atom":
        return draw(atomic_masks(q_len, kv_len, atoms))
    inside = draw(masks_of(q_len, kv_len, depth - 1, atoms, traced))
    if kind == "not":
        return ~inside
    if kind == "at":
        return inside.at(**draw(places(q_len, kv_len, traced)))
    other = draw(masks_of(q_len, kv_len, depth - 1, atoms, traced))
    return inside & other if kind == "and" else inside | other


@st.composite
def places(draw, q_len, kv_len, traced=True):
    """Draws arguments of `.at`, NumPy or JAX."""
    as_given = draw(st.sampled_from([np.asarray, jnp.asarray] if traced else [np.asarray]))
    given_here = {}
    for side, length in (("query", q_len), ("kv", kv_len)):
        kind = draw(st.sampled_from(["none", "offset", "offsets", "positions", "rows"]))
        numbers = st.integers(-3, 9)
        if kind == "offset":
            given_here[f"{side}_offset"] = as_given(np.int32(draw(numbers)))
        elif kind == "offsets":
            given_here[f"{side}_offset"] = as_given(np.asarray([draw(numbers) for _ in range(BATCH)], np.int32))
        elif kind != "none":
            shape = (length,) if kind == "positions" else (BATCH, length)
            given_here[f"{side}_positions"] = as_given(_array(draw, shape, numbers, np.int32))
    return given_here


@st.composite
def atomic_masks(draw, q_len, kv_len, atoms=None):
    """Draws one mask that is no composite."""
    name = draw(st.sampled_from(atoms or ATOMS))
    return _DRAWERS[name](draw) if name in _DRAWERS else _SIZED_DRAWERS[name](draw, q_len, kv_len)


def _array(draw, shape, elements, dtype):
    count = int(np.prod(shape))
    return np.asarray(draw(st.lists(elements, min_size=count, max_size=count)), dtype).reshape(shape)


def _ids(draw, length):
    return _array(draw, (BATCH, length), st.integers(-1, 2), np.int32)


def _lengths(draw, q_len, kv_len):
    kv = _array(draw, (BATCH,), st.integers(0, kv_len), np.int32)
    return masks.Lengths(kv, draw(st.sampled_from([None, _array(draw, (BATCH,), st.integers(0, q_len), np.int32)])))


def _dense(draw, q_len, kv_len):
    shape = tuple(draw(st.sampled_from([1, size])) for size in (BATCH, Q_HEADS, q_len, kv_len))
    return masks.Dense(_array(draw, shape, st.booleans(), bool))


def _selection(draw, q_len, kv_len):
    rows, heads = draw(st.sampled_from([1, BATCH])), draw(st.sampled_from([1, KV_HEADS, Q_HEADS]))
    keep = _array(draw, (rows, heads, q_len, draw(st.integers(1, 3))), st.booleans(), bool)
    return masks.BlockSelection(keep, draw(st.integers(1, 4)))


def _prefix(draw):
    shape = draw(st.sampled_from([(), (BATCH,)]))
    return masks.PrefixLM(_array(draw, shape, st.integers(-1, 8), np.int32))


_STATIC_DRAWERS = {
    "full": lambda _: masks.Full(),
    "causal": lambda _: masks.Causal(),
    "window": lambda draw: masks.SlidingWindow(draw(st.integers(0, 4)), draw(st.integers(0, 4))),
    "chunked": lambda draw: masks.Chunked(draw(st.integers(1, 5))),
    "block_causal": lambda draw: masks.BlockCausal(draw(st.integers(1, 5))),
    "predicate": lambda _: masks.Predicate(strided),
}
_DRAWERS = {
    **_STATIC_DRAWERS,
    "prefix": _prefix,
    "predicate_with_operand": lambda draw: masks.Predicate(near, np.int32(draw(st.integers(0, 3)))),
}
_SIZED_DRAWERS = {
    "segments": lambda draw, q_len, kv_len: masks.Segments(_ids(draw, q_len), _ids(draw, kv_len)),
    "spans": lambda draw, q_len, kv_len: masks.BidirectionalSpans(_ids(draw, q_len), _ids(draw, kv_len)),
    "lengths": _lengths,
    "dense": _dense,
    "selection": _selection,
}
STATIC_ATOMS = tuple(_STATIC_DRAWERS)
ATOMS = (*_DRAWERS, *_SIZED_DRAWERS)
