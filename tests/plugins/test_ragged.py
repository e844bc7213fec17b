"""ragged in interpret mode against dense attention; what it reads; lowered for TPU; and what it refuses.

Interpret mode proves numbers, lowering proves that the program holds the kernel: nothing here runs on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import in_shuffled_pages
from pairs import covering, sweep_but
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.cache import PagedCache, QuantizedArray, RollingCache, TwoPartCache
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.kernel.spec import Inputs
from kernelry.plugin import PagedArray, Tiling
from kernelry.request.request import Request
from kernelry_tpu_splash.plugin import RAGGED
from kernelry_tpu_splash.ragged.kernel import _operands
from kernelry_tpu_splash.ragged.layout import Blocks, Order

B, S = 3, 300
LENGTHS = np.array([S, 140, 0], np.int32)
SMALL = {"block_kv": 128}


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


def drawn(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arrays(heads=4, kv_heads=2, head_dim=32, value_dim=None, q_len=1, dtype="float32", slots=S):
    widths = (heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim or head_dim)
    lengths = (q_len, slots, slots)
    return tuple(
        drawn(B, length, *width, dtype=dtype, seed=seed)
        for seed, (length, width) in enumerate(zip(lengths, widths, strict=True))
    )


def through_ragged(*operands, table=None, tiling=SMALL, **options):
    """Runs the kernel in one program; keys and values are pages where there is a table."""

    def step(query, key, value, table):
        held = (key, value) if table is None else (PagedArray(key, table), PagedArray(value, table))
        return kernelry.attention(query, *held, kernel="ragged", mode="decode", **options)

    with testing.interpret(), kernelry.use(tiling=tiling):
        return jax.jit(step)(*operands, table)


@pytest.fixture(scope="module")
def step():
    """One program for rows of any lengths, and for any table."""

    def run(query, key, value, lengths, table=None):
        held = (key, value) if table is None else (PagedArray(key, table), PagedArray(value, table))
        return kernelry.attention(query, *held, mask=masks.Lengths(lengths), mode="decode", kernel="ragged")

    def interpreted(*operands):
        with testing.interpret(), kernelry.use(tiling=SMALL if len(operands) == 4 else None):
            return compiled(*operands)

    compiled = jax.jit(run)
    return interpreted


quantized = functools.partial(jax.jit, static_argnames="how")(QuantizedArray.quantize)


def oracle(*operands, mask, **options):
    """Dense attention in float64; keys and values may be quantised."""
    return testing.reference_attention(*map(_in_float64, operands), mask=mask, **options)


def _in_float64(array):
    if isinstance(array, QuantizedArray):
        return np.asarray(array.values, np.float64) * np.asarray(array.scale, np.float64)
    return np.asarray(array, np.float64)


def check(operands, atol=2e-6, **options):
    found, wanted = through_ragged(*operands, **options), oracle(*operands, **options).out
    assert found.dtype == operands[0].dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=atol, atol=atol)


MASKS = {
    "full": masks.Full(),
    "lengths": masks.Lengths(LENGTHS),
    "window": masks.SlidingWindow(40).at(query_offset=jnp.maximum(LENGTHS - 1, 0)) & masks.Lengths(LENGTHS),
    "chunked": masks.Chunked(96).at(query_offset=jnp.asarray([299, 100, 0])),
    "predicate": masks.Predicate(every_third).at(query_offset=jnp.asarray([299, 100, 0])),
    "segments": masks.Segments(np.array([[0], [2], [-1]]), np.repeat([[0, -1, 2]], 100, axis=1).repeat(B, 0)),
    "by_head": masks.BlockSelection(np.arange(B * 4 * 19).reshape(B, 4, 1, 19) % 5 == 1, 16).at(query_offset=299),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", MASKS)
def test_masks_agree_with_dense(name):
    check(arrays(), mask=MASKS[name], soft_cap=3.0, scale=0.3)


SELECTED = covering(
    mask=["window", "by_head"],
    held=[None, "pages", "int8", "int8:heads_and_head_dim"],
    heads=[(4, 2), (3, 1), (8, 4)],
    dims=[(24, 128), (128, 64), (128, 128)],
    q_len=[1, 3],
    extras=[{}, {"soft_cap": 3.0, "scale": 0.3, "sinks": [0.0, 1.0, -3.0, 30.0]}],
    dtype=["float32", "bfloat16"],
)


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: f"{case['mask']}-{case['held']}-{case['dtype']}")
def test_selected_cases_agree_with_dense(case):
    (heads, kv_heads), (head_dim, value_dim) = case["heads"], case["dims"]
    query, key, value = arrays(heads, kv_heads, head_dim, value_dim, case["q_len"], case["dtype"], slots=384)
    mask, extras = _selected_mask(case["mask"], heads, case["q_len"]), dict(case["extras"])
    if "sinks" in extras:
        extras["sinks"] = jnp.resize(jnp.asarray(extras["sinks"]), heads)
    held, how = (key, value), {}
    if case["held"] == "pages":
        *held, table = in_shuffled_pages(key, value, page_size=128)
        held, how = [array.astype(case["dtype"]) for array in held], {"table": table, "tiling": {"block_kv": 256}}
    elif case["held"]:
        key, value = held = [quantized(array, how=case["held"]) for array in (key, value)]
    found = through_ragged(query, *held, mask=mask, **how, **extras)
    wanted = oracle(query, key, value, mask=mask, **extras).out
    assert found.dtype == query.dtype
    close = 1e-2 if case["dtype"] == "bfloat16" else 2e-6
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=close, atol=close)


def _selected_mask(name, heads, q_len):
    """Rows of 384 slots: the queries are the last ones, of a row that is empty too."""
    lengths = np.array([384, 140, 0], np.int32)
    last, used = jnp.maximum(lengths - q_len, 0), masks.Lengths(lengths)
    by_head = np.arange(B * heads * 24).reshape(B, heads, 1, 24) % 5 == 1
    return {
        "window": masks.SlidingWindow(40).at(query_offset=last) & used,
        "by_head": masks.Causal().at(query_offset=last) & masks.BlockSelection(by_head, 16).at(query_offset=last),
    }[name]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    sweep_but([(16, 16, 24, 24), (4, 4, 128, 128), (6, 1, 128, 64)], (16, 16, 24, 24)),
)
def test_heads_and_dims_agree_with_dense(heads, kv_heads, head_dim, value_dim):
    check(arrays(heads, kv_heads, head_dim, value_dim), mask=MASKS["lengths"])


def test_a_partial_holds_maximum_and_sum_of_an_output_that_is_not_divided():
    options = {"mask": MASKS["window"], "return_partial": True, "return_max_logits": True}
    found, top = through_ragged(*arrays(), **options)
    wanted = oracle(*arrays(), mask=MASKS["window"])
    assert found.lse is None
    np.testing.assert_allclose(found.max + jnp.log(found.sum), wanted.lse, rtol=2e-6, atol=2e-6)
    assert np.isneginf(found.max[2]).all()
    assert not found.sum[2].any()
    np.testing.assert_allclose(found.max.max(axis=2), top)
    np.testing.assert_allclose(top, wanted.max_logits, rtol=2e-6)
    divisor = jnp.where(found.sum == 0, 1, found.sum).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(found.out / divisor, wanted.out, rtol=2e-6, atol=2e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("how", ["int8", "int8:heads_and_head_dim"])
@pytest.mark.parametrize("width", [32, 128])
def test_quantised_keys_agree_with_their_values(how, width):
    query, key, value = arrays(head_dim=width)
    check((query, QuantizedArray.quantize(key, how), QuantizedArray.quantize(value, how)), mask=MASKS["lengths"])


@pytest.mark.parametrize(("page_size", "width"), sweep_but([(16, 128), (48, 128), (128, 32)], (48, 128)))
def test_pages_are_read_through_the_table(page_size, width, step):
    query, key, value = arrays(head_dim=width, slots=384)
    pages, more, table = in_shuffled_pages(key, value, page_size)
    lengths = np.array([384, 140, 0])
    table[1, -(-140 // page_size) :] = -1
    found = step(query, pages, more, lengths, table)
    np.testing.assert_allclose(found, oracle(query, key, value, mask=masks.Lengths(lengths)).out, rtol=2e-6, atol=2e-6)


def test_a_page_that_is_not_there_is_nan_where_the_mask_shows_it(step):
    query, key, value = arrays(head_dim=128, slots=384)
    pages, more, table = in_shuffled_pages(key, value, page_size=48)
    table[0, 3], table[2, 0] = -1, 99
    found = step(query, pages, more, np.array([384, 140, 7]), table)
    assert np.isnan(found[::2]).all()
    assert np.isfinite(found[1]).all()


def test_what_no_row_sees_may_hold_anything(step):
    query, key, value = arrays()
    hidden = np.arange(S)[None, :, None, None] >= LENGTHS[:, None, None, None]
    found = step(query, jnp.where(hidden, jnp.inf, key), jnp.where(hidden, jnp.nan, value), LENGTHS)
    np.testing.assert_array_equal(found, step(query, key, value, LENGTHS))


def test_under_jit_the_lengths_may_be_traced(step):
    operands = arrays()
    for lengths in (LENGTHS, np.array([7, 0, 299], np.int32)):
        wanted = oracle(*operands, mask=masks.Lengths(lengths)).out
        np.testing.assert_allclose(step(*operands, lengths), wanted, rtol=2e-6, atol=2e-6)


BLOCKS_READ = [
    (masks.Lengths(np.array([1000, 129, 0])), [0, 0, 0], [8, 2, 0]),
    (masks.SlidingWindow(99).at(query_offset=np.array([999, 500, 10])), [7, 3, 0], [1, 1, 1]),
    (masks.SlidingWindow(200).at(query_offset=np.array([999, 500, 10])), [6, 2, 0], [2, 2, 1]),
    (masks.Full(), [0, 0, 0], [8, 8, 8]),
]


def test_blocks_read_follow_what_each_row_sees():
    """The grid is as long as the longest row's blocks; what lies before the first or behind the last is not fetched."""

    @jax.jit
    def blocks_read(*operands):
        found = []
        for mask, _, _ in BLOCKS_READ:
            request = Request(
                mode="decode", batch=B, q_len=1, kv_len=1000, q_heads=4, kv_heads=2, head_dim=32, mask=mask
            )
            inputs = Inputs(*operands, mask.canonical())
            made = _operands(inputs, request, Blocks.of(request, Tiling.of(block_kv=128)))
            found.append((made.first, made.count))
        return found

    for (mask, *wanted), found in zip(BLOCKS_READ, blocks_read(*arrays(slots=1000)), strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=str(mask))


