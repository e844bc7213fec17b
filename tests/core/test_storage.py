"""Quantised arrays are near what they stand for, paged ones equal to it; both are values that JAX can carry.

One program quantises in every way, and one gathers pages of every kind.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pairs import sweep_but

from kernelry.errors import ArgumentError, ConfigError, ShapeError
from kernelry.storage import QUANTIZATIONS, PagedArray, Quantization, QuantizedArray

pytestmark = pytest.mark.versions

WAYS = sorted(QUANTIZATIONS)
ROUNDING = {"int8": 0.5, "int4": 0.5, "float8_e4m3fn": 2**-10}
"""Of a value, in units of the scale: half a step; of float8, half its smallest one."""
LARGEST = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448}
SCALE_ROUNDING = {"float32": 2**-22, "bfloat16": 2**-8, "float16": 2**-10}

_FEW = settings(deadline=None, max_examples=40)
magnitudes = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 2**-10)
arrays = npst.arrays(np.float32, (2, 3, 2, 4), elements=magnitudes)
tables = npst.arrays(np.int32, (2, 3), elements=st.integers(-3, 4))


@jax.jit
def in_every_way(array):
    """The array quantised in every way with a scale of every dtype, and what comes back."""
    found = {
        (how, dtype): QuantizedArray.quantize(array, how, scale_dtype=dtype) for how in WAYS for dtype in SCALE_ROUNDING
    }
    return {name: (held, held.dequantize()) for name, held in found.items()}


def float32(array):
    return np.asarray(array.astype(jnp.float32))


@_FEW
@given(arrays)
def test_the_error_is_at_most_half_a_step_and_the_scales_rounding(array):
    check_error(array)


def check_error(array):
    for (how, scale_dtype), (found, back) in in_every_way(array).items():
        kind = Quantization.parse(how)
        step = float32(found.scale).astype(np.float64)
        allowed = step * (ROUNDING[kind.dtype] + LARGEST[kind.dtype] * SCALE_ROUNDING[scale_dtype])
        if kind.dtype == "float8_e4m3fn":
            allowed = allowed + np.abs(array) * 2**-4  # 3 bits of mantissa
        error = np.abs(np.asarray(back, np.float64) - array)
        assert (error <= np.broadcast_to(allowed, error.shape) * (1 + 1e-6)).all(), (how, scale_dtype)


@_FEW
@given(arrays)
def test_one_scale_takes_the_largest_magnitude_it_reaches_to_the_largest_value(array):
    found = in_every_way(array)
    for how in WAYS:
        kind = Quantization.parse(how)
        reached = (-1,) if kind.axis == "head_dim" else (-2, -1)
        largest = np.abs(array).max(axis=reached, keepdims=True)
        expected = np.where(largest == 0, 1, largest / LARGEST[kind.dtype])
        np.testing.assert_allclose(np.asarray(found[how, "float32"][0].scale), expected, rtol=1e-6, err_msg=how)


@_FEW
@given(arrays)
def test_negating_an_array_negates_what_comes_back(array):
    there, back = in_every_way(array), in_every_way(-array)
    for name, (held, _) in there.items():
        one, other = (np.float64(float32(a.values)) * float32(a.scale) for a in (held, back[name][0]))
        # A two's complement has one value more below 0, which the largest magnitude may get.
        allowed = np.broadcast_to(float32(held.scale), array.shape) * (1 + 1e-6)
        assert (np.abs(one + other) <= allowed).all(), name


def test_heads_without_rows_are_quantised_like_one_row():
    array = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    ways = jax.jit(lambda array: [QuantizedArray.quantize(array, how) for how in ("int8", "int8:heads_and_head_dim")])
    for found, row in zip(ways(array), ways(array[None]), strict=True):
        np.testing.assert_array_equal(found.values, row.values[0])
        np.testing.assert_array_equal(found.scale, row.scale[0])


def test_a_row_of_zeros_comes_back_as_zeros_with_a_usable_scale():
    for found, back in in_every_way(np.zeros((2, 3, 2, 4), np.float32)).values():
        np.testing.assert_array_equal(back, 0)
        assert (float32(found.scale) > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_back_as_nan_wherever_its_scale_reaches_and_nowhere_else(bad):
    array = np.ones((2, 3, 2, 4), np.float32)
    array[0, 1, 1, 2] = bad
    for (how, _), (_, found) in in_every_way(array).items():
        expected = np.zeros(array.shape, bool)
        expected[0, 1, :] = how.endswith("heads_and_head_dim")
        expected[0, 1, 1] = True
        np.testing.assert_array_equal(np.isnan(found), expected, err_msg=how)


@pytest.mark.parametrize("how", WAYS)
def test_an_array_knows_how_it_was_quantised(how):
    found = jax.eval_shape(lambda array: QuantizedArray.quantize(array, how), jnp.ones((2, 3, 4)))
    assert str(found.quantization) == how
    assert (found.shape, found.ndim) == ((2, 3, 4), 3)
    assert how in repr(found)


def test_with_one_head_both_axes_are_one():
    one_head = jnp.ones((2, 1, 4))
    found = jax.eval_shape(lambda array: QuantizedArray.quantize(array, "int8:heads_and_head_dim"), one_head)
    assert str(found.quantization) == "int8:head_dim"


@_FEW
@given(arrays)
def test_one_head_is_quantised_as_it_is_among_others(array):
    """Multi-query attention has K = 1; where one scale is for all heads, that head has its own."""
    alone, among = in_every_way(array[:, :, :1]), in_every_way(array)
    check_error(array[:, :, :1])
    for (how, scale_dtype), (found, back) in alone.items():
        whole, _, axes = how.partition(":")
        held, expected = among[f"{whole}:head_dim", scale_dtype]
        assert (str(found.quantization), found.shape) == (f"{whole}:head_dim", (2, 3, 1, 4)), axes
        np.testing.assert_array_equal(float32(found.values), float32(held.values)[:, :, :1], err_msg=how)
        np.testing.assert_array_equal(back, np.asarray(expected)[:, :, :1], err_msg=how)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantising_multiplies_in_float32_and_rounds_last(dtype):
    held = QuantizedArray(jnp.array([[127, 3]], jnp.int8), jnp.array([[0.1]], jnp.float32))
    expected = (np.array([[127, 3]], np.float32) * np.float32(0.1)).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(held.dequantize(dtype)), expected)


@pytest.mark.parametrize("how", WAYS)
def test_a_quantization_is_read_as_it_is_written(how):
    assert str(Quantization.parse(how)) == how
    assert Quantization.parse(Quantization.parse(how)) == Quantization.parse(how)


def test_the_axis_is_the_head_dim_where_none_is_named():
    assert Quantization.parse("int4") == Quantization("int4", "head_dim")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int9", ["unknown dtype 'int9'", "int8"]),
        ("int8:heads", ["unknown axis 'heads'"]),
        ("", ["unknown dtype ''"]),
        (8, ["written like 'int8'", "8"]),
        (None, ["written like 'int8'", "None"]),
    ],
)
def test_a_quantization_that_means_nothing_is_an_error(text, words):
    with pytest.raises(ArgumentError) as caught:
        Quantization.parse(text)
    for word in words:
        assert word in str(caught.value)


VALUES = jnp.ones((2, 3, 4), jnp.int8)
PAGES = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 3, 4)), jnp.float32)
TABLE = jnp.array([[3, 0, -1], [1, -1, 4]], jnp.int32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantizedArray(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 1))), ["values must be", "float32[2, 3, 4]"]),
        (lambda: QuantizedArray(VALUES[0, 0], jnp.ones(1)), ["[..., K, H]", "int8[4]"]),
        (lambda: QuantizedArray([1], jnp.ones(1)), ["values must be", "list"]),
        (lambda: QuantizedArray(VALUES, jnp.ones((2, 3))), ["[2, 3, 1]", "[2, 1, 1]", "float32[2, 3]"]),
        (lambda: QuantizedArray(VALUES, jnp.ones((2, 3, 4))), ["float32[2, 3, 4]"]),
        (lambda: QuantizedArray(VALUES, jnp.ones((2, 3, 1), jnp.int32)), ["floating", "int32[2, 3, 1]"]),
        (lambda: QuantizedArray(VALUES, 1.0), ["floating", "float"]),
        (lambda: QuantizedArray.quantize(jnp.ones(4)), ["[..., K, H]", "float32[4]"]),
        (lambda: QuantizedArray.quantize(VALUES), ["floating", "int8[2, 3, 4]"]),
        (lambda: QuantizedArray.quantize([[1.0]]), ["floating", "list"]),
        (lambda: QuantizedArray.quantize(jnp.ones((2, 0))), ["not 0", "float32[2, 0]"]),
        (lambda: PagedArray(jnp.ones((2, 3, 4)), jnp.zeros((1, 2), int)), ["[P, page_size, K, H]", "float32[2, 3, 4]"]),
        (lambda: PagedArray([[1.0]], jnp.zeros((1, 2), int)), ["[P, page_size, K, H]", "list"]),
        (lambda: PagedArray(PAGES, jnp.zeros(2, int)), ["integers [B, M]", "int32[2]"]),
        (lambda: PagedArray(PAGES, jnp.zeros((1, 2))), ["integers [B, M]", "float32[1, 2]"]),
        (lambda: PagedArray(PAGES, [[0, 1]]), ["integers [B, M]", "list"]),
        (
            lambda: PagedArray(QuantizedArray(VALUES, jnp.ones((2, 3, 1))), jnp.zeros((1, 2), int)),
            ["[P, page_size, K, H]", "int8:head_dim", "[2, 3, 4]"],
        ),
    ],
)
def test_misfits_are_shape_errors_that_say_what_was_found(make, words):
    with pytest.raises(ShapeError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_quantising_without_qwix_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"pip install 'kernelry\[quant\]'"):
        QuantizedArray.quantize(jnp.ones((2, 4)))


@pytest.mark.parametrize("how", sweep_but(WAYS, "int8:head_dim"))
def test_quantising_and_back_is_the_same_under_jit_and_vmap(how):
    array = jax.random.normal(jax.random.key(0), (3, 5, 2, 4))
    eager = QuantizedArray.quantize(array, how)
    jitted = jax.jit(lambda array: QuantizedArray.quantize(array, how))(array)
    mapped = jax.vmap(lambda row: QuantizedArray.quantize(row, how))(array)
    for other in (jitted, mapped):
        # Under jit a division may become a product, whose last bit may round another way.
        distance = np.abs(float32(other.values) - float32(eager.values))
        assert (distance <= np.maximum(1, np.abs(float32(eager.values)) / 8)).all()
        assert (distance > 0).mean() < 0.1
    back = jax.jit(jax.vmap(lambda held: held.dequantize()))(eager)
    np.testing.assert_array_equal(back, eager.dequantize())


def test_quantised_and_paged_arrays_are_no_dictionary_keys():
    for held in (QuantizedArray(VALUES, jnp.ones((2, 3, 1))), PagedArray(PAGES, TABLE)):
        with pytest.raises(TypeError, match="unhashable"):
            hash(held)


@functools.cache
def _held():
    """PAGES as they are, and held in every way."""
    return {"": PAGES, **jax.jit(lambda pages: {how: QuantizedArray.quantize(pages, how) for how in WAYS})(PAGES)}


@jax.jit
def gathered(held, table):
    found = {how: PagedArray(pages, table).gather() for how, pages in held.items()}
    return {how: stored.dequantize() if how else stored for how, stored in found.items()}


def side_by_side(pages, table):
    """The gather as a loop."""
    rows, count = table.shape
    whole = np.full((rows, count * pages.shape[1], *pages.shape[2:]), np.nan)
    for row, column in np.ndindex(rows, count):
        if table[row, column] >= 0:
            start = column * pages.shape[1]
            whole[row, start : start + pages.shape[1]] = pages[table[row, column]]
    return whole


@_FEW
@given(tables)
def test_gathered_pages_equal_a_loop_with_nan_where_there_is_none(table):
    for how, found in gathered(_held(), table).items():
        plain = _held()[how].dequantize() if how else PAGES
        np.testing.assert_array_equal(found, side_by_side(np.asarray(plain), table).astype(np.float32), err_msg=how)


def test_pages_of_one_head_are_gathered():
    held = {how: QuantizedArray.quantize(PAGES[:, :, :1], how) if how else PAGES[:, :, :1] for how in ("", *WAYS)}
    for how, found in gathered(held, TABLE).items():
        plain = held[how].dequantize() if how else held[how]
        assert found.shape == (2, 6, 1, 4)
        np.testing.assert_array_equal(found, side_by_side(np.asarray(plain), np.asarray(TABLE)).astype(np.float32), how)


@pytest.mark.parametrize("how", ["", *WAYS])
def test_a_paged_array_has_the_shape_and_the_quantization_of_what_is_gathered(how):
    paged = PagedArray(_held()[how], TABLE)
    assert paged.shape == jax.eval_shape(PagedArray.gather, paged).shape
    assert paged.quantization == (Quantization.parse(how) if how else None)


@pytest.mark.parametrize("how", ["", "int8:head_dim"])
def test_numpys_arrays_are_gathered_too(how):
    pages, table = jax.tree.map(np.asarray, (_held()[how], TABLE))
    found = PagedArray(pages, table).gather()
    plain, found = (stored.dequantize() if how else stored for stored in (_held()[how], found))
    np.testing.assert_array_equal(found, side_by_side(np.asarray(plain), table).astype(np.float32))


def test_a_paged_array_knows_its_pages():
    paged = PagedArray(PAGES, TABLE)
    assert (paged.shape, paged.ndim, paged.page_size) == ((2, 6, 3, 4), 4, 2)
    assert repr(paged) == "PagedArray(pages=[5, 2, 3, 4], table=[2, 3])"


def test_paged_arrays_are_gathered_under_jit_and_vmap():
    expected = side_by_side(np.asarray(PAGES), np.asarray(TABLE)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(PagedArray.gather)(PagedArray(PAGES, TABLE)), expected)
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PagedArray(PAGES, TABLE))
    np.testing.assert_array_equal(jax.vmap(PagedArray.gather)(pair), np.stack([expected, expected]))


RELATIVE = {"int8": 0.01, "int4": 0.08, "float8_e4m3fn": 0.07}
"""Of the largest magnitude of a channel, the scale's rounding to bfloat16 included."""
LEAST = {"int8": 1.6e-36, "int4": 1.6e-36, "float8_e4m3fn": 5.4e-36}


