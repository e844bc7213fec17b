"""pallas_decode in interpret mode against dot_product, what it visits, and what it refuses.

Interpret mode proves numbers; tests/aot compiles for GPUs: nothing here runs on one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import in_shuffled_pages
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.cache import PagedCache, QuantizedArray
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.plugin import Environment, Inputs, PagedArray, Request, Tiling
from kernelry_gpu_pallas.pallas_decode import splits, tilings
from kernelry_gpu_pallas.pallas_decode.shared_memory import need
from kernelry_gpu_pallas.pallas_decode.spec import PALLAS_DECODE
from kernelry_gpu_pallas.shared_memory import available

B, S = 3, 150
LENGTHS = np.array([S, 70, 0], np.int32)
SMALL = {"block_kv": 16, "splits": 3}


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


def arrays(heads=4, kv_heads=2, head_dim=24, value_dim=16, q_len=1, dtype="float32", slots=S):
    rng = np.random.default_rng(0)
    shapes = (B, q_len, heads, head_dim), (B, slots, kv_heads, head_dim), (B, slots, kv_heads, value_dim)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def through_decode(*operands, tiling=SMALL, **options):
    with testing.interpret(), kernelry.use(tiling=tiling):
        return kernelry.attention(*operands, kernel="pallas_decode", mode="decode", **options)


def dense(*operands, **options):
    return kernelry.attention(*operands, kernel="dot_product", mode="decode", **options)


def check(operands, atol=2e-6, **options):
    found, wanted = through_decode(*operands, **options), dense(*operands, **options)
    assert found.dtype == operands[0].dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=atol, atol=atol)


LAST = jnp.maximum(LENGTHS - 1, 0)
IDS = np.repeat([[0, -1, 2, 2, 5]], 30, axis=1).repeat(B, 0)
MASKS = {
    "full": masks.Full(),
    "lengths": masks.Lengths(LENGTHS),
    "window": masks.SlidingWindow(40).at(query_offset=LAST) & masks.Lengths(LENGTHS),
    "chunked": masks.Chunked(48).at(query_offset=LAST),
    "offset_of_one_row": masks.Causal().at(query_offset=np.array([70])),
    "predicate": masks.Predicate(every_third).at(query_offset=LAST),
    "segments": masks.Segments(np.array([[0], [2], [-1]]), IDS),
    "dense_by_head": masks.Dense(np.arange(B * 4 * S).reshape(B, 4, 1, S) % 5 == 1),
    "any_of": masks.SlidingWindow(9).at(query_offset=LAST) | masks.Lengths(np.array([4, 0, 1])),
}
QUICK = ("window", "dense_by_head")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.sweep) for n in MASKS])
def test_masks_agree_with_dense(name):
    check(arrays(), mask=MASKS[name], soft_cap=3.0, scale=0.3)


@pytest.mark.sweep
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "value_dim"), [(4, 4, 128, 64), (48, 1, 16, 16)])
def test_heads_and_dims_agree_with_dense(heads, kv_heads, head_dim, value_dim):
    check(arrays(heads, kv_heads, head_dim, value_dim), mask=MASKS["lengths"])


def test_several_queries_a_row_agree_with_dense():
    last = jnp.maximum(LENGTHS - 3, 0)
    by_head = masks.Dense(np.random.default_rng(1).random((1, 4, 3, S)) < 0.7)
    check(arrays(q_len=3), mask=masks.Causal().at(query_offset=last) & masks.Lengths(LENGTHS, [3, 2, 0]) & by_head)


@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_narrow_dtypes_stay_within_their_tolerance(dtype, atol):
    check(arrays(dtype=dtype), atol=atol, mask=MASKS["lengths"])


def test_a_partial_holds_maximum_and_sum_of_an_output_that_is_not_divided():
    options = {"mask": MASKS["window"], "return_partial": True, "return_max_logits": True}
    found, top = through_decode(*arrays(), **options)
    wanted, wanted_top = dense(*arrays(), **options)
    assert found.lse is None
    np.testing.assert_allclose(found.max + jnp.log(found.sum), wanted.lse, rtol=2e-6, atol=2e-6)
    assert np.isneginf(found.max[2]).all()
    assert not found.sum[2].any()
    np.testing.assert_allclose(top, wanted_top, rtol=2e-6)
    divisor = jnp.where(found.sum == 0, 1, found.sum).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(found.out / divisor, wanted.out, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("how", ["int8", pytest.param("int8:heads_and_head_dim", marks=pytest.mark.sweep)])
def test_quantised_keys_agree_with_their_values(how):
    query, key, value = arrays()
    held = QuantizedArray.quantize(key, how), QuantizedArray.quantize(value, how)
    found = through_decode(query, *held, mask=MASKS["lengths"])
    wanted = dense(query, *(array.dequantize() for array in held), mask=MASKS["lengths"])
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("page_size", [16, pytest.param(6, marks=pytest.mark.sweep)])
def test_pages_are_read_through_the_table(page_size):
    query, key, value = arrays(slots=96)
    mask = masks.Lengths(np.array([96, 40, 0]))
    pages, value_pages, table = in_shuffled_pages(key, value, page_size)
    table[1, -2:] = -1  # the lengths end before
    held = PagedArray(pages, table), PagedArray(value_pages, table)
    found = through_decode(query, *held, mask=mask)
    np.testing.assert_allclose(found, dense(query, key, value, mask=mask), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("missing", [-1, 10_000])
def test_a_page_that_is_not_there_shows_nan_where_it_is_seen(missing):
    query, key, value = arrays(slots=48)
    pages, value_pages, table = in_shuffled_pages(key, value, 16)
    table[0, 1] = missing
    out = through_decode(
        query, PagedArray(pages, table), PagedArray(value_pages, table), mask=masks.Lengths(np.array([48, 48, 0]))
    )
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


def test_a_paged_cache_is_read_where_it_stands():
    sizes = {"kv_heads": 2, "head_dim": 24, "dtype": jnp.float32}
    cache = PagedCache.create(rows=B, pages=16, page_size=16, max_length=64, **sizes)
    _, key, value = arrays(value_dim=24, slots=24)
    cache = cache.prefill(key, value, lengths=jnp.asarray([24, 5, 17]))
    query, new_key, new_value = arrays(value_dim=24, slots=1)
    wanted, _ = cache.decode(query, new_key, new_value, mask=masks.Causal(), kernel="dot_product")
    with testing.interpret(), kernelry.use(tiling=SMALL), kernelry.record() as resolutions:
        found, _ = cache.decode(query, new_key, new_value, mask=masks.Causal(), kernel="pallas_decode")
    assert resolutions[0].plan.steps == ()
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


def test_a_part_that_sees_nothing_and_nan_in_hidden_slots_leave_no_trace():
    query, key, value = arrays()
    hidden = np.arange(S)[None, :, None, None] >= LENGTHS[:, None, None, None]
    dirty = (jnp.where(hidden, jnp.nan, array) for array in (key, value))
    found = through_decode(query, *dirty, mask=MASKS["lengths"])
    np.testing.assert_allclose(found, dense(query, key, value, mask=MASKS["lengths"]), rtol=2e-6, atol=2e-6)
    assert not np.asarray(found[2]).any()


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("lengths", [10, 5, 0]), ("window", [4, 4, 0])],
)
def test_the_blocks_visited_follow_what_each_row_sees(name, blocks, monkeypatch):
    """Counted while the kernel runs: 150 slots are 10 blocks of 16, 41 visible slots end in 3 or 4 of them."""
    counted = []
    plain = splits.Logits.__call__

    def counting(self, *operands):
        jax.debug.callback(lambda: counted.append(1))
        return plain(self, *operands)

    monkeypatch.setattr(splits.Logits, "__call__", counting)
    for row, wanted in enumerate(blocks):
        counted.clear()
        one = slice(row, row + 1)
        query, key, value = (array[one] for array in arrays(heads=1, kv_heads=1))
        length = LENGTHS[one]
        mask = masks.Lengths(length)
        if name == "window":
            mask = mask & masks.SlidingWindow(40).at(query_offset=jnp.maximum(length - 1, 0))
        jax.block_until_ready(through_decode(query, key, value, mask=mask))
        jax.effects_barrier()
        assert len(counted) <= wanted
        assert bool(counted) == bool(wanted)


REQUEST = Request(
    target="gpu:h100", mode="decode", batch=8, q_len=1, kv_len=8192, q_heads=32, kv_heads=8, head_dim=128,
    dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(("batch", "parts"), [(1, 32), (8, 5), (64, 1)])
def test_few_rows_are_split_among_more_programs(batch, parts):
    assert PALLAS_DECODE.tilings(dataclasses.replace(REQUEST, batch=batch))[0]["splits"] == parts


@pytest.mark.parametrize("target", ["gpu:a100", "gpu:a10g", "gpu:h100", "gpu:b200", "gpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("q_len", [1, 16])
@pytest.mark.parametrize("more", [{}, {"kv_quantization": "int8"}, {"page_size": 16}], ids=["", "int8", "pages"])
def test_every_tiling_of_the_search_space_fits_shared_memory_or_there_is_none(target, dtype, head_dim, q_len, more):
    request = dataclasses.replace(
        REQUEST, target=kernelry.Target.parse(target), dtype=dtype, head_dim=head_dim, value_dim=head_dim, q_len=q_len,
        **more,
    )  # fmt: skip
    refused = PALLAS_DECODE.refusals(request, Environment())
    if refused:
        assert (dtype, head_dim, q_len, available(request)) == ("float32", 256, 16, 101376)
        return
    found = PALLAS_DECODE.tilings(request)
    assert found
    for tiling in found:
        tilings.check(request, tiling)
        asked = need(request, tiling)
        assert asked.least <= asked.most <= available(request)


def test_where_the_smallest_block_does_not_fit_it_is_refused():
    request = dataclasses.replace(
        REQUEST, target=kernelry.Target.parse("gpu:a10g"), dtype="float32", head_dim=256, value_dim=256, q_len=16
    )
    (refusal,) = PALLAS_DECODE.refusals(request, Environment())
    needed = need(request, PALLAS_DECODE.tilings(request)[0]).most
    assert f"may take {needed} bytes of shared memory for q_len=16 × 4 query heads" in refusal.detail
    assert "of float32 > 101376 of gpu:a10g" in refusal.detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_kv": 48}, "block_kv=48 of pallas_decode is no power of two"),
        ({"block_kv": 8}, "block_kv=8 of pallas_decode < 16"),
        ({"block_kv": 512}, r"block_kv=512, num_stages=3 of pallas_decode take at least \d+ bytes .* > 232448 of gpu"),
        ({"num_warps": 3}, "num_warps=3 of pallas_decode is no power of two"),
        ({"num_warps": 0}, "num_warps=0 of pallas_decode < 1"),
        ({"num_warps": 64}, "num_warps=64 of pallas_decode > 32"),
        ({"num_stages": 0}, "num_stages=0 of pallas_decode < 1"),
        ({"splits": 0}, "splits=0 of pallas_decode < 1"),
    ],
)
def test_a_tiling_that_cannot_compile_is_an_error(change, message):
    tiling = Tiling.of(**{**dict(PALLAS_DECODE.tilings(REQUEST)[0].values), **change})
    with pytest.raises(ConfigError, match=message):
        PALLAS_DECODE.body().forward(Inputs(*arrays()), REQUEST, tiling, statistics=False)


def test_a_tiling_of_a_config_that_cannot_compile_is_an_error_in_interpret_mode_too():
    with pytest.raises(ConfigError, match="block_kv=48 of pallas_decode is no power of two"):
        through_decode(*arrays(), tiling={"block_kv": 48})


def test_the_number_of_parts_need_not_be_a_power_of_two():
    tilings.check(REQUEST, PALLAS_DECODE.tilings(REQUEST)[0].replace({"splits": 3}, "pallas_decode"))


def test_prompts_are_refused():
    query, key, value = arrays(q_len=64)
    message = r"q_len=64 × 2 query heads per key head = 128 rows > 64"
    mask = masks.Causal().at(query_offset=0)
    with testing.interpret(), pytest.raises(KernelRefusedError, match=message):
        kernelry.attention(query, key, value, mask=mask, mode="decode", kernel="pallas_decode")


def test_training_is_refused():
    query, key, value = arrays(q_len=1)
    with (
        testing.interpret(),
        kernelry.use(policy=NO_ADAPTERS),
        pytest.raises(KernelRefusedError, match="mode=train is not decode"),
    ):
        kernelry.attention(query, key, value, kernel="pallas_decode")
