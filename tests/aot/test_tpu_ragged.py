"""ragged through the real TPU compiler: what it declares compiles, and reads keys and values where they lie.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_ragged.py.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import kernelry
from kernelry import masks
from kernelry.plugin import Environment, Inputs, PagedArray, QuantizedArray, Request
from kernelry_tpu_splash.plugin import RAGGED
from kernelry_tpu_splash.ragged.layout import Order

pytestmark = pytest.mark.aot

TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
ROWS, SLOTS = 4, 4096
HEADS = ((8, 8), (32, 8), (32, 32), (32, 1), (8, 2), (12, 3), (16, 4))
DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512))
DTYPES = ("float32", "bfloat16", "int8")
LENGTHS = jax.ShapeDtypeStruct((ROWS,), jnp.int32)


def keys_like(shape, dtype, *, shared_scale=False):
    if dtype != "int8":
        return jax.ShapeDtypeStruct(shape, dtype)
    scale = (*shape[:2], 1 if shared_scale else shape[2], 1)
    return QuantizedArray(jax.ShapeDtypeStruct(shape, "int8"), jax.ShapeDtypeStruct(scale, "bfloat16"))


def decoded(mask=None, **options):
    """One step, whose mask is made from the rows' lengths."""

    def step(query, key, value, lengths):
        placed = masks.Lengths(lengths) if mask is None else mask(lengths)
        return kernelry.attention(query, key, value, mask=placed, mode="decode", kernel="ragged", **options)

    return step


def arguments(heads=(32, 8), dims=(128, 128), dtype="bfloat16", q_len=1, **options):
    (q_heads, kv_heads), (head_dim, value_dim) = heads, dims
    query = jax.ShapeDtypeStruct((ROWS, q_len, q_heads, head_dim), "bfloat16" if dtype == "int8" else dtype)
    key, value = (keys_like((ROWS, SLOTS, kv_heads, width), dtype, **options) for width in (head_dim, value_dim))
    return query, key, value, LENGTHS


def copies(found, size):
    """The instructions of the program that write an array of at least `size` elements."""
    lines = (line.strip() for line in found.compiled.as_text().splitlines())
    named = (
        re.match(r"(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* (copy|transpose|fusion|pad|concatenate)\(", line)
        for line in lines
    )
    sizes = ((match[0], [int(number) for number in match[1].split(",")]) for match in named if match)
    return [text for text, shape in sizes if _product(shape) >= size]


def _product(numbers):
    total = 1
    for number in numbers:
        total *= number
    return total


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_every_number_of_heads_compiles_and_copies_nothing(target, dtype, heads, compile_for):
    found = compile_for(target, decoded(), arguments(heads, dtype=dtype))
    assert found.ok, found.reason
    assert copies(found, ROWS * SLOTS * heads[1] * 64) == []


def test_in_another_order_keys_and_values_would_be_copied(compile_for, monkeypatch):
    """So the tests above could fail."""
    monkeypatch.setattr(Order, "of", lambda *_: Order.AS_IT_IS)
    found = compile_for("tpu:v5e", decoded(), arguments(dims=(64, 64)))
    assert found.ok, found.reason
    assert len(copies(found, ROWS * SLOTS * 8 * 64)) == 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", DIMS)
def test_every_head_dim_compiles_and_copies_nothing(target, dtype, dims, compile_for):
    assert dims[0] <= RAGGED.capabilities.head_dims.maximum
    found = compile_for(target, decoded(soft_cap=30.0), arguments(dims=dims, dtype=dtype))
    assert found.ok, found.reason
    assert copies(found, ROWS * SLOTS * 8 * 64) == []


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


MASKS = {
    "full": lambda _: masks.Full(),
    "window": lambda lengths: masks.SlidingWindow(1000).at(query_offset=lengths - 1) & masks.Lengths(lengths),
    "chunked": lambda lengths: masks.Chunked(1000).at(query_offset=lengths - 1) & masks.Lengths(lengths),
    "predicate": lambda lengths: masks.Predicate(every_third).at(query_offset=lengths - 1),
    "any_of": lambda lengths: masks.SlidingWindow(100).at(query_offset=lengths - 1) | masks.Lengths(lengths // 2),
    "by_head": lambda lengths: masks.BlockSelection(jnp.ones((ROWS, 8, 1, 32), bool), 128).at(query_offset=lengths - 1),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_compiles(target, name, compile_for):
    found = compile_for(target, decoded(MASKS[name]), arguments())
    assert found.ok, found.reason
    assert copies(found, ROWS * SLOTS * 8 * 64) == []


@pytest.mark.parametrize("target", TARGETS)
def test_several_queries_and_statistics_compile(target, compile_for):
    options = {"return_partial": True, "return_max_logits": True}
    found = compile_for(target, decoded(MASKS["window"], **options), arguments(q_len=5))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "width"), [(16, 128), (48, 128), (128, 128), (128, 64), (256, 256)])
