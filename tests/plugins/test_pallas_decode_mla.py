"""pallas_decode where the values are the first columns of the keys, in interpret mode against the float64 oracle.

Absorbed multi-head latent attention: H = 576, D = 512, one key/value head. Nothing here runs on a GPU.
"""

import dataclasses
import itertools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import in_shuffled_pages
from pairs import covering
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.cache import QuantizedArray
from kernelry.errors import KernelRefusedError
from kernelry.plugin import Environment, PagedArray, Request, ValueInKey
from kernelry_gpu_pallas.pallas_decode import tilings
from kernelry_gpu_pallas.pallas_decode.shared_memory import need
from kernelry_gpu_pallas.pallas_decode.spec import PALLAS_DECODE
from kernelry_gpu_pallas.shared_memory import available

B, S, H, D = 3, 48, 576, 512
LENGTHS = np.array([S, 21, 0], np.int32)
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
SMOKE = covering(
    mask=["lengths", "causal", "window", "dense_by_head", "full"],
    held=["rows", "pages", "int8", "int8 in pages"],
    dtype=["float32", "bfloat16", "float16"],
    sizes=[(1, 16), (4, 16), (1, 40)],  # T and N: rows of one tile, of four, of two and a half
    more=[{}, {"soft_cap": 3.0, "scale": 0.05}],
    tiling=[{"block_kv": 16, "block_rows": 16, "splits": 2}, {"block_kv": 32, "block_rows": 32, "splits": 1}],
)


def arrays(q_len=1, heads=16, width=H, slots=S, kv_heads=1):
    rng = np.random.default_rng(0)
    shapes = (B, q_len, heads, width), (B, slots, kv_heads, width)
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def mask_of(name, q_len):
    """Row 2 sees nothing, but under the full mask."""
    last = jnp.maximum(LENGTHS - q_len, 0)
    within = masks.Lengths(LENGTHS, np.array([q_len, 1, 0]))
    causal = masks.Causal().at(query_offset=last)
    return {
        "full": masks.Full(),
        "lengths": masks.Lengths(LENGTHS),
        "causal": causal & within,
        "window": causal & masks.SlidingWindow(18).at(query_offset=last) & within,
        "dense_by_head": masks.Dense(np.random.default_rng(1).random((1, 1, q_len, S)) < 0.4) & within,
    }[name]


def poisoned(key, visible):
    """NaN where no query sees it."""
    return np.where(visible.any(axis=(1, 2))[:, :, None, None], key, np.float32(np.nan))


@jax.jit
def quantise(key):
    return QuantizedArray.quantize(key, "int8")