_restored = jax.jit(
    lambda array, how, dtype: QuantizedArray.quantize(array, how).dequantize(dtype), static_argnums=(1, 2)
)


@pytest.mark.parametrize("how", RELATIVE)
@given(
    st.lists(st.floats(-37.5, 38.53), min_size=4, max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
@settings(deadline=None, max_examples=30)
def test_channels_of_every_magnitude_come_back_within_the_formats_error(how, exponents, seed, dtype):
    """From the smallest to the largest number of the dtype; a channel with a scale below normal numbers is zeros."""
    rng = np.random.default_rng(seed)
    most = float(jnp.finfo(dtype).max)
    tops = np.minimum(10.0 ** np.asarray(exponents), most)[None, :, None, None]
    drawn = rng.uniform(-1, 1, (1, 4, 1, 16)) * tops
    drawn[..., :1] = tops
    drawn[0, 3] = 0
    array = jnp.asarray(drawn, jnp.float32).astype(dtype)
    wanted = np.asarray(array.astype(jnp.float32), np.float64)
    found = np.asarray(_restored(array, how, dtype).astype(jnp.float32), np.float64)
    assert np.isfinite(found).all()
    largest = np.abs(wanted).max(axis=-1, keepdims=True)
    # A float16 of 6e-8, a subnormal, has no neighbour nearer than itself.
    rounding = float(jnp.finfo(dtype).smallest_subnormal) if dtype == "float16" else 0
    error = np.abs(found - wanted)
    assert (error <= RELATIVE[how] * largest + rounding)[np.broadcast_to(largest >= LEAST[how], error.shape)].all()
    assert (error <= largest).all()
    assert (found[0, 3] == 0).all()


def test_the_largest_numbers_of_a_dtype_come_back_finite():
    for dtype in ("float32", "bfloat16", "float16"):
        largest = jnp.full((1, 1, 1, 8), jnp.finfo(dtype).max, dtype)
        for how in RELATIVE:
            found = np.asarray(_restored(largest, how, dtype).astype(jnp.float32), np.float64)
            np.testing.assert_allclose(found, float(jnp.finfo(dtype).max), rtol=RELATIVE[how], err_msg=f"{dtype} {how}")
