"""Rows of which every logit is very negative, or very large: logits like others, for they are finite.

An additive padding mask makes them: of a padded row the whole bias is the least float32. Added to it, products of
queries and keys vanish, in float64 as in float32, so that the output is the mean of the visible values.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, testing
from kernelry.testing import reference_attention, reference_gradients

LENGTH, DIM = 48, 16
LEAST = float(np.finfo(np.float32).min)
KERNELS = ("dot_product", "blockwise", "pallas_flash")
TILES = {
    "dot_product": {},
    "blockwise": {"block_q": 16, "block_kv": 16},
    "pallas_flash": dict.fromkeys(
        ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv"), 16
    ),
}
FILLS = (LEAST, -3e38, -1e30, 1e30)
SHAPES = {"of_pairs": (1, 1, LENGTH, LENGTH), "of_keys": (1, 1, 1, LENGTH), "of_rows": (1, 2, LENGTH, 1)}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


QUERY, KEY, VALUE = draw(0, 1, LENGTH, 2, DIM), draw(1, 1, LENGTH, 1, DIM), draw(2, 1, LENGTH, 1, DIM)
D_OUT = draw(3, 1, LENGTH, 2, DIM)


@functools.partial(jax.jit, static_argnames=("kernel", "partial"))
def answered(query, key, value, bias, mask, sinks, d_out, *, kernel, partial):
    names = ("query", "key", "value") + (() if kernel == "pallas_flash" else ("bias",))

    def call(query, key, value, bias):
        bias = jax.lax.stop_gradient(bias) if kernel == "pallas_flash" else bias
        result = kernelry.attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            sinks=None if partial else sinks,
            kernel=kernel,
            return_partial=partial,
            gradients=names if sinks is None or partial else (*names, "sinks"),
        )
        return kernelry.finalize(result, sinks) if partial else result

    out, pull = jax.vjp(call, query, key, value, bias)
    return out, pull(d_out)[: len(names)]


def check(kernel, bias, mask, *, sinks=None, partial=False):
    place = testing.interpret() if kernel == "pallas_flash" else contextlib.nullcontext()
    with place, kernelry.use(tiling=TILES[kernel] or None):
        out, gradients = answered(QUERY, KEY, VALUE, bias, mask, sinks, D_OUT, kernel=kernel, partial=partial)
    named = {"bias": np.asarray(bias)} | ({} if sinks is None else {"sinks": np.asarray(sinks)})
    expected = reference_attention(QUERY, KEY, VALUE, mask=mask, **named)
    wanted = reference_gradients(QUERY, KEY, VALUE, mask=mask, d_out=D_OUT, **named)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected.out, atol=2e-6)
    for name, found in zip(("query", "key", "value", "bias"), gradients, strict=False):
        theirs = getattr(wanted, name)
        np.testing.assert_allclose(np.asarray(found, np.float64), theirs, atol=2e-5, err_msg=name)


def biases(shape, fill):
    """All of the bias, and that of some rows or keys alone."""
    whole = jnp.full(SHAPES[shape], fill, jnp.float32)
    some = np.zeros(SHAPES[shape], np.float32)
    some[:, :, 5:9] = fill
    return whole, jnp.asarray(some)


def cases():
    for kernel in KERNELS:
        for fill in FILLS:
            for shape in SHAPES:
                smoke = (fill, shape) in ((LEAST, "of_pairs"), (-1e30, "of_keys"))
                yield pytest.param(kernel, fill, shape, marks=[] if smoke else [pytest.mark.sweep])


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize(("kernel", "fill", "shape"), list(cases()))
def test_rows_of_large_logits_are_those_of_the_oracle(kernel, fill, shape):
    for bias in biases(shape, fill) if shape != "of_keys" else biases(shape, fill)[:1]:
        check(kernel, bias, masks.Causal())
        check(kernel, bias, masks.Full())


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_a_partial_of_large_logits_are_those_of_the_oracle(kernel):
    """Its lse is the largest logit, beside which the logarithm of the sum vanishes; core knows what is missing."""
    check(kernel, biases("of_pairs", LEAST)[1], masks.Causal(), partial=True)


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fill", [LEAST, pytest.param(1e30, marks=pytest.mark.sweep)])
def test_sinks_with_large_logits_are_those_of_the_oracle(kernel, fill):
    check(kernel, biases("of_pairs", fill)[1], masks.Causal(), sinks=jnp.asarray([0.5, -1.0], jnp.float32))


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_of_very_negative_logits_is_all_that_is_seen(kernel):
    bias = np.full(SHAPES["of_keys"], -3e38, np.float32)
    bias[..., 7] = -2.5e38
    check(kernel, jnp.asarray(bias), masks.Full())


@pytest.mark.parametrize("logits_dtype", ["bfloat16", "float16"])
def test_a_bias_beyond_the_range_of_the_logits_dtype_hides_nothing(logits_dtype):
    bias = jnp.full(SHAPES["of_pairs"], LEAST)
    out = kernelry.attention(QUERY, KEY, VALUE, bias=bias, kernel="dot_product", logits_dtype=logits_dtype)
    mean = np.broadcast_to(np.asarray(VALUE, np.float64).mean(axis=1, keepdims=True), out.shape)
    np.testing.assert_allclose(np.asarray(out, np.float64), mean, atol=2e-2)


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize("level", [-1e9, LEAST])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sink_as_low_as_its_row_is_one_key_more(kernel, level):
    sinks, bias = jnp.full((2,), level, jnp.float32), jnp.full((1, 1, LENGTH, 1), level, jnp.float32)
    place = testing.interpret() if kernel == "pallas_flash" else contextlib.nullcontext()

    def total(sinks):
        options = {"bias": bias, "sinks": sinks, "kernel": kernel, "gradients": ["sinks"]}
        return jnp.sum(D_OUT * kernelry.attention(QUERY, KEY * 0, VALUE, **options))

    with place, kernelry.use(tiling=TILES[kernel] or None):
        found = jax.grad(total)(sinks)
    out = np.asarray(VALUE, np.float64)[0, :, 0].sum(axis=0) / (LENGTH + 1)
    wanted = -np.einsum("tnd,d->n", np.asarray(D_OUT, np.float64)[0], out) / (LENGTH + 1)
    np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-5)


@functools.partial(jax.jit, static_argnames="kernel")
def merged(value, bias, sinks, *, kernel):
    def part(value, keys):
        given = (QUERY * 0, KEY[:, keys], value[:, keys])
        return kernelry.attention(*given, bias=bias[..., keys], kernel=kernel, return_partial=True, gradients=["value"])

    def whole(value):
        parts = [part(value, slice(*ends)) for ends in ((0, 16), (16, LENGTH))]
        return kernelry.finalize(kernelry.merge(parts), sinks)

    out, pull = jax.vjp(whole, value)
    return out, *pull(D_OUT)


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize("level", [-1e9, LEAST])
@pytest.mark.parametrize("kernel", KERNELS)
def test_parts_of_large_logits_weigh_as_many_keys_as_they_have(kernel, level):
    """Of 16 and of 32 keys the logarithms of the sums differ by 0.7, which vanishes where lse is −1e9."""
    bias = jnp.full((1, 1, LENGTH, LENGTH), level, jnp.float32)
    sinks = None if level == LEAST else jnp.full((2,), level, jnp.float32)  # a logarithm vanishes there in float64, too
    place = testing.interpret() if kernel == "pallas_flash" else contextlib.nullcontext()
    with place, kernelry.use(tiling=TILES[kernel] or None):
        out, d_value = merged(VALUE, bias, sinks, kernel=kernel)
    given = {"mask": masks.Full(), "bias": np.asarray(bias), "sinks": None if sinks is None else np.asarray(sinks)}
    expected = reference_attention(QUERY * 0, KEY, VALUE, **given)
    wanted = reference_gradients(QUERY * 0, KEY, VALUE, d_out=D_OUT, **given)
    np.testing.assert_allclose(np.asarray(out), expected.out, atol=2e-6)
    np.testing.assert_allclose(np.asarray(d_value), wanted.value, atol=2e-6)


LEVELS = (1e3, -1e3, 1e4, -1e4, 1e6, -1e6, 1e9, -1e9, 1e30, -1e30)
OFF = {
    "pallas_flash": {1e3: 2e-5, 1e4: 2e-4, 1e6: 2e-2},
    "splash": {1e3: 2e-5, 1e4: 2e-4, 1e6: 2e-2},
    "tokamax_splash": {1e3: 2e-5, 1e4: 2e-4, 1e6: 2e-2},
    "pallas_mha": {1e3: 1e-4, 1e4: 1e-3, 1e6: 1e-1},
}
"""By how much of the largest a gradient may be off, by the level of the products: what the READMEs say."""
NO_OUTPUT = {"pallas_mha": 1e30}
"""The level from which the output itself is not finite."""


@functools.partial(jax.jit, static_argnames="kernel")
def of_products(query, key, value, d_out, *, kernel):
    out, pull = jax.vjp(lambda *qkv: kernelry.attention(*qkv, kernel=kernel), query, key, value)
    return out, pull(d_out)


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize(
    "kernel", ["pallas_flash", "splash", pytest.param("tokamax_splash", marks=pytest.mark.sweep), "pallas_mha"]
)
def test_large_products_of_queries_and_keys_take_what_the_readme_says(kernel):
    """Equal keys share, however large their logits; gradients lose the digits that the logsumexp loses."""
    if kernel == "tokamax_splash":
        pytest.importorskip("tokamax")
    length = 128
    query, value, d_out = draw(0, 1, length, 2, DIM), draw(2, 1, length, 1, DIM), draw(3, 1, length, 2, DIM)
    for level in LEVELS:
        factor = np.float32(np.sqrt(abs(level)))
        key = jnp.broadcast_to(draw(1, 1, 1, 1, DIM), value.shape) * np.sign(level) * factor
        with testing.interpret():
            out, (_, d_key, d_value) = of_products(query * factor, key, value, d_out, kernel=kernel)
        if abs(level) >= NO_OUTPUT.get(kernel, np.inf):
            continue
        wanted = reference_attention(query * factor, key, value, mask=masks.Full()).out
        np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=2e-6, err_msg=str(level))
        if abs(level) not in OFF[kernel]:
            continue
        right = reference_gradients(query * factor, key, value, mask=masks.Full(), d_out=d_out)
        for found, theirs in ((d_key, right.key), (d_value, right.value)):
            off = OFF[kernel][abs(level)] * np.abs(theirs).max()
            np.testing.assert_allclose(np.asarray(found, np.float64), theirs, atol=off, err_msg=str(level))


@functools.partial(jax.jit, static_argnames=("kernel", "partial"))
def decoded(query, key, value, *, kernel, partial):
    mask = masks.Lengths(jnp.asarray([256, 100]))
    options = {"mask": mask, "mode": "decode", "kernel": kernel}
    result = kernelry.attention(query, key, value, return_partial=partial, **options)
    return kernelry.finalize(result, jnp.asarray([0.5, -1.0])) if partial else result


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize("partial", [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("kernel", "dim"), [("ragged", 128), ("pallas_decode", 32)])
def test_decode_is_exact_at_every_level_of_logits(kernel, dim, partial):
    query, key, value = draw(0, 2, 1, 2, dim), draw(1, 2, 256, 1, dim), draw(2, 2, 256, 1, dim)
    alike = jnp.broadcast_to(key[:, :1], key.shape)
    for level in (*LEVELS[2:], -1e35):
        factor = np.float32(np.sqrt(abs(level)))
        for keys in (key * factor * np.sign(level), alike * factor * np.sign(level)):
            with testing.interpret():
                found = decoded(query * factor, keys, value, kernel=kernel, partial=partial)
            named = {"mask": masks.Lengths(np.asarray([256, 100]))}
            named |= {"sinks": np.asarray([0.5, -1.0])} if partial else {}
            wanted = reference_attention(query * factor, keys, value, **named).out
            np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=2e-6, err_msg=str(level))