def test_pages_compile_and_are_read_where_they_stand(target, dtype, page_size, width, compile_for):
    pages = 4 * SLOTS // page_size

    def step(query, key, value, table, lengths):
        held = PagedArray(key, table), PagedArray(value, table)
        return kernelry.attention(query, *held, mask=masks.Lengths(lengths), mode="decode", kernel="ragged")

    query = jax.ShapeDtypeStruct((ROWS, 1, 32, width), "bfloat16" if dtype == "int8" else dtype)
    key, value = (keys_like((pages, page_size, 8, width), dtype) for _ in range(2))
    table = jax.ShapeDtypeStruct((ROWS, SLOTS // page_size), jnp.int32)
    found = compile_for(target, step, (query, key, value, table, LENGTHS))
    assert found.ok, found.reason
    assert copies(found, pages * page_size * 8 * width // 2) == []


@pytest.mark.parametrize("target", TARGETS)
def test_one_scale_for_all_heads_compiles(target, compile_for):
    found = compile_for(target, decoded(), arguments(dtype="int8", shared_scale=True))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dims", "dtype"), [((128, 128), "bfloat16"), ((128, 128), "int8"), ((512, 512), "bfloat16")])
def test_every_block_of_the_search_space_compiles(target, dims, dtype, compile_for):
    facts = {"q_heads": 32, "kv_heads": 8, "head_dim": dims[0], "dtype": "bfloat16", "mode": "decode"}
    facts |= {"kv_quantization": "int8:head_dim"} if dtype == "int8" else {}
    for tiling in RAGGED.tilings(Request(q_len=1, kv_len=SLOTS, **facts)):
        with kernelry.use(tiling=dict(tiling.values)):
            found = compile_for(target, decoded(), arguments(dims=dims, dtype=dtype))
        assert found.ok, (tiling, found.reason)


@pytest.mark.parametrize("target", TARGETS)
def test_as_many_rows_as_it_takes_compile(target, compile_for):
    found = compile_for(target, decoded(), arguments((64, 8), q_len=32))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("heads", "dtype"), [((128, 8), "bfloat16"), ((128, 64), "bfloat16"), ((128, 32), "int8"), ((64, 8), "float32")]
)
def test_as_many_rows_as_are_joined_compile(target, heads, dtype, compile_for):
    found = compile_for(target, decoded(), arguments(heads, dtype=dtype))
    assert found.ok, found.reason


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"q_heads": 36, "kv_heads": 36, "head_dim": 512, "dtype": "float32"}, "vmem"),
        ({"q_len": 20, "q_heads": 240, "kv_heads": 20, "head_dim": 256}, "vmem"),
        ({"batch": 256, "kv_len": 32768, "page_size": 16}, "smem"),
    ],
)
def test_what_is_refused_for_memory_does_not_compile(facts, words, compile_for):
    usual = {"q_len": 1, "kv_len": 1024, "q_heads": 8, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    mask = masks.Lengths(jnp.ones(facts.get("batch", 1), int))
    request = Request(**{**usual, **facts}, mode="decode", target="tpu:v5e", mask=mask)
    assert RAGGED.refusals(request, Environment())
    rows, kernel, tiling = request.batch, RAGGED.body(), RAGGED.tilings(request)[0]

    def direct(query, key, value, lengths, table):
        keys = (key, value) if request.page_size is None else (PagedArray(key, table), PagedArray(value, table))
        inputs = Inputs(query, *keys, masks.Lengths(lengths).canonical())
        return kernel.forward(inputs, request, tiling, statistics=False).out

    slots = (rows, request.kv_len) if request.page_size is None else (512, request.page_size)
    query, key, table, lengths = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, request.q_len, request.q_heads, request.head_dim), request.dtype),
            ((*slots, request.kv_heads, request.head_dim), request.dtype),
            ((rows, request.kv_len // (request.page_size or 1)), jnp.int32),
            ((rows,), jnp.int32),
        )
    )
    found = compile_for("tpu:v5e", direct, (query, key, key, lengths, table))
    assert not found.ok
    assert words in str(found.reason)


@pytest.mark.parametrize("over", ["heads", "rows"])
def test_four_chips_compile_and_copy_nothing(over, compile_for):
    """Heads, or rows of the batch, each chip's own."""
    spec = PartitionSpec(None, None, "chip") if over == "heads" else PartitionSpec("chip")
    lengths = PartitionSpec() if over == "heads" else spec

    def step(query, key, value, rows):
        placed = {"in_specs": (spec, spec, spec, lengths), "out_specs": spec}
        attend = jax.shard_map(decoded(), mesh=jax.sharding.get_abstract_mesh(), check_vma=False, **placed)
        return attend(query, key, value, rows)

    specs = (spec, spec, spec, lengths)
    found = compile_for("tpu:v5e:2x2", step, arguments(), mesh_shape={"chip": 4}, specs=specs)
    assert found.ok, found.reason
    text = found.compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "all-gather" not in text
    assert copies(found, ROWS * SLOTS * 128) == []  # half of what a chip holds
