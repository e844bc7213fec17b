"""`dot_product` is the oracle's twin: every mask, argument, kind of heads and place, to rounding.

`make test` runs a selection in which every two of arguments, heads and places meet, and each mask meets two sets of
arguments. The sweep is the grid: each mask meets each set of arguments; heads and places follow by
`(mask + arguments) mod 4` and `(mask + 2 · arguments) mod 5`, which shows every pair of two values
at least once, in 75 calls instead of 1500.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    MASKS,
    STEP,
    SUFFIX,
    WHOLE,
    Heads,
    arrays_of,
    assert_twins,
    compiled_answer,
    compiled_attend,
    cotangents_of,
    masks_of_every_class,
    oracle_answer,
)
from pairs import covering

import kernelry

pytestmark = pytest.mark.filterwarnings("ignore:the soft cap caps bias too")

HEADS = {"grouped": Heads(4, 2, 8, 8), "own": Heads(4, 4, 16, 16), "one": Heads(4, 1, 8, 8), "split": Heads(2, 2, 8, 5)}
PLACES = {
    "whole": (WHOLE, {}),
    "suffix": (SUFFIX, {"query_offset": 7}),
    "step": (STEP, {"query_offset": np.array([11, 5])}),
    "traced": (SUFFIX, {"query_offset": jnp.int32(4)}),
    "rows": (WHOLE, {"query_offset": jnp.array([1, -4]), "kv_positions": np.random.default_rng(0).permutation(12)}),
}
ARGUMENTS = ("plain", "capped", "bias", "partial", "all")
GRID = [
    (mask, arguments, tuple(HEADS)[(i + j) % len(HEADS)], tuple(PLACES)[(i + 2 * j) % len(PLACES)])
    for (i, mask), (j, arguments) in itertools.product(enumerate(MASKS), enumerate(ARGUMENTS))
]
COVERING = [tuple(case.values()) for case in covering(arguments=ARGUMENTS, heads=tuple(HEADS), place=tuple(PLACES))]
CASES = [(mask, *case) for mask, case in zip(MASKS * 2, itertools.cycle(COVERING), strict=False)]
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3}
HALF = [(*case, dtype) for case, dtype in zip(CASES[::6], itertools.cycle(TOLERANCES), strict=False)]
"""One of each set of arguments."""
HALF_GRID = [
    (*case, dtype)
    for case, dtype in itertools.product(GRID, TOLERANCES)
    if MASKS.index(case[0]) % 5 == ARGUMENTS.index(case[1])
]


def _and_sweep(cases, others):
    """Parameters: `make test` runs the cases, `make test-all` the others, too."""
    return [*cases, *(pytest.param(*case, marks=pytest.mark.sweep) for case in others if case not in cases)]


def build_case(mask, arguments, heads, place, dtype=np.float32):
    """Returns the mask, the arrays, the cotangents and the arguments of a point of the grid."""
    (q_len, kv_len), where = PLACES[place]
    widths = HEADS[heads]
    mode = {"whole": "train", "step": "decode"}.get(place, "prefill")
    given, shapes = {"mode": mode}, {}
    if arguments in ("capped", "all"):
        given |= {"soft_cap": 3.0, "scale": 0.4}
        shapes["sinks"] = True
    if arguments in ("bias", "all"):
        shapes["bias"] = (BATCH, widths.query, q_len, kv_len) if arguments == "bias" else (widths.query, 1, kv_len)
    if arguments in ("plain", "partial", "all"):
        given["return_max_logits"] = True
    if arguments == "all":
        given["bias_after_cap"] = bool(MASKS.index(mask) % 2)
    if arguments == "partial":
        given |= {"return_partial": True, "scale": 0.3}
    arrays = arrays_of(q_len, kv_len, widths, seed=MASKS.index(mask), dtype=dtype, **shapes)
    given["gradients"] = tuple(arrays)
    placed = masks_of_every_class(q_len, kv_len, widths)[mask].at(**where)
    return placed, arrays, cotangents_of(arrays, lse=arguments == "partial"), given


def _pairs_of(cases, columns):
    """Of every two columns, the pairs of values that meet in the cases, and all that could."""
    for one, other in itertools.combinations(columns, 2):
        met = {(case[one], case[other]) for case in cases}
        yield met, set(itertools.product(columns[one], columns[other]))


def test_the_selection_has_both_orders_of_cap_and_bias():
    assert {MASKS.index(case[0]) % 2 for case in CASES if case[1] == "all"} == {0, 1}


def test_every_pair_of_values_is_in_the_grid():
    for met, possible in _pairs_of(GRID, {0: MASKS, 1: ARGUMENTS, 2: HEADS, 3: PLACES}):
        assert met == possible


def test_the_selection_holds_each_mask_twice_and_every_pair_of_the_others():
    for met, possible in _pairs_of(CASES, {1: ARGUMENTS, 2: HEADS, 3: PLACES}):
        assert met == possible
    for mask in MASKS:
        assert len({case[1] for case in CASES if case[0] == mask}) == 2, mask


@pytest.mark.parametrize(("mask", "arguments", "heads", "place"), _and_sweep(CASES, GRID))
def test_float32_equals_the_oracle_forward_and_backward(mask, arguments, heads, place):
    placed, arrays, cotangents, given = build_case(mask, arguments, heads, place)
    found = compiled_answer(placed, arrays, cotangents, **given)
    assert_twins(found, oracle_answer(placed, arrays, cotangents, **given), atol=2e-6, gradient_atol=2e-5)


@pytest.mark.parametrize(("mask", "arguments", "heads", "place", "dtype"), _and_sweep(HALF, HALF_GRID))
def test_half_precision_stays_near_the_oracle(mask, arguments, heads, place, dtype):
    placed, arrays, cotangents, given = build_case(mask, arguments, heads, place, dtype=dtype)
    result = compiled_attend(placed, arrays, **given)
    out = result[0] if isinstance(result, tuple) else result
    out = kernelry.finalize(out) if isinstance(out, kernelry.Partial) else out
    assert out.dtype == dtype
    expected = oracle_answer(placed, arrays, cotangents, **given).out
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=TOLERANCES[dtype])
