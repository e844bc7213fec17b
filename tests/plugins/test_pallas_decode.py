"""pallas_decode in interpret mode against the float64 oracle, what it visits, and what it refuses.

Interpret mode proves numbers; tests/aot compiles for GPUs: nothing here runs on one.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import in_shuffled_pages, written
from pairs import covering
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


def oracle(*operands, **options):
    """In float64; keys and values that are quantised or in pages as floats in rows."""
    plain = (np.asarray(a.dequantize() if isinstance(a, QuantizedArray) else a, np.float64) for a in operands)
    return testing.reference_attention(*plain, **{"mask": masks.Full(), **options})


def near(found, wanted, atol=2e-6):
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=atol, atol=atol)


def check(operands, atol=2e-6, **options):
    found = through_decode(*operands, **options)
    assert found.dtype == operands[0].dtype
    near(found, oracle(*operands, **options).out, atol)


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
SLOTS = 48
SMOKE = covering(
    mask=["static", "by_slots", "by_ids", "dense_by_head"],
    held=["rows", "int8", "int8 in pages"],
    dtype=["float32", "bfloat16", "float16"],
    sizes=[(1, 2, 16), (3, 1, 24), (3, 4, 16)],  # T, K and H
    more=[{}, {"soft_cap": 3.0, "scale": 0.3}],
    tiling=[SMALL, {"block_kv": 32, "splits": 1}],
)
TOLERANCES = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}


def smoke_mask(name, q_len):
    """Row 2 sees nothing, but for the static mask."""
    lengths = np.array([SLOTS, 20, 0], np.int32)
    ids = np.repeat([[0, -1, 2, 2, 5, 5]], 8, axis=1).repeat(B, 0)
    last = jnp.maximum(lengths - q_len, 0)
    within = masks.Lengths(lengths, np.array([q_len, 1, 0]))
    return {
        "static": masks.SlidingWindow(20).at(query_offset=SLOTS - 8),
        "by_slots": masks.Causal().at(query_offset=last) & masks.SlidingWindow(18).at(query_offset=last) & within,
        "by_ids": masks.Segments(np.repeat([[0], [2], [-1]], q_len, axis=1), ids)
        | masks.PrefixLM(np.array([9, 3, 0])).at(query_offset=-9),
        "dense_by_head": masks.Dense(np.random.default_rng(1).random((1, 4, q_len, SLOTS)) < 0.4) & within,
    }[name]


def poisoned(array, visible):
    """NaN where no query sees it."""
    shape = (B, array.shape[2], -1, *visible.shape[2:])
    seen = visible.reshape(shape).any(axis=(2, 3)).swapaxes(1, 2)[..., None]
    return jnp.asarray(np.where(seen, array, np.float32(np.nan)))


def held_as(how, key, value, dtype):
    """Keys and values as the kernel takes them, with the table of pages if there is one; and as the oracle does."""
    if "int8" not in how:
        return (rows := tuple(array.astype(dtype) for array in (key, value))), rows
    quantised = tuple(quantise(array) for array in (key, value))
    if "pages" not in how:
        return quantised, quantised
    *pages, table = in_shuffled_pages(key, value, 8)
    return (*(quantise(array) for array in pages), jnp.asarray(table)), quantised


@jax.jit
def quantise(array):
    return QuantizedArray.quantize(array, "int8")


def in_pages(query, key, value, table):
    """Operands of a call; a traced table is shared."""
    return query, PagedArray(key, table), PagedArray(value, table)


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: " ".join(map(str, list(case.values())[:4])))
def test_every_two_features_agree_with_the_oracle_whatever_hidden_slots_hold(case):
    q_len, kv_heads, head_dim = case["sizes"]
    query, key, value = arrays(4, kv_heads, head_dim, head_dim, q_len, slots=SLOTS)
    options = {"mask": smoke_mask(case["mask"], q_len), **case["more"]}
    visible = testing.reference_mask(options["mask"], B, 4, q_len, SLOTS)
    held, plain = held_as(case["held"], poisoned(key, visible), poisoned(value, visible), case["dtype"])
    query = query.astype(case["dtype"])
    place = in_pages if len(held) > 2 else lambda *operands: operands
    found = jax.jit(lambda *given: through_decode(*place(*given), tiling=case["tiling"], **options))(query, *held)
    assert found.dtype == query.dtype
    near(found, oracle(query, *plain, **options).out, TOLERANCES[case["dtype"]])


@pytest.mark.sweep
@pytest.mark.parametrize("name", MASKS)
def test_masks_agree_with_the_oracle(name):
    check(arrays(), mask=MASKS[name], soft_cap=3.0, scale=0.3)


@pytest.mark.sweep
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "value_dim"), [(4, 4, 128, 64), (48, 1, 16, 16)])
def test_heads_and_dims_agree_with_the_oracle(heads, kv_heads, head_dim, value_dim):
    check(arrays(heads, kv_heads, head_dim, value_dim), mask=MASKS["lengths"])


@pytest.mark.sweep
def test_several_queries_a_row_agree_with_the_oracle():
    last = jnp.maximum(LENGTHS - 3, 0)
    by_head = masks.Dense(np.random.default_rng(1).random((1, 4, 3, S)) < 0.7)
    check(arrays(q_len=3), mask=masks.Causal().at(query_offset=last) & masks.Lengths(LENGTHS, [3, 2, 0]) & by_head)


@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_narrow_dtypes_stay_within_their_tolerance(dtype, atol):
    check(arrays(dtype=dtype), atol=atol, mask=MASKS["lengths"])


def test_a_partial_holds_maximum_and_sum_of_an_output_that_is_not_divided():
    options = {"mask": MASKS["window"], "return_partial": True, "return_max_logits": True}
    found, top = jax.jit(lambda *operands: through_decode(*operands, **options))(*arrays())
    wanted = oracle(*arrays(), mask=MASKS["window"])
    assert found.lse is None
    with np.errstate(divide="ignore"):
        near(np.asarray(found.max) + np.log(found.sum), wanted.lse)
    assert np.isneginf(found.max[2]).all()
    assert not found.sum[2].any()
    near(top, wanted.max_logits)
    weight = np.asarray(found.sum)
    near(np.asarray(found.out) / np.where(weight == 0, 1, weight).swapaxes(1, 2)[..., None], wanted.out)


@pytest.mark.sweep
@pytest.mark.parametrize("how", ["int8", "int8:heads_and_head_dim"])
def test_quantised_keys_agree_with_their_values(how):
    query, key, value = arrays()
    check((query, *(QuantizedArray.quantize(array, how) for array in (key, value))), mask=MASKS["lengths"])


@pytest.mark.parametrize("page_size", [16, pytest.param(6, marks=pytest.mark.sweep)])
def test_pages_are_read_through_the_table(page_size):
    query, key, value = arrays(slots=SLOTS)
    mask = masks.Lengths(np.array([SLOTS, 20, 0]))
    pages, value_pages, table = in_shuffled_pages(key, value, page_size)
    table[1, -1:] = -1  # the lengths end before
    operands = query, pages, value_pages, table
    found = jax.jit(lambda *given: through_decode(*in_pages(*given), mask=mask))(*operands)
    near(found, oracle(query, key, value, mask=mask).out)


def test_a_page_that_is_not_there_shows_nan_where_it_is_seen():
    query, key, value = arrays(slots=SLOTS)
    pages, value_pages, table = in_shuffled_pages(key, value, 16)
    mask = masks.Lengths(np.array([SLOTS, SLOTS, 0]))

    def run(table):
        return through_decode(*in_pages(query, pages, value_pages, table), mask=mask)

    run = jax.jit(run)
    for missing in (-1, 10_000):
        table[0, 1] = missing
        out = run(jnp.asarray(table))
        assert np.isnan(out[0]).all()
        assert np.isfinite(out[1:]).all()


def test_a_paged_cache_is_read_where_it_stands():
    sizes = {"kv_heads": 2, "head_dim": 24, "dtype": jnp.float32}
    cache = PagedCache.create(rows=B, pages=16, page_size=16, max_length=64, **sizes)
    query, key, value = arrays(value_dim=24, slots=25)
    before = np.array([24, 5, 17])
    cache = written(cache, key[:, :24], value[:, :24], jnp.asarray(before), method="prefill")

    def decode(cache, *operands):
        return cache.decode(*operands, mask=masks.Causal(), kernel="pallas_decode")

    with testing.interpret(), kernelry.use(tiling=SMALL), kernelry.record() as resolutions:
        found, _ = jax.jit(decode)(cache, query, key[:, 24:], value[:, 24:])
    assert resolutions[0].plan.steps == ()
    rows = np.arange(B)
    key, value = (np.array(array) for array in (key, value))
    key[rows, before], value[rows, before] = key[:, 24], value[:, 24]
    near(found, oracle(query, key, value, mask=masks.Lengths(before + 1)).out)


@pytest.mark.parametrize(("name", "blocks"), [("lengths", [10, 5, 0]), ("window", [4, 4, 0])])
def test_the_blocks_visited_follow_what_each_row_sees(name, blocks, monkeypatch):
    """Counted while the kernel runs: 150 slots are 10 blocks of 16, 41 visible slots end in 3 or 4 of them."""
    counted = []
    plain = splits.Logits.of_products

    def counting(self, *operands):
        jax.debug.callback(lambda: counted.append(1))
        return plain(self, *operands)

    def run(query, key, value, length):
        mask = masks.Lengths(length)
        if name == "window":
            mask = mask & masks.SlidingWindow(40).at(query_offset=jnp.maximum(length - 1, 0))
        return through_decode(query, key, value, mask=mask)

    monkeypatch.setattr(splits.Logits, "of_products", counting)
    run, operands = jax.jit(run), [array[:1] for array in arrays(heads=1, kv_heads=1)]
    for length, wanted in zip(LENGTHS, blocks, strict=True):
        counted.clear()
        jax.block_until_ready(run(*operands, jnp.asarray([length])))
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


def wrong_needs(request):
    """Of the tilings for a request, what is asked for and does not fit; where it is refused, for which facts."""
    if PALLAS_DECODE.refusals(request, Environment()):
        facts = request.dtype, request.head_dim, request.q_len, available(request)
        return [] if facts == ("float32", 256, 16, 101376) else [facts]
    found = PALLAS_DECODE.tilings(request)
    for tiling in found:
        tilings.check(request, tiling)
    needs = [need(request, tiling) for tiling in found]
    return [asked for asked in needs if not asked.least <= asked.most <= available(request)] if found else ["no tiling"]


@pytest.mark.parametrize("more", [{}, {"kv_quantization": "int8"}, {"page_size": 16}], ids=["", "int8", "pages"])
def test_every_tiling_of_the_search_space_fits_shared_memory_or_there_is_none(more):
    targets = [kernelry.Target.parse(f"gpu{name}") for name in (":a100", ":a10g", ":h100", ":b200", "")]
    wrong = {}
    for target, dtype, dim, q_len in itertools.product(targets, ("bfloat16", "float32"), (64, 80, 128, 256), (1, 16)):
        facts = {"target": target, "dtype": dtype, "head_dim": dim, "value_dim": dim, "q_len": q_len}
        wrong[str(facts)] = wrong_needs(dataclasses.replace(REQUEST, **facts, **more))
    assert {facts: problems for facts, problems in wrong.items() if problems} == {}


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
        ({"block_kv": 48}, "block_kv=48 of pallas_decode is not a power of two"),
        ({"block_kv": 8}, "block_kv=8 of pallas_decode < 16"),
        ({"block_kv": 512}, r"block_kv=512, num_stages=3 of pallas_decode take at least \d+ bytes .* > 232448 of gpu"),
        ({"num_warps": 3}, "num_warps=3 of pallas_decode is not a power of two"),
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
    with pytest.raises(ConfigError, match="block_kv=48 of pallas_decode is not a power of two"):
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
