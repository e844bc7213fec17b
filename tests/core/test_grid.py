"""`dot_product` is the oracle's twin: every mask, argument, kind of heads and place, to rounding.

The grid is a covering selection. Each mask meets each set of arguments; heads and places follow by
`(mask + arguments) mod 4` and `(mask + 2 · arguments) mod 5`, which shows every pair of two values
at least once, in 75 calls instead of 1500.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    MASKS,
    Heads,
    arrays_of,
    assert_twins,
    attend,
    compiled_answer,
    cotangents_of,
    masks_of_every_class,
    oracle_answer,
)

import kernelry

pytestmark = pytest.mark.filterwarnings("ignore:the soft cap caps bias too")

HEADS = {"own": Heads(4, 4, 16, 16), "grouped": Heads(4, 2, 8, 8), "one": Heads(4, 1, 8, 8), "split": Heads(2, 2, 8, 5)}
PLACES = {
    "whole": (20, 20, {}),
    "suffix": (9, 25, {"query_offset": 16}),
    "step": (1, 18, {"query_offset": np.array([17, 6])}),
    "traced": (7, 19, {"query_offset": jnp.int32(8)}),
    "rows": (8, 15, {"query_offset": jnp.array([7, 2]), "kv_positions": np.random.default_rng(0).permutation(15)}),
}
ARGUMENTS = ("plain", "capped", "bias", "partial", "all")
CASES = [
    (mask, arguments, tuple(HEADS)[(i + j) % len(HEADS)], tuple(PLACES)[(i + 2 * j) % len(PLACES)])
    for (i, mask), (j, arguments) in itertools.product(enumerate(MASKS), enumerate(ARGUMENTS))
]


def build_case(mask, arguments, heads, place, dtype=np.float32):
    """Returns the mask, the arrays, the cotangents and the arguments of a point of the grid."""
    q_len, kv_len, where = PLACES[place]
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
    if arguments == "partial":
        given |= {"return_partial": True, "scale": 0.3}
    arrays = arrays_of(q_len, kv_len, widths, seed=CASES.index((mask, arguments, heads, place)), dtype=dtype, **shapes)
    given["gradients"] = tuple(arrays)
    placed = masks_of_every_class(q_len, kv_len, widths)[mask].at(**where)
    return placed, arrays, cotangents_of(arrays, lse=arguments == "partial"), given


def test_every_pair_of_values_is_in_the_grid():
    columns = (MASKS, ARGUMENTS, HEADS, PLACES)
    for one, other in itertools.combinations(range(4), 2):
        met = {(case[one], case[other]) for case in CASES}
        assert met == set(itertools.product(columns[one], columns[other]))


@pytest.mark.parametrize(("mask", "arguments", "heads", "place"), CASES)
def test_float32_equals_the_oracle_forward_and_backward(mask, arguments, heads, place):
    placed, arrays, cotangents, given = build_case(mask, arguments, heads, place)
    found = compiled_answer(placed, arrays, cotangents, **given)
    assert_twins(found, oracle_answer(placed, arrays, cotangents, **given), atol=2e-6, gradient_atol=2e-5)


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.parametrize(
    "case", [case for case in CASES if MASKS.index(case[0]) % 5 == ARGUMENTS.index(case[1])], ids=str
)
def test_half_precision_stays_near_the_oracle(case, dtype, atol):
    placed, arrays, cotangents, given = build_case(*case, dtype=dtype)
    result = jax.jit(lambda mask, arrays: attend(mask, arrays, **given))(placed, arrays)
    out = result[0] if isinstance(result, tuple) else result
    out = kernelry.finalize(out) if isinstance(out, kernelry.Partial) else out
    assert out.dtype == dtype
    expected = oracle_answer(placed, arrays, cotangents, **given).out
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=atol)
