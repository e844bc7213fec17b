"""Modes of JAX that a program may have switched on: each once over every kernel, cache and adapter that runs here.

Modes are switched by context managers around a call, so that no other test sees them.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, testing
from kernelry.cache import PagedCache, QuantizedArray, RollingCache, SharedPrefix, TwoPartCache
from kernelry.moba import select_blocks
from kernelry.testing import reference_attention, reference_gradients

MODES = {
    "x64": functools.partial(jax.enable_x64, True),
    "strict": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "debug_nans": functools.partial(jax.debug_nans, True),
    "debug_infs": functools.partial(jax.debug_infs, True),
}
LENGTH = 128
"""What every kernel takes, splash's blocks included."""
IDS = np.repeat([0, 1, -1], [50, 50, 28])
TRAIN = ("blockwise", "dot_product", "pallas_flash", "pallas_mha", "splash", "tokamax_splash")
DECODE = ("blockwise", "dot_product", "pallas_decode", "ragged")
MASKS = {
    "causal": masks.Causal(),
    "packed": masks.Causal() & masks.Segments(IDS),
    "lengths": masks.Lengths(jnp.asarray([100])),
    "traced": masks.Causal().at(query_positions=jnp.arange(LENGTH, dtype=jnp.int32)),
    "dense": masks.Dense(np.random.default_rng(1).random((1, 1, LENGTH, LENGTH)) < 0.5),
}
SMOKE = {
    ("dot_product", "causal", "strict"),
    ("dot_product", "causal", "debug_nans"),
    ("dot_product", "causal", "debug_infs"),
    ("blockwise", "causal", "x64"),
    ("blockwise", "packed", "debug_infs"),
    ("pallas_flash", "causal", "x64"),
    ("splash", "causal", "x64"),
    ("tokamax_splash", "dense", "strict"),
    ("paged", None, "strict"),
    ("paged", None, "debug_nans"),
    ("two_part", None, "x64"),
    ("moba", None, "debug_infs"),
}
"""What `make test` runs; the rest is swept."""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arrays(q_len=LENGTH, heads=2, kv_heads=2, dim=16):
    shapes = (1, q_len, heads, dim), (1, LENGTH, kv_heads, dim), (1, LENGTH, kv_heads, dim)
    return [jnp.asarray(normal(*shape, seed=seed)) for seed, shape in enumerate(shapes)]


def place(kernel):
    return contextlib.nullcontext() if kernel in ("blockwise", "dot_product") else testing.interpret()


def cases(names, others):
    """All of names × others × modes."""
    for name, other, mode in itertools.product(names, others, MODES):
        marks = [] if (name, other, mode) in SMOKE else [pytest.mark.sweep]
        yield pytest.param(name, other, mode, marks=marks, id=f"{name}-{other}-{mode}")


def compiled(function, mode):
    """One program, where that is cheaper; JAX looks for NaN and inf after each operation outside of one."""
    return function if mode.startswith("debug") else jax.jit(function)


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize(("kernel", "mask", "mode"), list(cases(TRAIN, MASKS)))
def test_training_is_the_same_in_a_mode_of_jax(kernel, mask, mode):
    qkv = arrays()
    bias = jnp.asarray(normal(1, 1, 1, LENGTH)) if kernel == "blockwise" else None

    def call(query, key, value):
        return kernelry.attention(query, key, value, mask=MASKS[mask], bias=bias, kernel=kernel, gradients=QKV)

    def derived(*qkv):
        out, pull = jax.vjp(call, *qkv)
        return out, pull(jnp.ones_like(out))

    with place(kernel):
        try:
            kernelry.resolve(_request(kernel, mask), kernel=kernel)
        except kernelry.errors.NoKernelError:
            pytest.skip("refused in every mode")
        with MODES[mode]():
            out, gradients = compiled(derived, mode)(*qkv)
    more = {} if bias is None else {"bias": bias}
    expected = reference_attention(*qkv, mask=MASKS[mask], **more)
    cotangents = reference_gradients(*qkv, mask=MASKS[mask], d_out=np.ones(out.shape), **more)
    np.testing.assert_allclose(np.asarray(out), expected.out, atol=1e-5)
    for name, found in zip(QKV, gradients, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(found), getattr(cotangents, name), atol=1e-4, err_msg=name)


