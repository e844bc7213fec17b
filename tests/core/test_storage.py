"""Quantised arrays are near what they stand for, paged ones equal to it; both are values that JAX can carry."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kernelry.errors import ArgumentError, ConfigError, ShapeError
from kernelry.storage import QUANTIZATIONS, PagedArray, Quantization, QuantizedArray

WAYS = sorted(QUANTIZATIONS)
ROUNDING = {"int8": 0.5, "int4": 0.5, "float8_e4m3fn": 2**-10}
"""Of a value, in units of the scale: half a step; of float8, half its smallest one."""
LARGEST = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448}
SCALE_ROUNDING = {"float32": 2**-22, "bfloat16": 2**-8, "float16": 2**-10}

_FEW = settings(deadline=None, max_examples=40)
magnitudes = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 2**-10)
shapes = st.sampled_from([(3, 4), (2, 1, 5), (2, 3, 2, 4)])  # few, for each compiles programs of its own
arrays = shapes.flatmap(lambda shape: npst.arrays(np.float32, shape, elements=magnitudes))
tables = st.sampled_from([(1, 1), (2, 3)]).flatmap(
    lambda shape: npst.arrays(np.int32, shape, elements=st.integers(-3, 4))
)


def float32(array):
    return np.asarray(array.astype(jnp.float32))


@_FEW
@given(arrays, st.sampled_from(WAYS), st.sampled_from(sorted(SCALE_ROUNDING)))
def test_the_error_is_at_most_half_a_step_and_the_scales_rounding(array, how, scale_dtype):
    kind = Quantization.parse(how)
    found = QuantizedArray.quantize(jnp.asarray(array), kind, scale_dtype=scale_dtype)
    step = float32(found.scale).astype(np.float64)
    allowed = step * (ROUNDING[kind.dtype] + LARGEST[kind.dtype] * SCALE_ROUNDING[scale_dtype])
    if kind.dtype == "float8_e4m3fn":
        allowed = allowed + np.abs(array) * 2**-4  # 3 bits of mantissa
    error = np.abs(np.asarray(found.dequantize(), np.float64) - array)
    assert (error <= np.broadcast_to(allowed, error.shape) * (1 + 1e-6)).all()


@_FEW
@given(arrays, st.sampled_from(WAYS))
def test_one_scale_takes_the_largest_magnitude_it_reaches_to_the_largest_value(array, how):
    kind = Quantization.parse(how)
    found = QuantizedArray.quantize(jnp.asarray(array), kind, scale_dtype=jnp.float32)
    reached = (-1,) if kind.axis == "head_dim" else (-2, -1)
    largest = np.abs(array).max(axis=reached, keepdims=True)
    expected = np.where(largest == 0, 1, largest / LARGEST[kind.dtype])
    np.testing.assert_allclose(np.asarray(found.scale), expected, rtol=1e-6)


@_FEW
@given(arrays, st.sampled_from(WAYS))
def test_negating_an_array_negates_what_comes_back(array, how):
    there, back = (QuantizedArray.quantize(jnp.asarray(sign * array), how).dequantize() for sign in (1, -1))
    step = float32(QuantizedArray.quantize(jnp.asarray(array), how).scale)
    # A two's complement has one value more below 0, which the largest magnitude may get.
    difference = np.abs(np.asarray(there) + np.asarray(back))
    assert (difference <= np.broadcast_to(step, array.shape) * (1 + 1e-6)).all()


@pytest.mark.parametrize("how", WAYS)
def test_a_row_of_zeros_comes_back_as_zeros_with_a_usable_scale(how):
    found = QuantizedArray.quantize(jnp.zeros((2, 3, 4)), how)
    np.testing.assert_array_equal(found.dequantize(), np.zeros((2, 3, 4)))
    assert (float32(found.scale) > 0).all()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_back_as_nan_wherever_its_scale_reaches_and_nowhere_else(how, bad):
    array = np.ones((2, 3, 4), np.float32)
    array[0, 1, 2] = bad
    found = np.asarray(QuantizedArray.quantize(jnp.asarray(array), how).dequantize())
    expected = np.zeros((2, 3, 4), bool)
    expected[0, :, :] = how.endswith("heads_and_head_dim")
    expected[0, 1, :] = True
    np.testing.assert_array_equal(np.isnan(found), expected)


@pytest.mark.parametrize("how", WAYS)
def test_an_array_knows_how_it_was_quantised(how):
    found = QuantizedArray.quantize(jnp.ones((2, 3, 4)), how)
    assert str(found.quantization) == how
    assert (found.shape, found.ndim) == ((2, 3, 4), 3)
    assert how in repr(found)


def test_with_one_head_both_axes_are_one():
    one_head = jnp.ones((2, 1, 4))
    assert str(QuantizedArray.quantize(one_head, "int8:heads_and_head_dim").quantization) == "int8:head_dim"


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


@pytest.mark.parametrize("how", WAYS)
def test_quantising_and_back_is_the_same_under_jit_and_vmap(how):
    array = jax.random.normal(jax.random.key(0), (3, 5, 2, 4))
    eager = QuantizedArray.quantize(array, how)
    jitted = jax.jit(lambda array: QuantizedArray.quantize(array, how))(array)
    mapped = jax.vmap(lambda row: QuantizedArray.quantize(row, how))(array)
    for other in (jitted, mapped):
        # Under jit a division may become a product, whose last bit may round another way.
        distance = np.abs(float32(other.values) - float32(eager.values))
        assert (distance <= np.maximum(1, np.abs(float32(eager.values)) / 8)).all()
        assert (distance > 0).mean() < 0.05
    back = jax.jit(jax.vmap(lambda held: held.dequantize()))(eager)
    np.testing.assert_array_equal(back, eager.dequantize())


def test_quantised_and_paged_arrays_are_no_dictionary_keys():
    for held in (QuantizedArray.quantize(jnp.ones((2, 4))), PagedArray(PAGES, TABLE)):
        with pytest.raises(TypeError, match="unhashable"):
            hash(held)


@functools.cache
def _held(how):
    return PAGES if how is None else QuantizedArray.quantize(PAGES, how)


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
@given(tables, st.sampled_from([None, *WAYS]), st.booleans())
def test_gathered_pages_equal_a_loop_with_nan_where_there_is_none(table, how, in_numpy):
    pages = _held(how)
    plain = PAGES if how is None else pages.dequantize()
    given = (jax.tree.map(np.asarray, pages), table) if in_numpy else (pages, jnp.asarray(table))
    paged = PagedArray(*given)
    gathered = paged.gather()
    assert paged.shape == gathered.shape
    assert (str(paged.quantization) if how else paged.quantization) == how
    found = gathered if how is None else gathered.dequantize()
    np.testing.assert_array_equal(np.asarray(found), side_by_side(np.asarray(plain), table).astype(np.float32))


def test_a_paged_array_knows_its_pages():
    paged = PagedArray(PAGES, TABLE)
    assert (paged.shape, paged.ndim, paged.page_size) == ((2, 6, 3, 4), 4, 2)
    assert repr(paged) == "PagedArray(pages=[5, 2, 3, 4], table=[2, 3])"


def test_paged_arrays_are_gathered_under_jit_and_vmap():
    expected = np.asarray(PagedArray(PAGES, TABLE).gather())
    np.testing.assert_array_equal(jax.jit(PagedArray.gather)(PagedArray(PAGES, TABLE)), expected)
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PagedArray(PAGES, TABLE))
    np.testing.assert_array_equal(jax.vmap(PagedArray.gather)(pair), np.stack([expected, expected]))