@pytest.mark.parametrize("kind", ["two_part", "rolling", "paged", "paged_int8"])
@pytest.mark.sweep
def test_caches_decode_through_it(kind):
    """A prompt and two steps, rows of different length."""
    sizes = {"kv_heads": 2, "head_dim": 128, "dtype": jnp.float32}
    cache, mask = {
        "two_part": lambda: (TwoPartCache.create(batch=B, prefill=24, decode=8, **sizes), masks.Causal()),
        "rolling": lambda: (RollingCache.create(batch=B, window=16, max_append=24, **sizes), masks.SlidingWindow(15)),
        "paged": lambda: (PagedCache.create(rows=B, pages=16, page_size=16, max_length=64, **sizes), masks.Causal()),
        "paged_int8": lambda: (
            PagedCache.create(rows=B, pages=16, page_size=16, max_length=64, storage="int8", **sizes),
            masks.Causal(),
        ),
    }[kind]()
    prompt = drawn(B, 24, 2, 128, seed=1), drawn(B, 24, 2, 128, seed=2)
    cache = cache.prefill(*prompt, lengths=jnp.asarray([24, 5, 17]))
    for step in range(2):
        query, key, value = (drawn(B, 1, heads, 128, seed=10 * step + heads) for heads in (4, 2, 2))
        wanted, after = cache.decode(query, key, value, mask=mask, kernel="dot_product")
        with testing.interpret():
            found, cache = cache.decode(query, key, value, mask=mask, kernel="ragged")
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(cache.lengths, after.lengths)