QKV = ("query", "key", "value")


def _request(kernel, mask):
    facts = {"q_len": LENGTH, "q_heads": 2, "kv_heads": 2, "head_dim": 16, "target": "cpu"}
    interpreted = kernel not in ("blockwise", "dot_product")
    return kernelry.Request(mask=MASKS[mask].form, interpret=interpreted, gradients=QKV, **facts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [pytest.param(name, marks=pytest.mark.sweep) for name in DECODE])
def test_decoding_is_the_same_in_a_mode_of_jax(kernel, mode):
    query, key, value = arrays(q_len=1, dim=128)
    mask = masks.Lengths(jnp.asarray([100]))
    with place(kernel), MODES[mode]():
        out = kernelry.attention(query, key, value, mask=mask, kernel=kernel, mode="decode")
    expected = reference_attention(query, key, value, mask=mask)
    np.testing.assert_allclose(np.asarray(out), expected.out, atol=1e-5)


ROWS, KV_HEADS, DIM = 2, 2, 8
SIZES = {"kv_heads": KV_HEADS, "head_dim": DIM, "dtype": jnp.float32}


def two_part(storage):
    cache = TwoPartCache.create(batch=ROWS, prefill=8, decode=4, storage=storage, **SIZES)
    return cache.prefill(*tokens(6)[1:], lengths=jnp.asarray([6, 4])), {}


def rolling(storage):
    cache = RollingCache.create(batch=ROWS, window=4, max_append=2, storage=storage, **SIZES)
    return cache.prefill(*tokens(6)[1:], lengths=jnp.asarray([6, 4])), {"mask": masks.SlidingWindow(3)}


def paged(storage):
    cache = PagedCache.create(rows=ROWS, pages=12, page_size=4, max_length=16, storage=storage, **SIZES)
    return cache.append(*tokens(6)[1:], lengths=jnp.asarray([6, 4])), {}


def prefixed(storage):
    key, value = (jnp.asarray(normal(5, KV_HEADS, DIM, seed=seed)) for seed in (8, 9))
    if storage is not None:
        key, value = QuantizedArray.quantize(key, storage), QuantizedArray.quantize(value, storage)
    return two_part(storage)[0], {"prefix": SharedPrefix(key, value)}