def held_as(how, key, dtype, lengths=LENGTHS):
    """The key as the kernel takes it, and as the oracle does; pages behind the lengths do not exist."""
    plain = quantise(key) if "int8" in how else jnp.asarray(key, dtype)
    if "pages" not in how:
        return plain, plain
    pages, _, table = in_shuffled_pages(key, key, 8)
    table[np.arange(S // 8)[None] * 8 >= lengths[:, None]] = -1
    return PagedArray(quantise(pages) if "int8" in how else jnp.asarray(pages, dtype), jnp.asarray(table)), plain


def through_decode(query, key, *, width=D, tiling=None, **options):
    with testing.interpret(), kernelry.use(tiling=tiling, policy=NO_ADAPTERS):
        return kernelry.attention(query, key, ValueInKey(width), kernel="pallas_decode", mode="decode", **options)


def oracle(query, key, *, width=D, **options):
    key = np.asarray(key.dequantize() if isinstance(key, QuantizedArray) else key, np.float64)
    return testing.reference_attention(np.asarray(query, np.float64), key, key[..., :width], **options)


def near(found, wanted, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=atol, atol=atol)


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: " ".join(map(str, list(case.values())[:4])))
def test_every_two_features_agree_with_the_oracle_whatever_hidden_slots_hold(case):
    q_len, heads = case["sizes"]
    query, key = arrays(q_len, heads)
    query = jnp.asarray(query, case["dtype"])
    options = {"mask": mask_of(case["mask"], q_len), **case["more"]}
    visible = testing.reference_mask(options["mask"], B, heads, q_len, S)
    lengths = np.full(B, S) if case["mask"] == "full" else LENGTHS
    held, plain = held_as(case["held"], poisoned(key, visible), case["dtype"], lengths)
    found = jax.jit(lambda *given: through_decode(*given, tiling=case["tiling"], **options))(query, held)
    assert found.dtype == query.dtype
    assert found.shape == (B, q_len, heads, D)
    near(found, oracle(query, plain, **options).out, TOLERANCES[case["dtype"]])


@pytest.mark.parametrize(("width", "value"), [(80, 64), (48, 40), (64, 64)])
def test_other_widths_and_several_key_heads_agree_with_the_oracle(width, value):
    """48 columns are tiles of 64, of which 24 are padding, and of 16; 64 are one tile."""
    query, key = arrays(2, 40, width, slots=50, kv_heads=2)
    lengths = masks.Lengths(np.array([50, 21, 0]))
    options = {"mask": lengths, "width": value}
    found = jax.jit(lambda *given: through_decode(*given, tiling={"block_rows": 16}, **options))(query, key)
    near(found, oracle(query, key, **options).out)


def test_parts_of_the_keys_merge_to_the_whole():
    query, key = arrays(4, 16)
    whole = mask_of("causal", 4)
    first, second = masks.Lengths(np.full(B, 20)), masks.Dense(np.arange(S)[None, None, None] >= 20)

    @jax.jit
    def run(query, key):
        options = {"return_partial": True, "return_max_logits": True, "tiling": {"block_rows": 32}}
        found = [through_decode(query, key, mask=whole & part, **options) for part in (first, second)]
        return kernelry.finalize(kernelry.merge([part for part, _ in found])), found[0]

    out, (part, top) = run(query, key)
    near(out, oracle(query, key, mask=whole).out)
    wanted = oracle(query, key, mask=whole & first)
    with np.errstate(divide="ignore"):
        near(np.asarray(part.max) + np.log(part.sum), wanted.lse)
    near(top, wanted.max_logits)
    assert not part.sum[2].any()


def test_a_page_that_is_not_there_shows_nan_where_it_is_seen():
    query, key = arrays()
    held, plain = held_as("pages", key, "float32", np.full(B, S))
    mask = masks.Lengths(np.array([S, 21, 0]))
    missing = PagedArray(held.pages, held.table.at[0, 1].set(-1).at[1, 4].set(10_000))
    out = jax.jit(lambda *given: through_decode(*given, mask=mask, tiling={"block_kv": 16}))(query, missing)
    assert np.isnan(out[0]).all()
    near(out[1:], oracle(query, plain, mask=mask).out[1:])


@pytest.mark.parametrize(("held", "arrays_read"), [("rows", 1), ("int8", 2), ("pages", 2), ("int8 in pages", 3)])
def test_the_cache_is_one_operand_of_the_kernel_and_each_step_reads_each_column_once(held, arrays_read):
    """Read by the kernel: the cache, its scale, its table; and, of a row of the batch, visits, queries and a length."""
    query, key = arrays(1, 16)
    stored, _ = held_as(held, key, "float32")
    options = {"mask": masks.Lengths(LENGTHS), "tiling": {"block_kv": 32, "block_rows": 16}}
    program = jax.make_jaxpr(lambda *given: through_decode(*given, **options))(query, stored)
    (call,) = (eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "pallas_call")
    assert len(call.invars) == 3 + arrays_read
    assert [var.aval.shape[-1] for var in call.invars if var.aval.ndim == 4 and var.aval.shape[2] == 1].count(H) == 1
    inside = [eqn for inner in jax.extend.core.jaxprs_in_params(call.params) for eqn in equations(inner)]
    loads = [eqn for eqn in inside if eqn.primitive.name in ("get", "masked_load")]
    read = [load.outvars[0].aval.shape for load in loads if load.outvars[0].aval.shape[:1] == (32,)]
    assert sorted(shape for shape in read if len(shape) == 2) == [(32, 64), (32, 512)]


def equations(jaxpr):
    """Those of a program and of what it calls, but for kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from equations(inner)


REQUEST = Request(
    target="gpu:h100", mode="decode", batch=8, q_len=1, kv_len=8192, q_heads=128, kv_heads=1, head_dim=H, value_dim=D,
    dtype="bfloat16", kv_layout="value_in_key",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rows", "splits"),
    [
        ({}, 64, 9),
        ({"q_heads": 16}, 16, 17),
        ({"q_heads": 24}, 32, 17),
        ({"q_len": 4}, 64, 3),
        ({"kv_quantization": "int8"}, 32, 5),
        ({"kv_quantization": "int8", "target": "gpu:b200"}, 64, 9),
        ({"kv_quantization": "int8", "target": "gpu:rtxpro6000"}, 32, 5),
        ({"dtype": "float32"}, 16, 3),
        ({"batch": 1, "kv_len": 1024}, 64, 4),
    ],
)
def test_rows_are_split_among_programs_and_keys_to_fill_a_device(change, rows, splits):
    tiling = PALLAS_DECODE.tilings(dataclasses.replace(REQUEST, **parsed(change)))[0]
    assert (tiling["block_rows"], tiling["splits"]) == (rows, splits)


def parsed(change):
    return {**change, "target": kernelry.Target.parse(change.get("target", "gpu:h100"))}


def test_every_tiling_of_the_search_space_fits_shared_memory_or_the_request_is_refused():
    axes = {
        "target": [
            kernelry.Target.parse(f"gpu{name}") for name in (":a100", ":a10g", ":h100", ":b200", ":rtx5090", "")
        ],
        "dtype": ["bfloat16", "float32"],
        "q_heads": [16, 32, 128],
        "q_len": [1, 8],
        "stored": [{}, {"kv_quantization": "int8"}, {"page_size": 64}],
    }
    for target, dtype, heads, q_len, stored in itertools.product(*axes.values()):
        facts = {"target": target, "dtype": dtype, "q_heads": heads, "q_len": q_len, **stored}
        request = dataclasses.replace(REQUEST, **facts)
        if PALLAS_DECODE.refusals(request, Environment()):
            assert (dtype, available(request)) == ("float32", 101376), facts
            continue
        for tiling in PALLAS_DECODE.tilings(request):
            tilings.check(request, tiling)
            asked = need(request, tiling)
            assert asked.least <= asked.most <= available(request), (facts, tiling)


def test_wide_keys_with_values_of_their_own_are_refused():
    query, key = arrays()
    message = r"head_dim=576 > 256, unless the values are the first columns of the keys"
    with (
        testing.interpret(),
        kernelry.use(policy=NO_ADAPTERS),
        pytest.raises(KernelRefusedError, match=message),
    ):
        kernelry.attention(query, key, key[..., :D], kernel="pallas_decode", mode="decode", mask=masks.Full())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_len": 16}, r"q_len=16 × 128 query heads per key head = 2048 rows > 1024"),
        ({"value_dim": 576}, r"value_dim=576 > 512, the widest values in keys"),
        ({"dtype": "float32", "target": "gpu:a10g"}, r"blocks of 16 slots, the smallest, may take \d+ bytes"),
    ],
)
def test_what_does_not_fit_is_refused_with_values(change, message):
    (refusal,) = PALLAS_DECODE.refusals(dataclasses.replace(REQUEST, **parsed(change)), Environment())
    assert re.search(message, refusal.detail)
