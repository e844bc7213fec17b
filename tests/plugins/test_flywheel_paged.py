"""flywheel_paged: its numbers by the interpreter of TPUs, what no query sees, and what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.cache import PagedCache
from kernelry.errors import ConfigError
from kernelry.plugin import Environment, Inputs, PagedArray, Tiling, ValueInKey
from kernelry.request.request import Request
from kernelry_tpu_flywheel.paged.preference import ranked_paged
from kernelry_tpu_flywheel.paged.spec import FLYWHEEL_PAGED

pytestmark = pytest.mark.versions

PAGE, POOL = 128, 16
V6E = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"))
LENGTHS = np.array([300, 0, 129, 384], np.int32)
CHUNK = 5
HERE = Environment(versions=(("flywheel-tpu", "0.3.0"),))


@pytest.fixture
def vendor():
    return pytest.importorskip("flywheel_tpu", reason="flywheel-tpu is not installed")


class Held:
    """Queries, and keys and values in shuffled pages of a pool, of which all that is in no row is NaN.

    What is hidden within a row's pages is finite unless a test says otherwise.
    """

    def __init__(self, q_len, q_heads, kv_heads, width, pages=3, rows=4):
        rng = np.random.default_rng(0)
        self.query = _rounded(rng.standard_normal((rows, q_len, q_heads, width)))
        self.key, self.value = (_rounded(rng.standard_normal((rows, pages * PAGE, kv_heads, width))) for _ in "kv")
        self.table = 1 + rng.permutation(POOL - 2)[: rows * pages].reshape(rows, pages).astype(np.int32)

    def arrays(self):
        """The query, the pool and its table."""
        rows, slots, heads, width = self.key.shape
        pool = np.full((POOL, PAGE, 2 * heads, width), np.nan, np.float32)
        there = self.table >= 0
        for side, held in enumerate((self.key, self.value)):
            pool[self.table[there], :, side::2] = held.reshape(rows, slots // PAGE, PAGE, heads, width)[there]
        return jnp.asarray(self.query, jnp.bfloat16), jnp.asarray(pool, jnp.bfloat16), jnp.asarray(self.table)

    def wanted(self, mask, **options):
        """Dense attention in float64."""
        finite = (np.nan_to_num(array.astype(np.float64)) for array in (self.key, self.value))
        return testing.reference_attention(self.query.astype(np.float64), *finite, mask=mask, **options)


def _rounded(array):
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap"))
def _attend(query, pool, table, mask, scale=None, soft_cap=None):
    """One program: the result, and whether the vendor's kernels made it."""
    from kernelry_tpu_flywheel.paged.rows import Rows

    key, value = PagedArray(pool, table, interleaved=True), ValueInKey(pool.shape[3])
    with kernelry.record() as resolutions:
        found = kernelry.attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            soft_cap=soft_cap,
            mode="decode",
            kernel="flywheel_paged",
            return_partial=True,
        )
    [resolution] = resolutions
    request, tiling = resolution.request, resolution.plan.tiling
    rows = Rows.of(Inputs(query, key, value, mask.canonical()), request, tiling)
    return found.out, found.lse, rows.expressible


def attend(held, mask, **options):
    with testing.interpret():
        found = _attend(*held.arrays(), mask, **options)
        return tuple(np.asarray(array, np.float32) for array in jax.block_until_ready(found))


def agrees(held, mask, *, by_vendor=True, tolerance=2e-2, **options):
    out, lse, expressible = attend(held, mask, **options)
    wanted = held.wanted(mask, **options)
    assert bool(expressible) == by_vendor
    np.testing.assert_allclose(out, wanted.out, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, wanted.lse, rtol=tolerance, atol=tolerance)
    assert not out[np.isneginf(wanted.lse).swapaxes(1, 2)].any()


def decode_rows():
    return Held(1, 8, 2, 128)


def lengths(counts=LENGTHS, queries=None):
    """Traced, as a cache has them: one program for all of them."""
    return masks.Lengths(jnp.asarray(counts), None if queries is None else jnp.asarray(queries))


def last_tokens(counts, q_len, left=None, queries=None):
    """The mask of a cache whose rows end in these queries."""
    base = masks.Causal() if left is None else masks.SlidingWindow(left, 0)
    own = q_len if queries is None else queries
    return base.at(query_offset=jnp.asarray(counts - own)) & lengths(counts, queries)