def tokens(count):
    shapes = [(ROWS, count, heads, DIM) for heads in (4, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(normal(*shape, seed=seed)) for seed, shape in enumerate(shapes)]


def moba(storage):
    query, key, value = arrays()
    positions = jnp.arange(LENGTH, dtype=jnp.int32)
    chosen = select_blocks(query, key, chunk_size=16, top_k=3, query_positions=positions)
    return kernelry.attention(query, key, value, mask=chosen & masks.Causal())


def decoded(make, storage):
    cache, options = make(storage)
    _, cache = cache.decode(*tokens(1), **options)
    return cache.decode(*tokens(1), **options)[0]


CACHES = {each.__name__: functools.partial(decoded, each) for each in (two_part, rolling, paged, prefixed)}


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize(("name", "storage", "mode"), [*cases(CACHES, [None, "int8"]), *cases(["moba"], [None])])
def test_caches_and_moba_are_the_same_in_a_mode_of_jax(name, storage, mode):
    run = functools.partial({**CACHES, "moba": moba}[name], storage)
    expected = np.asarray(jax.jit(run)())
    with MODES[mode]():
        found = np.asarray(compiled(run, mode)())
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("check", [jax.debug_nans, jax.debug_infs])
@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_what_is_not_finite_in_an_output_is_still_found(kernel, check):
    query, key, value = arrays()
    wrong = jnp.nan if check is jax.debug_nans else jnp.inf
    value = value.at[0, 0].set(wrong)
    with check(True), pytest.raises(FloatingPointError):
        kernelry.attention(query, key, value, kernel=kernel)


def test_an_empty_rows_lse_is_no_fault_to_the_checks():
    query, key, value = arrays()
    with jax.debug_infs(True), jax.debug_nans(True):
        partial = kernelry.attention(query, key, value, mask=masks.Lengths(0), return_partial=True)
        out = kernelry.finalize(kernelry.merge([partial, partial]))
    assert np.isneginf(np.asarray(partial.lse)).all()
    assert (np.asarray(out) == 0).all()


def test_float64_arrays_under_x64_keep_their_bits_and_others_their_meaning():
    """A mask's ids, a bias beyond float32 and positions of 64 bits reach kernels of 32 bits."""
    query, key, value = arrays()
    with jax.enable_x64(True):
        ids = jnp.asarray(np.repeat([2**40 + 1, 5, -(2**40)], [50, 50, 28]))
        bias = jnp.full((1, 1, LENGTH, LENGTH), -1e300, jnp.float64)
        for kernel in ("blockwise", "dot_product"):
            out = kernelry.attention(query, key, value, mask=masks.Segments(ids), bias=bias, kernel=kernel)
            assert out.dtype == jnp.float32
            flat = np.asarray(value)[0, :50].mean(axis=0)
            np.testing.assert_allclose(np.asarray(out)[0, 0], flat, atol=1e-5)
            assert (np.asarray(out)[0, 100:] == 0).all()
        doubles = (array.astype(jnp.float64) for array in (query, key, value))
        wide = kernelry.attention(*doubles, logits_dtype="float64")
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(
            np.asarray(wide), reference_attention(query, key, value, mask=masks.Full()).out, atol=1e-12
        )


def test_lengths_and_ids_of_64_bits_mean_the_same_to_kernels_of_32_bits():
    query, key, value = arrays()
    with jax.enable_x64(True):
        far = 2**40
        ids = jnp.asarray(np.repeat([1, 1 + far, 2 * far, 1 + 3 * far], LENGTH // 4))
        for mask in (masks.Lengths(jnp.asarray(far)), masks.PrefixLM(jnp.asarray(far)), masks.Segments(ids)):
            found, expected = (
                jax.jit(lambda *qkv, mask, kernel=kernel: kernelry.attention(*qkv, mask=mask, kernel=kernel))(
                    query, key, value, mask=mask
                )
                for kernel in ("blockwise", "dot_product")
            )
            np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5, err_msg=str(mask))


ACCELERATED = (
    ("tpu:v5e", "splash", "train"),
    ("tpu:v5e", "tokamax_splash", "train"),
    ("tpu:v5e", "ragged", "decode"),
    ("gpu:h100", "pallas_flash", "train"),
    ("gpu:h100", "pallas_decode", "decode"),
)


@pytest.mark.sweep
@pytest.mark.versions
@pytest.mark.parametrize(("target", "kernel", "mode"), ACCELERATED)
def test_programs_for_accelerators_are_lowered_under_x64(target, kernel, mode):
    query, key, value = (
        array.astype(jnp.bfloat16) for array in arrays(q_len=1 if mode == "decode" else LENGTH, dim=128)
    )
    mask = masks.Lengths(jnp.asarray([100])) if mode == "decode" else masks.Causal()

    def call(query, key, value):
        out = kernelry.attention(query, key, value, mask=mask, kernel=kernel, mode=mode)
        return out.astype(jnp.float32).sum()

    function = call if mode == "decode" else jax.grad(call, argnums=(0, 1, 2))
    platform = "tpu" if target.startswith("tpu") else "cuda"
    with jax.enable_x64(True), kernelry.use(target=target):
        lowered = jax.jit(function).trace(query, key, value).lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" in lowered
