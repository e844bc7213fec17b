"""ragged where few queries are multiplied with the keys of all heads at once: when it is, and that nothing changes.

Law: joined = apart, for every mask, cache and number of rows. Interpret mode; the speed is in tests/aot.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import in_shuffled_pages

import kernelry
from kernelry import masks, testing
from kernelry.cache import QuantizedArray
from kernelry.kernel.spec import Inputs
from kernelry.plugin import PagedArray, Tiling
from kernelry.request.request import Request
from kernelry_tpu_splash.ragged import layout
from kernelry_tpu_splash.ragged.kernel import _operands
from kernelry_tpu_splash.ragged.layout import Blocks

B, S, WIDTH = 3, 512, 128
LENGTHS = np.array([S, 300, 0], np.int32)


def drawn(*shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(heads, kv_heads, q_len=1, dtype="float32"):
    sizes = ((q_len, heads), (S, kv_heads), (S, kv_heads))
    return [drawn(B, *size, WIDTH, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]


def through_ragged(query, key, value, mask, table=None):
    """Output, largest logits and sums, of blocks of 128 slots."""

    def step(query, key, value):
        held = (key, value) if table is None else (PagedArray(key, table), PagedArray(value, table))
        options = {"mask": mask, "kernel": "ragged", "mode": "decode", "return_partial": True}
        found = kernelry.attention(query, *held, **options)
        return found.out, found.max, found.sum

    with testing.interpret(), kernelry.use(tiling={"block_kv": 128}):
        return jax.jit(step)(query, key, value)


def is_joined(**facts):
    usual = {"q_len": 1, "kv_len": S, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    return Blocks.of(Request(**{**usual, **facts}, mode="decode"), Tiling.of(block_kv=128)).joined


@pytest.mark.parametrize(
    ("facts", "joined"),
    [
        ({}, True),
        ({"q_len": 4}, True),
        ({"q_len": 5}, False),  # 160 rows
        ({"q_len": 2, "dtype": "float32"}, True),
        ({"q_len": 3, "dtype": "float32"}, False),  # 96 rows
        ({"q_heads": 136}, False),
        ({"page_size": 16}, True),
        ({"kv_quantization": "int8:head_dim"}, True),
        ({"dtype": "float32", "kv_heads": 2}, True),
        ({"head_dim": 64}, False),  # slots are the lanes
        ({"head_dim": 128, "value_dim": 64}, False),
        ({"kv_heads": 1}, False),
        ({"q_heads": 24, "kv_heads": 24}, False),  # not a power of two
        ({"head_dim": 256}, True),
        ({"head_dim": 256, "kv_heads": 4}, False),  # tiles of 4 heads lie in another order than those of 8 keys
        ({"kv_len": 513, "kv_heads": 4}, False),  # rows of the batch end within a tile
        ({"q_heads": 64, "kv_heads": 64, "head_dim": 256}, False),  # a block of all heads does not fit
    ],
)
def test_heads_are_joined_where_rows_are_few_and_keys_lie_so(facts, joined):
    assert is_joined(**facts) is joined


BY_HEAD = masks.BlockSelection(np.arange(B * 8 * 32).reshape(B, 8, 1, 32) % 5 == 1, 16).at(query_offset=S - 1)
CASES = {
    "lengths": (1, masks.Lengths(LENGTHS)),
    "window": (1, masks.SlidingWindow(200).at(query_offset=jnp.maximum(LENGTHS - 1, 0)) & masks.Lengths(LENGTHS)),
    "several queries": (3, masks.Causal().at(query_offset=jnp.maximum(LENGTHS - 3, 0)) & masks.Lengths(LENGTHS)),
    "by head": (1, BY_HEAD),
    "everything": (1, masks.Full()),
}


@pytest.mark.parametrize("held", ["float32", "int8", "int8:heads_and_head_dim", "pages"])
@pytest.mark.parametrize("name", CASES)
def test_joined_heads_agree_with_heads_apart(name, held, monkeypatch):
    q_len, mask = CASES[name]
    query, key, value = operands(8, 4, q_len)
    table = None
    if held == "pages":
        key, value, table = in_shuffled_pages(key, value, page_size=64)
    elif held != "float32":
        key, value = (QuantizedArray.quantize(array, held) for array in (key, value))
    together = through_ragged(query, key, value, mask, table)
    monkeypatch.setattr(layout, "MOST_JOINED_ROWS", {"float32": 0})
    apart = through_ragged(query, key, value, mask, table)
    for found, wanted in zip(together, apart, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (12, 4), (16, 16)])
def test_any_number_of_heads_agrees_with_dense(heads, kv_heads):
    query, key, value = operands(heads, kv_heads)
    out, _, total = through_ragged(query, key, value, masks.Lengths(LENGTHS))
    divided = out / np.where(total == 0, 1, total).swapaxes(1, 2)[..., None]
    exact = (np.asarray(array, np.float64) for array in (query, key, value))
    wanted = testing.reference_attention(*exact, mask=masks.Lengths(LENGTHS)).out
    np.testing.assert_allclose(divided, wanted, rtol=3e-6, atol=3e-6)


def test_what_no_row_sees_may_hold_anything_in_joined_heads():
    query, key, value = operands(8, 4)
    hidden = np.arange(S)[None, :, None, None] >= LENGTHS[:, None, None, None]
    dirty = jnp.where(hidden, jnp.inf, key), jnp.where(hidden, jnp.nan, value)
    found = through_ragged(query, *dirty, masks.Lengths(LENGTHS))
    for one, other in zip(found, through_ragged(query, key, value, masks.Lengths(LENGTHS)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_whole_blocks_are_a_run_of_those_that_are_seen_and_there():
    """128 slots each: of row 0 all but a missing page's, of row 1 the first two, of row 2 none."""
    request = Request(
        q_len=1, kv_len=S, batch=B, q_heads=8, kv_heads=4, head_dim=WIDTH, page_size=64, mode="decode",
        mask=masks.Lengths(LENGTHS),
    )  # fmt: skip
    pages = drawn(24, 64, 4, WIDTH, seed=1)
    table = jnp.arange(24, dtype=jnp.int32).reshape(B, 8).at[0, 5].set(-1)
    held = PagedArray(pages, table)
    inputs = Inputs(drawn(B, 1, 8, WIDTH, seed=0), held, held, masks.Lengths(LENGTHS).canonical())
    made = _operands(inputs, request, Blocks.of(request, Tiling.of(block_kv=128)))
    np.testing.assert_array_equal(made.whole_first, [0, 0, 4])
    np.testing.assert_array_equal(made.whole_end, [2, 2, 4])