def test_rows_of_different_length_agree_with_dense_and_empty_ones_are_zero(vendor):
    agrees(decode_rows(), lengths())


def test_pages_may_be_shared_by_rows(vendor):
    held = decode_rows()
    held.table[3], held.key[3], held.value[3] = held.table[0], held.key[0], held.value[0]
    held.query[3] = held.query[0]
    agrees(held, lengths())


def test_hidden_nan_does_not_leak_whether_it_is_copied_with_the_row_or_not(vendor):
    held = decode_rows()
    held.key[0, 304:] = held.value[0, 304:] = np.nan  # no tile of 8 slots has both these and slot 299
    held.key[2, 129:] = np.inf  # hidden keys do no harm, wherever they are
    agrees(held, lengths())
    held.value[2, 135] = np.nan  # copied together with slot 128
    agrees(held, lengths(), by_vendor=False)


def test_what_is_seen_shows_its_nan_and_its_absence_in_its_own_row_alone(vendor):
    held = decode_rows()
    held.table[0, 2] = -1
    held.table[2, 2] = -1  # not seen
    out, lse, expressible = attend(held, lengths())
    wanted = held.wanted(lengths())
    assert expressible
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0]).all()
    np.testing.assert_allclose(out[1:], wanted.out[1:], rtol=2e-2, atol=2e-2)
    held = decode_rows()
    held.value[3, 17, 1, 5] = np.nan
    out, *_ = attend(held, lengths())
    assert np.isnan(out[3, :, 4:, 5]).all()
    assert np.isfinite(out[:3]).all()


def test_a_window_and_a_soft_cap(vendor):
    """Pages before the window need not be there."""
    held = Held(1, 6, 2, 128)
    held.table[0, 0] = held.table[3, 0] = -1
    agrees(held, last_tokens(LENGTHS, 1, left=99), soft_cap=5.0)


def test_nan_in_the_page_in_which_a_window_begins_does_not_leak(vendor):
    held = Held(1, 6, 2, 128)
    held.value[3, 256:284] = np.nan
    agrees(held, last_tokens(LENGTHS, 1, left=99), soft_cap=5.0, by_vendor=False)


@pytest.mark.sweep
def test_wide_heads_of_one_key_head_at_another_scale(vendor):
    agrees(Held(1, 4, 1, 256), lengths(), scale=0.1)


def test_chunks_of_different_length_agree_with_dense(vendor):
    """A row without tokens, one with fewer queries, one with more queries than tokens before them."""
    held = Held(CHUNK, 8, 2, 128)
    counts, queries = np.array([300, 0, 3, 384]), np.array([5, 0, 3, 2])
    agrees(held, last_tokens(counts, CHUNK, queries=queries))


def test_queries_that_are_not_the_last_tokens_are_right_without_the_vendor(vendor):
    held = Held(CHUNK, 8, 2, 128)
    counts, queries = np.array([300, 0, 3, 384]), np.array([5, 0, 3, 2])
    mask = masks.Causal().at(query_offset=jnp.asarray(counts - 1)) & lengths(counts, queries)
    agrees(held, mask, by_vendor=False)


@pytest.mark.sweep
def test_a_chunk_under_a_window(vendor):
    held = Held(CHUNK, 4, 2, 128)
    held.table[3, 0] = -1
    agrees(held, last_tokens(LENGTHS, CHUNK, left=99), scale=0.2)


def test_a_cache_decodes_in_place_as_one_of_separate_pages_does(vendor):
    """A fork, a donated cache, and rows that grow over the end of a page."""
    rng = np.random.default_rng(0)
    sizes = {"rows": 3, "pages": 9, "page_size": PAGE, "max_length": 2 * PAGE, "kv_heads": 2, "head_dim": 128}
    tokens = [jnp.asarray(rng.standard_normal((3, 126, 2, 128)), jnp.bfloat16) for _ in "kv"]
    steps = jnp.asarray(rng.standard_normal((4, 3, 1, 12, 128)), jnp.bfloat16)

    def step(kernel):
        @functools.partial(jax.jit, donate_argnums=0)
        def decode(cache, heads):
            out, after = cache.decode(heads[:, :, :8], heads[:, :, 8:10], heads[:, :, 10:], kernel=kernel)
            return after, out

        return decode

    def outputs(layout, kernel):
        cache = PagedCache.create(**sizes, layout=layout)
        cache = cache.append(*tokens, lengths=jnp.array([126, 7, 0])).fork(0, 2)
        decode, found = step(kernel), []
        for heads in steps:
            before = cache.keys[0]
            cache, out = decode(cache, heads)
            assert before.is_deleted()
            found.append(np.asarray(jax.block_until_ready(out), np.float32))
        return np.stack(found)

    with testing.interpret():
        found = outputs("interleaved", "flywheel_paged")
    np.testing.assert_allclose(found, outputs("separate", "dot_product"), rtol=2e-2, atol=2e-2)