@pytest.mark.parametrize(
    ("heads", "width", "itemsize", "order"),
    [
        (8, 128, 2, Order.AS_IT_IS),
        (2, 128, 2, Order.AS_IT_IS),
        (1, 128, 2, Order.HEADS_FIRST),
        (2, 128, 1, Order.HEADS_FIRST),
        (3, 128, 4, Order.HEADS_FIRST),
        (8, 64, 2, Order.SLOTS_LAST),
    ],
)
def test_the_order_is_that_in_which_a_tpu_keeps_the_array(heads, width, itemsize, order):
    assert Order.of(heads, width, itemsize) is order


def test_lowered_for_tpu_it_reads_int8_as_it_is(lower):
    query, key, value = arrays(head_dim=128, dtype="bfloat16")
    held = QuantizedArray.quantize(key), QuantizedArray.quantize(value)

    def step(query, key, value):
        return kernelry.attention(query, key, value, mask=MASKS["lengths"], mode="decode", kernel="ragged")

    resolutions, lowered = lower(step, (query, *held), "tpu:v5e")
    resolutions[0].verify(lowered)
    [call] = [line for line in lowered.as_text().splitlines() if "@tpu_custom_call" in line]
    assert call.partition(" : (")[2].count(f"tensor<{B}x{S}x2x128xi8>") + call.count(f"tensor<{B}x2x{S}x128xi8>") == 2


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"mode": "train"}, "mode=train is not decode"),
        ({"q_len": 64, "q_heads": 8}, "q_len=64 × 8 query heads per key head = 512 rows > 256"),
        ({"page_size": 16, "head_dim": 64}, "page_size=16 and head_dim=64 are no multiples of 128"),
        ({"page_size": 100, "kv_len": 3200, "kv_heads": 8, "q_heads": 8, "head_dim": 128}, "blocks of 3200 slots"),
        (
            {"page_size": 16, "kv_len": 32768, "batch": 256, "head_dim": 128},
            "a table of 2048 KiB of pages > the 896 KiB",
        ),
        ({"q_heads": 36, "kv_heads": 36, "head_dim": 512}, "blocks of 128 slots, the smallest, take 38 MiB"),
        ({"q_len": 20, "q_heads": 240, "kv_heads": 20, "head_dim": 256}, "blocks of 128 slots, the smallest, take"),
        ({"dtype": "float16"}, "dtype=float16 is not bfloat16 or float32"),
        ({"kv_quantization": "int4"}, "kv_quantization=int4:head_dim is not int8:head_dim"),
    ],
)
def test_refusals_have_values(facts, words):
    request = Request(**{"q_len": 1, "kv_len": 512, "kv_heads": 1, "mode": "decode", "target": "tpu:v5e", **facts})
    [candidate] = kernelry.explain(request, kernel="ragged", kernels=(RAGGED,), policy=NO_ADAPTERS).candidates
    assert any(words in refusal.detail for refusal in candidate.refusals)


