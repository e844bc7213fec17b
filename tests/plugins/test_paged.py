"""paged: its numbers by the interpreter of TPUs, which runs JAX's paged attention only; and what it refuses.

Ragged paged attention runs in no interpreter of jax 0.10 … 0.12: tests/aot compiles it, and nothing here proves its
numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.errors import ConfigError
from kernelry.kernel.spec import Inputs
from kernelry.plugin import PagedArray, Tiling
from kernelry.request.request import Request
from kernelry_tpu_splash.plugin import PAGED

B, N, K, H, PAGE, PAGES = 3, 8, 2, 128, 16, 8
LENGTHS = np.array([100, 17, 0], np.int32)


def held(dtype="bfloat16"):
    """A query, and keys and values in shuffled pages of a larger pool."""
    rng = np.random.default_rng(0)
    table = rng.permutation(40)[: B * PAGES].reshape(B, PAGES).astype(np.int32)
    query, key, value = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((B, 1, N, H), (40, PAGE, K, H), (40, PAGE, K, H))
    )
    return jnp.asarray(query, dtype), np.asarray(key), np.asarray(value), table


@functools.partial(jax.jit, static_argnames="dtype")
def _through_paged(query, key, value, table, dtype):
    """One program: an operation dispatched outside it can deadlock with the interpreter's calls into Python."""
    lengths = masks.Lengths(LENGTHS)
    inputs = Inputs(query, PagedArray(key, table), PagedArray(value, table), lengths.canonical())
    facts = {"q_heads": N, "kv_heads": K, "head_dim": H, "dtype": dtype, "page_size": PAGE, "soft_cap": 20.0}
    request = Request(q_len=1, kv_len=PAGE * PAGES, batch=B, mode="decode", target="tpu:v5e", mask=lengths, **facts)
    tiling = Tiling.of(pages_per_block=4, combined=1)
    return PAGED.body().forward(inputs, request, tiling, statistics=False).out


def run(query, key, value, table, dtype="bfloat16"):
    """Through the kernel in the interpreter, and dense in float64."""
    key, value = (jnp.asarray(array, dtype) for array in (key, value))
    with pltpu.force_tpu_interpret_mode():
        found = jax.block_until_ready(_through_paged(query, key, value, table, dtype))
    rows = (np.asarray(array, np.float64)[table].reshape(B, PAGE * PAGES, K, H) for array in (key, value))
    query = np.asarray(query, np.float64)
    return found, testing.reference_attention(query, *rows, mask=masks.Lengths(LENGTHS), soft_cap=20.0).out


def close(found, wanted, tolerance=1e-2):
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=tolerance, atol=tolerance)


def test_rows_of_different_length_agree_with_dense_and_empty_ones_are_zero():
    found, wanted = run(*held())
    assert found.dtype == jnp.bfloat16
    close(found, wanted)
    assert not np.asarray(found[2], np.float32).any()


def test_what_is_hidden_may_be_nan_and_what_is_seen_shows_it():
    query, key, value, table = held()
    key[table[1, 1], 5] = value[table[1, 4]] = np.nan  # slots 21 and 64 … of row 1, which has 17
    close(*run(query, key, value, table))
    value[table[0, 2], 3, 1, 7] = np.inf
    found, _ = run(query, key, value, table)
    assert np.isnan(np.asarray(found[0], np.float32)).all()
    close(*(out[1:] for out in run(query, key, value, table)))


def test_a_page_that_is_not_there_is_nan_where_it_is_seen():
    query, key, value, table = held()
    table[1, 5] = table[0, 3] = -1
    found, _ = run(query, key, value, table)
    assert np.isnan(np.asarray(found[0], np.float32)).all()
    assert np.isfinite(np.asarray(found[1:], np.float32)).all()


def test_float32_is_refused_because_the_vendor_rounds_keys_to_bfloat16():
    found, wanted = run(*held("float32"), dtype="float32")
    assert 1e-4 < np.abs(found - wanted).max() < 1e-2
    assert PAGED.capabilities.dtypes == {"bfloat16"}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"head_dim": 64}, "head_dim=64 < 128"),
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16"),
        ({"q_len": 2}, "q_len=2 > 1"),
        ({"page_size": None}, "keys and values are not in pages"),
        ({"page_size": 4}, "page_size=4 is not a multiple of 8"),
        ({"mask": masks.SlidingWindow(7).at(query_offset=99)}, "window(7, 0)"),
        ({"kv_quantization": "int8"}, "kv_quantization=int8:head_dim"),
        ({"partial": True}, "return_partial needs statistics"),
    ],
)
def test_refusals_have_values(facts, words):
    usual = {
        "q_len": 1,
        "kv_len": 128,
        "head_dim": 128,
        "dtype": "bfloat16",
        "page_size": 16,
        "mask": masks.Lengths([9]),
    }
    request = Request(**{**usual, "mode": "decode", "target": "tpu:v5e", **facts})
    for policy in (NO_ADAPTERS, None):
        [candidate] = kernelry.explain(request, kernel="paged", kernels=(PAGED,), policy=policy).candidates
        assert any(words in refusal.detail for refusal in candidate.refusals)


@pytest.mark.parametrize(
    ("facts", "ways"),
    [({}, {1, 2}), ({"head_dim": 256}, {1}), ({"q_heads": 6, "kv_heads": 3}, {1})],
)
def test_keys_and_values_stand_side_by_side_where_that_compiles(facts, ways):
    request = Request(**{"q_len": 1, "kv_len": 128, "head_dim": 128, "page_size": 16, "mode": "decode", **facts})
    assert {tiling["combined"] for tiling in PAGED.tilings(request)} == ways


@pytest.mark.parametrize(
    ("tiling", "words"),
    [
        ({"pages_per_block": 3, "combined": 1}, "pages_per_block=3 of paged does not divide the 8 of a row"),
        ({"pages_per_block": 4, "combined": 3}, "combined=3 of paged must be 1 or 2"),
    ],
)
def test_other_tunables_are_errors(tiling, words):
    query, key, value, table = held()
    keys = (PagedArray(jnp.asarray(array, "bfloat16"), jnp.asarray(table)) for array in (key, value))
    inputs = Inputs(query, *keys, ())
    request = Request(q_len=1, kv_len=128, batch=B, q_heads=N, kv_heads=K, head_dim=H, page_size=PAGE, mode="decode")
    with pytest.raises(ConfigError, match=words):
        PAGED.body().forward(inputs, request, Tiling.of(**tiling), statistics=False)