@pytest.mark.sweep
def test_a_batch_of_calls_is_one_after_another(vendor):
    held = decode_rows()
    with testing.interpret():
        query, pool, table = held.arrays()
        queries, counts = jnp.stack([query, -query]), jnp.stack([jnp.asarray(LENGTHS), jnp.asarray(LENGTHS) // 2])

        @jax.jit
        def both(queries, counts):
            def one(query, counts):
                return _attend(query, pool, table, masks.Lengths(counts))[0]

            return jax.vmap(one)(queries, counts)

        found = np.asarray(jax.block_until_ready(both(queries, counts)), np.float32)
    for sign, out, own in zip((1, -1), found, np.asarray(counts), strict=True):
        flipped = decode_rows()
        flipped.query *= sign
        np.testing.assert_allclose(out, flipped.wanted(masks.Lengths(own)).out, rtol=2e-2, atol=2e-2)


def request_of(**facts):
    usual = {
        "q_len": 1,
        "kv_len": 512,
        "q_heads": 8,
        "kv_heads": 2,
        "head_dim": 128,
        "dtype": "bfloat16",
        "page_size": PAGE,
        "kv_layout": "interleaved",
        "mode": "decode",
        "target": "tpu:v6e",
        "mask": masks.Lengths([9]),
    }
    return Request(**{**usual, **facts})


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("left", [None, 200])
def test_the_program_makes_no_other_pool(vendor, lower, q_len, left):
    """Lowered for a TPU: nothing results in an array of the pool's shape or size, nor of all pages of the rows."""

    def step(query, pool, table, counts):
        base = masks.Causal() if left is None else masks.SlidingWindow(left, 0)
        mask = base.at(query_offset=counts - q_len) & masks.Lengths(counts)
        held = PagedArray(pool, table, interleaved=True), ValueInKey(128)
        return kernelry.attention(query, *held, mask=mask, mode="decode", kernel="flywheel_paged")

    shapes = ((4, q_len, 8, 128), (100, PAGE, 4, 128), (4, 16), (4,))
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32)
    given = [jax.ShapeDtypeStruct(*of) for of in zip(shapes, dtypes, strict=True)]
    _, lowered = lower(step, given, "tpu:v6e", mesh=V6E)
    text = lowered.as_text()
    assert text.count("tpu_custom_call") == 1
    results = re.findall(r"^ *%\S+ = .*-> (?:\()?(.*)$", text, re.MULTILINE)
    sizes = [
        np.prod([int(size) for size in found[:-1].split("x")])
        for line in results
        for found in re.findall(r"tensor<((?:\d+x)+)bf16>", line)
    ]
    assert sizes
    assert max(sizes) <= 4 * PAGE * 4 * 128  # one page of each row


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"kv_layout": "separate"}, "kv_layout=separate"),
        ({"kv_layout": "separate", "page_size": None}, "kv_layout=separate"),
        ({"dtype": "float32"}, "dtype=float32 is not bfloat16"),
        ({"head_dim": 192}, "head_dim=192 is not a multiple of 128"),
        ({"head_dim": 64}, "head_dim=64 < 128"),
        ({"q_heads": 6, "kv_heads": 3}, "kv_heads=3 is not 1, 2 or a multiple of 4"),
        ({"head_dim": 512}, "head_dim=512 > 256"),
        ({"page_size": 64}, "page_size=64 is not a multiple of 128"),
        ({"mode": "train"}, "mode=train is not decode or prefill"),
        ({"mask": masks.SlidingWindow(7, 3).at(query_offset=99)}, "window(7, 3) at query=99 ends 3 slots after"),
        ({"mask": masks.Causal().at(query_offset=9) & masks.SlidingWindow(5, 0).at(query_offset=7)}, "more than once"),
        ({"mask": masks.Causal().at(query_offset=9, kv_positions=np.arange(512)[::-1])}, "not consecutive"),
        ({"mask": masks.Dense(np.ones((1, 1, 1, 512), bool))}, "mask atom dense"),
        ({"sinks": True}, "sinks=True"),
        ({"max_logits": True}, "max_logits=True"),
        ({"batch": 4096, "kv_len": 2**15}, "a table of 4096 KiB of pages > the 896 KiB"),
        ({"batch": 64, "q_len": 4096, "mask": masks.Lengths([9])}, "logits of a page take 1024 MiB > 256"),
        ({"batch": 8192, "q_heads": 32, "kv_heads": 8}, "MiB of vector memory > 100"),
    ],
)
def test_refusals_have_values(facts, words):
    for policy in (NO_ADAPTERS, None):
        [candidate] = kernelry.explain(
            request_of(**facts), kernel="flywheel_paged", kernels=(FLYWHEEL_PAGED,), policy=policy, environment=HERE
        ).candidates
        told = " ".join(refusal.detail for refusal in candidate.refusals)
        assert (policy is None and not candidate.refusals) or words in told


