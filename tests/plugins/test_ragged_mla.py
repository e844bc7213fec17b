"""ragged where a key begins with its value: absorbed multi-head latent attention (DeepSeek's MLA), in interpret mode.

Law: out = attention with value = key[..., :D], for every way in which keys are held. The compiled programs are in
tests/aot/test_tpu_ragged_mla.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import in_shuffled_pages
from pairs import sweep_but
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.cache import QuantizedArray
from kernelry.plugin import PagedArray, Tiling, ValueInKey
from kernelry.request.request import Request
from kernelry_tpu_splash.plugin import RAGGED
from kernelry_tpu_splash.ragged.layout import Blocks

B, S, PAGE = 3, 384, 128
LENGTHS = np.array([S, 140, 0], np.int32)


quantized = functools.partial(jax.jit, static_argnames="how")(QuantizedArray.quantize)


def drawn(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(q_len=1, heads=16, head_dim=576, kv_heads=1, dtype="float32"):
    return drawn(B, q_len, heads, head_dim, dtype=dtype), drawn(B, S, kv_heads, head_dim, dtype=dtype, seed=1)


def mask_of(q_len):
    used = masks.Lengths(LENGTHS)
    return used if q_len == 1 else masks.Causal().at(query_offset=jnp.maximum(LENGTHS - q_len, 0)) & used


def through_ragged(query, key, width, block=128, table=None, **options):
    """Runs the kernel in one program, which no adapter may change."""

    def step(query, key, table):
        held = key if table is None else PagedArray(key, table)
        return kernelry.attention(query, held, ValueInKey(width), kernel="ragged", mode="decode", **options)

    with testing.interpret(), kernelry.use(tiling={"block_kv": block}, policy=NO_ADAPTERS):
        return jax.jit(step)(query, key, table)


def oracle(query, key, width, **options):
    """Dense attention in float64; keys may be quantised."""
    plain = key.values * key.scale.astype(jnp.float32) if isinstance(key, QuantizedArray) else key
    query, plain = (np.asarray(array, np.float64) for array in (query, plain))
    return testing.reference_attention(query, plain, plain[..., :width], **options)


def assert_close(found, wanted, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=atol, atol=atol)


def held_as(held, key):
    """The key, and its table if it is in pages."""
    if held == "pages":
        pages, _, table = in_shuffled_pages(key, key, PAGE)
        return pages, table
    return (key if held == "array" else quantized(key, how=held)), None


HELD = [(held, q_len) for held in ("array", "pages", "int8", "int8:heads_and_head_dim") for q_len in (1, 4)]


@pytest.mark.parametrize(("held", "q_len"), sweep_but(HELD, ("array", 1), ("pages", 4), ("int8", 4)))
def test_values_are_read_from_the_keys(held, q_len):
    query, key = operands(q_len)
    stored, table = held_as(held, key)
    options = {"mask": mask_of(q_len), "soft_cap": 5.0, "scale": 0.1}
    found = through_ragged(query, stored, 512, table=table, **options)
    assert found.shape == (B, q_len, 16, 512)
    assert_close(found, oracle(query, key if table is not None else stored, 512, **options).out)


def test_as_many_heads_as_deepseek_has():
    query, key = operands(q_len=2, heads=128)
    assert_close(
        through_ragged(query, key, 512, block=256, mask=mask_of(2)), oracle(query, key, 512, mask=mask_of(2)).out
    )


def test_pages_that_are_quantised():
    query, key = operands()
    stored = quantized(key, how="int8")
    values, scale, table = in_shuffled_pages(stored.values, stored.scale, PAGE)
    pages = QuantizedArray(values.astype(jnp.int8), scale.astype(stored.scale.dtype))
    assert_close(
        through_ragged(query, pages, 512, table=table, mask=mask_of(1)), oracle(query, stored, 512, mask=mask_of(1)).out
    )


def test_in_bfloat16_it_is_within_the_declared_tolerance():
    query, key = operands(4, dtype="bfloat16")
    found = through_ragged(query, key, 512, mask=mask_of(4), scale=576**-0.5)
    assert found.dtype == jnp.bfloat16
    assert_close(found, oracle(query, key, 512, mask=mask_of(4), scale=576**-0.5).out, 1e-2)


@pytest.mark.parametrize(
    ("head_dim", "width", "kv_heads", "joined"),
    sweep_but(
        [(128, 64, 1, False), (256, 128, 8, True), (256, 128, 4, False), (80, 50, 2, False)],
        (256, 128, 8, True),
        (80, 50, 2, False),
    ),
)
def test_any_heads_and_dims(head_dim, width, kv_heads, joined):
    """In each order in which a TPU keeps an array, and with all heads in one product."""
    query, key = operands(2, 8, head_dim, kv_heads)
    facts = {"q_len": 2, "kv_len": S, "q_heads": 8, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": width}
    request = Request(**facts, mode="decode", dtype="float32", kv_layout="value_in_key")
    assert Blocks.of(request, Tiling.of(block_kv=128)).joined is joined
    assert_close(through_ragged(query, key, width, mask=mask_of(2)), oracle(query, key, width, mask=mask_of(2)).out)


@pytest.mark.parametrize("held", ["array", "pages"])
def test_what_no_row_sees_may_hold_anything(held):
    query, key = operands(4)
    hidden = np.arange(S)[None, :, None, None] >= LENGTHS[:, None, None, None]
    clean, table = held_as(held, key)
    dirty, _ = held_as(held, jnp.where(hidden, jnp.nan, key))
    wanted = through_ragged(query, clean, 512, table=table, mask=mask_of(4))
    np.testing.assert_array_equal(through_ragged(query, dirty, 512, table=table, mask=mask_of(4)), wanted)
    assert not np.asarray(wanted)[2].any()


def test_a_page_that_is_not_there_is_nan_where_the_mask_shows_it():
    query, key = operands()
    pages, table = held_as("pages", key)
    table[0, 1], table[1, 2] = -1, -1
    found = through_ragged(query, pages, 512, table=table, mask=mask_of(1))
    assert np.isnan(found[0]).all()
    assert_close(found[1:], oracle(query, key, 512, mask=mask_of(1)).out[1:])


def test_parts_merge_and_report_their_largest_logits():
    """Slots before and behind 150, which is inside a block."""
    query, key = operands(4)
    before = np.arange(S)[None, None, None, :] < 150
    parts, tops = zip(
        *(
            through_ragged(
                query, key, 512, mask=mask_of(4) & masks.Dense(part), return_partial=True, return_max_logits=True
            )
            for part in (before, ~before)
        ),
        strict=True,
    )
    wanted = oracle(query, key, 512, mask=mask_of(4))
    assert all(part.lse is None for part in parts)
    assert_close(kernelry.finalize(kernelry.merge(parts)), wanted.out)
    np.testing.assert_allclose(np.maximum(*tops), wanted.max_logits, rtol=2e-6)


def test_sinks_are_added_to_it():
    query, key = operands()
    sinks = jnp.linspace(-3, 3, 16)

    def step(query, key):
        return kernelry.attention(
            query, key, ValueInKey(512), kernel="ragged", mode="decode", mask=mask_of(1), sinks=sinks
        )

    with testing.interpret():
        found = jax.jit(step)(query, key)
    assert_close(found, oracle(query, key, 512, mask=mask_of(1), sinks=np.asarray(sinks)).out)


def test_values_of_their_own_may_be_narrower_than_the_keys():
    """The same dims with an array of values, which `ragged` reads as it is, too."""
    query, key = operands(4)
    value = drawn(B, S, 1, 512, seed=2)

    def step(query, key, value):
        return kernelry.attention(query, key, value, kernel="ragged", mode="decode", mask=mask_of(4))

    with testing.interpret(), kernelry.use(tiling={"block_kv": 128}, policy=NO_ADAPTERS):
        found = jax.jit(step)(query, key, value)
    wanted = testing.reference_attention(*(np.asarray(a, np.float64) for a in (query, key, value)), mask=mask_of(4))
    assert_close(found, wanted.out)


def blocks_of(q_heads, kv_len, **facts):
    usual = {"q_len": 1, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "dtype": "bfloat16", "mode": "decode"}
    request = Request(q_heads=q_heads, kv_len=kv_len, kv_layout="value_in_key", **{**usual, **facts})
    return [tiling["block_kv"] for tiling in RAGGED.tilings(request)]


@pytest.mark.parametrize(
    ("q_heads", "kv_len", "facts", "slots"),
    [
        (16, 8192, {}, 512),
        (64, 8192, {}, 1024),
        (128, 8192, {}, 2048),
        (128, 4096, {}, 1024),
        (128, 1024, {}, 512),
        (128, 200, {}, 256),
        (16, 8192, {"kv_quantization": "int8:head_dim"}, 2048),
    ],
)
def test_blocks_are_longer_where_a_step_has_more_rows(q_heads, kv_len, facts, slots):
    assert blocks_of(q_heads, kv_len, **facts)[0] == slots


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"page_size": 64}, "page_size=64 and head_dim=576 are no multiples of 128"),
        ({"q_len": 4, "q_heads": 128}, "q_len=4 × 128 query heads per key head = 512 rows > 256"),
        ({"head_dim": 704}, "head_dim=704 > 640"),
    ],
)
def test_refusals_have_values(facts, words):
    usual = {"q_len": 1, "kv_len": 512, "q_heads": 16, "kv_heads": 1, "head_dim": 576, "value_dim": 512}
    request = Request(**{**usual, **facts}, mode="decode", target="tpu:v6e", kv_layout="value_in_key")
    [candidate] = kernelry.explain(request, kernel="ragged", kernels=(RAGGED,), policy=NO_ADAPTERS).candidates
    assert any(words in refusal.detail for refusal in candidate.refusals), candidate.refusals
