"""Quantised and paged keys that do not fit: the message names the argument, what it was and what to pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError, ShapeError
from kernelry.request.arguments import page_size_of, quantization_of
from kernelry.storage import PagedArray, QuantizedArray

pytestmark = pytest.mark.versions

QUERY = jnp.ones((2, 6, 4, 8))
PLAIN = jnp.ones((2, 6, 2, 8))
PAGES = jnp.ones((7, 3, 2, 8))
TABLE = jnp.arange(4).reshape(2, 2)
PAGED = PagedArray(PAGES, TABLE)


def quantized(shape, dtype=jnp.int8, scale=None):
    return QuantizedArray(jnp.ones(shape, dtype), jnp.ones(scale or (*shape[:-1], 1), jnp.bfloat16))


HELD = quantized((2, 6, 2, 8))
ALIKE = "quantise both in one way, and page both or neither"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (HELD, PLAIN, ["QuantizedArray(int8:head_dim, shape=[2, 6, 2, 8]", "float32[2, 6, 2, 8]", ALIKE]),
        (HELD, quantized((2, 6, 2, 8), jnp.int4), ["int8:head_dim", "int4:head_dim", ALIKE]),
        (HELD, quantized((2, 6, 2, 8), scale=(2, 6, 1, 1)), ["int8:head_dim", "int8:heads_and_head_dim", ALIKE]),
        (PAGED, PLAIN, ["PagedArray(pages=[7, 3, 2, 8], table=[2, 2])", "float32[2, 6, 2, 8]", ALIKE]),
        (PAGED, PagedArray(PAGES.reshape(21, 1, 2, 8), jnp.zeros((2, 6), int)), ["[7, 3, 2, 8]", "[21, 1, 2, 8]"]),
        (PAGED, PagedArray(quantized((7, 3, 2, 8)), TABLE), [ALIKE]),
        (PAGED, PagedArray(PAGES, TABLE + 0), ["share one table", "the same array to both"]),
        (PAGED, PagedArray(PAGES.astype(jnp.bfloat16), TABLE), ["value", "query's dtype float32", "bfloat16"]),
        (HELD, quantized((3, 6, 2, 8)), ["value", "B=2", "(3, 6, 2, 8)"]),
        (quantized((2, 6, 2, 4)), HELD, ["key", "H=8", "(2, 6, 2, 4)"]),
        (HELD, quantized((2, 5, 2, 8)), ["value", "S=6", "(2, 5, 2, 8)"]),
        (HELD, quantized((2, 6, 1, 8)), ["value", "K=2", "(2, 6, 1, 8)"]),
        (PAGED, PagedArray(PAGES[:, :, :1], TABLE), ["value", "K=2", "(2, 6, 1, 8)"]),
        (quantized((2, 6, 3, 8)), quantized((2, 6, 3, 8)), ["K=3", "N=4"]),
        (quantized((6, 2, 8)), HELD, ["key must be [B, S, K, H], rank 4", "shape=[6, 2, 8]"]),
        (HELD, quantized((6, 2, 8)), ["value must be [B, S, K, D], rank 4", "shape=[6, 2, 8]"]),
        (PLAIN.astype(jnp.int8), PLAIN, ["key must be floating", "int8"]),
        ("keys", PLAIN, ["key must be an array", "str"]),
    ],
)
def test_held_keys_that_do_not_fit_are_shape_errors(key, value, words):
    with pytest.raises(ShapeError) as caught:
        kernelry.attention(QUERY, key, value, mode="decode")
    for word in words:
        assert word in str(caught.value)


def test_a_query_is_never_quantised():
    with pytest.raises(ShapeError, match="query must be an array, got QuantizedArray"):
        kernelry.attention(quantized((2, 6, 4, 8)), HELD, HELD)


@pytest.mark.parametrize(("held", "how"), [(HELD, "quantised"), (PAGED, "in pages")])
def test_the_gradient_of_held_keys_is_an_error(held, how):
    with pytest.raises(ArgumentError, match=f"gradients names key, but keys and values are {how} and have none"):
        kernelry.attention(QUERY, held, held, gradients=("query", "key"))


def test_differentiating_a_scale_is_an_error_not_zero():
    def loss(scale):
        held = QuantizedArray(jnp.ones((2, 6, 2, 8), jnp.int8), scale)
        return kernelry.attention(QUERY, held, held).sum()

    with pytest.raises(ArgumentError, match="the gradient of key was not asked for"):
        jax.grad(loss)(jnp.ones((2, 6, 2, 1)))


def test_two_tables_of_one_jitted_function_are_two_and_the_message_says_what_to_do():
    with pytest.raises(ShapeError, match="let the table be one, and make the PagedArrays inside"):
        jax.jit(kernelry.attention)(QUERY, PAGED, PAGED)
    inside = jax.jit(lambda pages, table: kernelry.attention(QUERY, PagedArray(pages, table), PagedArray(pages, table)))
    assert inside(PAGES, TABLE).shape == (2, 6, 4, 8)


@pytest.mark.parametrize(
    ("held", "how", "size"),
    [
        (PLAIN, None, None),
        (HELD, "int8:head_dim", None),
        (PAGED, None, 3),
        (PagedArray(quantized((7, 3, 2, 8), scale=(7, 3, 1, 1)), TABLE), "int8:heads_and_head_dim", 3),
    ],
)
def test_how_keys_are_held_is_read_off_them(held, how, size):
    assert (quantization_of(held), page_size_of(held)) == (how, size)


@pytest.mark.parametrize("held", [HELD, PAGED])
def test_a_call_resolves_as_the_request_that_describes_it(held):
    with kernelry.record() as resolutions:
        kernelry.attention(QUERY, held, held, mask=masks.Causal(), mode="prefill")
    asked = resolutions[0].request
    assert (asked.kv_quantization, asked.page_size) == (quantization_of(held), page_size_of(held))
    assert (asked.kv_len, asked.kv_heads, asked.head_dim, asked.value_dim) == (6, 2, 8, 8)


def test_numpy_arrays_are_taken_too():
    in_numpy = jax.tree.map(np.asarray, PAGED)
    shared = PagedArray(in_numpy.pages, in_numpy.table)
    found = kernelry.attention(np.asarray(QUERY), shared, shared, mode="decode")
    np.testing.assert_allclose(found, np.ones((2, 6, 4, 8)), rtol=1e-6)