def test_separate_pages_are_told_of_the_layout_of_a_cache():
    found = kernelry.explain(request_of(kv_layout="separate"), kernel="flywheel_paged", kernels=(FLYWHEEL_PAGED,))
    [candidate] = found.candidates
    assert any("PagedCache.create(layout='interleaved')" in (refusal.remedy or "") for refusal in candidate.refusals)


def test_auto_takes_it_for_interleaved_pages_and_says_why(vendor):
    found = kernelry.explain(request_of())
    assert found.kernel == "flywheel_paged"
    assert "reads interleaved pages where they are" in found.rule
    separate = request_of(kv_layout="separate")
    assert ranked_paged(separate, ["ragged", "flywheel_paged"]) is None
    assert kernelry.explain(separate).kernel == "ragged"
    assert ranked_paged(request_of(), ["ragged"]) is None


def test_without_the_vendor_it_says_how_to_install_it():
    missing = Environment(versions=(("flywheel-tpu", None),))
    [first, *_] = FLYWHEEL_PAGED.refusals(request_of(), missing)
    assert "kernelry-tpu-flywheel[flywheel]" in first.remedy


@pytest.mark.parametrize("facts", [{"partial": True}, {"statistics": True}])
def test_auto_does_not_merge_its_lse_with_that_of_other_kernels(facts):
    [reserved] = FLYWHEEL_PAGED.reservations(request_of(**facts))
    assert "2^-9" in reserved.detail
    assert FLYWHEEL_PAGED.reservations(request_of()) == ()


@pytest.mark.parametrize(
    ("facts", "default"),
    [
        ({}, {"block_kv": 512, "block_kv_compute": 512}),
        ({"kv_len": 8192}, {"block_kv": 1024, "block_kv_compute": 1024}),
        ({"kv_len": 7680, "page_size": 384}, {"block_kv": 768, "block_kv_compute": 384}),
        ({"kv_len": 8192, "kv_heads": 32, "q_heads": 32, "head_dim": 256}, {"block_kv": 128, "block_kv_compute": 128}),
        (
            {"kv_len": 8192, "q_len": 512},
            {"block_q": 512, "block_q_compute": 256, "block_kv": 1024, "block_kv_compute": 512},
        ),
        (
            {"kv_len": 8192, "q_len": 5, "q_heads": 32, "kv_heads": 1},
            {"block_q": 128, "block_q_compute": 32, "block_kv": 512, "block_kv_compute": 512},
        ),
    ],
)
def test_blocks_are_whole_pages_that_fit_into_vector_memory(facts, default):
    tilings = FLYWHEEL_PAGED.tilings(request_of(**facts))
    assert dict(tilings[0].values) == default
    assert all(tiling["block_kv"] % facts.get("page_size", PAGE) == 0 for tiling in tilings)


@pytest.mark.parametrize(
    ("q_len", "values", "words"),
    [
        (1, {"block_kv": 192, "block_kv_compute": 64}, "block_kv=192 of flywheel_paged is not a multiple of page_size"),
        (1, {"block_kv": 256, "block_kv_compute": 64}, "block_kv_compute=64"),
        (
            5,
            {"block_kv": 256, "block_kv_compute": 128, "block_q": 128, "block_q_compute": 128},
            "twice block_q_compute=128",
        ),
    ],
)
def test_blocks_that_do_not_fit_together_are_errors(vendor, q_len, values, words):
    with pytest.raises(ConfigError, match=words):
        FLYWHEEL_PAGED.body().forward(None, request_of(q_len=q_len), Tiling.of(**values), statistics=False)