@pytest.mark.parametrize(
    ("page_size", "block", "unit"), [(None, 100, "128"), (48, 128, "384, which holds whole pages")]
)
def test_blocks_that_split_registers_or_pages_are_errors(page_size, block, unit):
    request = Request(q_len=1, kv_len=768, head_dim=128, page_size=page_size, mode="decode")
    with pytest.raises(ConfigError, match=f"block_kv={block} of ragged is not a multiple of {unit}"):
        Blocks.of(request, Tiling.of(block_kv=block))


def test_a_block_is_no_longer_than_the_keys():
    request = Request(q_len=1, kv_len=300, head_dim=128, mode="decode")
    assert Blocks.of(request, Tiling.of(block_kv=2**20)).slots == 384


def test_it_has_no_gradient():
    with pytest.raises(KernelRefusedError, match="no gradient of query"), testing.interpret():
        kernelry.attention(*arrays(), mode="decode", gradients=("query",), kernel="ragged")


def test_pages_that_do_not_fit_are_laid_side_by_side():
    facts = {"q_heads": 8, "head_dim": 128, "dtype": "bfloat16", "mode": "decode", "target": "tpu:v5e"}
    request = Request(q_len=1, kv_len=3200, page_size=100, **facts)
    assert [str(step.adapter.name) for step in kernelry.resolve(request, kernel="ragged").plan.steps] == [
        "gather_pages"
    ]
