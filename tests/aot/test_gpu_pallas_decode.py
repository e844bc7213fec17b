"""pallas_decode through the real compilers of XLA and Triton: what it declares compiles, and copies no cache.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_pallas_decode.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.plugin import PagedArray, QuantizedArray, Request, ValueInKey
from kernelry_gpu_pallas.pallas_decode import kernel as body
from kernelry_gpu_pallas.pallas_decode.spec import PALLAS_DECODE

pytestmark = pytest.mark.aot

TARGETS = ("gpu:a100", "gpu:h100", "gpu:b200")
ROWS, SLOTS = 8, 4096
DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


MASKS = {
    "full": lambda lengths: masks.Full(),  # noqa: ARG005
    "lengths": masks.Lengths,
    "window": lambda lengths: masks.SlidingWindow(1023).at(query_offset=lengths - 1) & masks.Lengths(lengths),
    "chunked": lambda lengths: masks.Chunked(1024).at(query_offset=lengths - 1),
    "predicate": lambda lengths: masks.Predicate(every_third).at(query_offset=lengths - 1),
    "segments": lambda lengths: masks.Segments(lengths[:, None] % 2, jnp.arange(SLOTS) % 2),
    "dense": lambda lengths: masks.Dense(jnp.arange(SLOTS)[None, None, None] < lengths[:, None, None, None]),
}


def decoded(mask=masks.Lengths, **options):
    def step(query, key, value, lengths):
        return kernelry.attention(
            query, key, value, mask=mask(lengths), mode="decode", kernel="pallas_decode", **options
        )

    return step


def in_pages(query, key, value, table, lengths):
    return decoded()(query, PagedArray(key, table), PagedArray(value, table), lengths)


def held(shape, dtype):
    if dtype != "int8":
        return jax.ShapeDtypeStruct(shape, dtype)
    return QuantizedArray(jax.ShapeDtypeStruct(shape, "int8"), jax.ShapeDtypeStruct((*shape[:3], 1), jnp.bfloat16))


def arguments(heads=(32, 8), dims=(128, 128), dtype="bfloat16", q_len=1):
    query = jax.ShapeDtypeStruct((ROWS, q_len, heads[0], dims[0]), "bfloat16" if dtype == "int8" else dtype)
    keys = (held((ROWS, SLOTS, heads[1], width), dtype) for width in dims)
    return query, *keys, jax.ShapeDtypeStruct((ROWS,), jnp.int32)


def copies_nothing(found, heads=8, width=64):
    """Whether what is allocated beside operands and results is small beside the keys."""
    return found.memory["temporaries"] < ROWS * SLOTS * heads * width // 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_compiles(target, name, compile_for):
    found = compile_for(target, decoded(MASKS[name], soft_cap=30.0), arguments())
    assert found.ok, found.reason
    assert copies_nothing(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [*sorted(PALLAS_DECODE.capabilities.dtypes), "int8"])
@pytest.mark.parametrize("dims", DIMS)
def test_every_dtype_and_head_dim_compiles(target, dtype, dims, compile_for):
    found = compile_for(target, decoded(), arguments(dims=dims, dtype=dtype))
    assert found.ok, found.reason
    assert copies_nothing(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "q_len"), [((8, 8), 1), ((64, 8), 8), ((12, 4), 4), ((32, 1), 2)])
def test_every_number_of_rows_compiles(target, heads, q_len, compile_for):
    last = decoded(lambda lengths: masks.Causal().at(query_offset=lengths - q_len))
    found = compile_for(target, last, arguments(heads, q_len=q_len))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_pages_compile_and_are_read_where_they_stand(target, dtype, page_size, compile_for):
    query, _, _, lengths = arguments()
    pages = held((1024, page_size, 8, 128), dtype)
    table = jax.ShapeDtypeStruct((ROWS, SLOTS // page_size), jnp.int32)
    found = compile_for(target, in_pages, (query, pages, pages, table, lengths))
    assert found.ok, found.reason
    assert copies_nothing(found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dims", [(128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("q_len", [1, 16])
def test_every_tiling_of_the_search_space_compiles(target, dims, dtype, q_len, compile_for):
    sizes = {"batch": ROWS, "q_len": q_len, "kv_len": SLOTS, "q_heads": 32, "kv_heads": 8, "head_dim": dims[0]}
    request = Request(target=target, mode="decode", dtype=dtype, **sizes)
    for tiling in PALLAS_DECODE.tilings(request):
        with kernelry.use(tiling=dict(tiling.values)):
            found = compile_for(target, decoded(), arguments(dims=dims, dtype=dtype, q_len=q_len))
        assert found.ok, (tiling, found.reason)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_an_error_for_shared_memory_does_not_compile(target, dtype, compile_for, monkeypatch):
    step, operands = decoded(), arguments(dims=(256, 256), dtype=dtype)
    message = r"block_kv=\d+, num_stages=3 of pallas_decode take at least \d+ bytes of shared memory"
    with kernelry.use(tiling={"block_kv": 256, "num_stages": 3}):
        with pytest.raises(kernelry.errors.ConfigError, match=message):
            compile_for(target, step, operands)
        monkeypatch.setattr(body, "check", lambda *_: None)
        found = compile_for(target, step, operands)
    assert str(found.reason).startswith("Shared memory size limit exceeded")


def test_memory_beside_the_cache_does_not_grow_with_it(compile_for):
    query, key, _, lengths = arguments()
    longer = jax.ShapeDtypeStruct((ROWS, 8 * SLOTS, *key.shape[2:]), key.dtype)
    short, long = (compile_for("gpu:h100", decoded(), (query, k, k, lengths)) for k in (key, longer))
    assert long.memory["temporaries"] <= 2 * short.memory["temporaries"]
    assert np.prod(longer.shape) * 4 == long.memory["arguments"] - query.size * 2 - ROWS * 4


def of_latents(heads=128, dtype="bfloat16", page_size=None):
    """Absorbed multi-head latent attention: a function and its arguments."""

    def step(query, key, lengths, *table):
        key = PagedArray(key, *table) if table else key
        options = {"mask": masks.Lengths(lengths), "mode": "decode", "kernel": "pallas_decode"}
        return kernelry.attention(query, key, ValueInKey(512), **options)

    query = jax.ShapeDtypeStruct((ROWS, 1, heads, 576), "bfloat16" if dtype == "int8" else dtype)
    lengths, table = jax.ShapeDtypeStruct((ROWS,), jnp.int32), ()
    shape = (ROWS, SLOTS, 1, 576)
    if page_size is not None:
        table = (jax.ShapeDtypeStruct((ROWS, SLOTS // page_size), jnp.int32),)
        shape = (ROWS * SLOTS // page_size, page_size, 1, 576)
    return step, (query, held(shape, dtype), lengths, *table)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "page_size"), [("bfloat16", None), ("bfloat16", 48), ("int8", 64), ("float32", None)]
)
def test_values_in_keys_compile_and_nothing_of_their_size_is_made(target, dtype, page_size, compile_for):
    found = compile_for(target, *of_latents(16, dtype, page_size))
    assert found.ok, found.reason
    assert found.memory["temporaries"] < ROWS * SLOTS * 576 // 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tiling_of_values_in_keys_compiles(target, dtype, compile_for):
    sizes = {"batch": ROWS, "q_len": 1, "kv_len": SLOTS, "q_heads": 128, "kv_heads": 1, "head_dim": 576}
    facts = {"mode": "decode", "dtype": dtype, "value_dim": 512, "kv_layout": "value_in_key"}
    for tiling in PALLAS_DECODE.tilings(Request(target=target, **facts, **sizes)):
        with kernelry.use(tiling=dict(tiling.values)):
            found = compile_for(target, *of_latents(128, dtype))
        assert found.ok, (tiling, found.reason)
