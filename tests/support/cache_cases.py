"""Streams of tokens fed to caches in pieces, beside the float64 oracle over each row's whole stream.

What a cache is asked here is compiled as a whole: run eagerly, each operation on a new shape is a program, too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernelry
from kernelry.cache import QuantizedArray, RollingCache, SharedPrefix, TwoPartCache
from kernelry.execution.normalization import to_lse
from kernelry.masks import Lengths
from kernelry.testing import reference_attention

B, K, N, H, D = 3, 2, 4, 8, 6
TOKENS = 24
"""Of a row's stream, at most."""
PREFIX = 5
WINDOW, MAX_APPEND = 4, 3
STORAGES = (None, "int8", "int4", "float8_e4m3fn", "int8:heads_and_head_dim")


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """Tokens of every row: query [B, L, N, H], key [B, L, K, H], value [B, L, K, D], and how a cache keeps them."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    storage: str | None = None

    def piece(self, starts, counts, tokens):
        """T tokens a row, of which `counts` are the stream's from `starts` on, and the others NaN."""
        return [_piece(array, starts, counts, tokens) for array in (self.query, self.key, self.value)]

    def kept(self, prefix=None):
        """Keys and values as a cache gives them back, behind those of a prefix: laws need not know about rounding."""
        key, value = (_plain(stored(array, self.storage)) for array in (self.key, self.value))
        if prefix is None:
            return key, value
        shared = (_plain(array)[None].repeat(B, 0) for array in (prefix.key, prefix.value))
        return [np.concatenate(pair, 1) for pair in zip(shared, (key, value), strict=True)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stream_of(storage=None, seed=0):
    key, value = normal(B, TOKENS, K, H, seed=seed + 1), normal(B, TOKENS, K, D, seed=seed + 2)
    return Stream(normal(B, TOKENS, N, H, seed=seed), key, value, storage)


def prefix_of(storage=None, seed=50):
    key, value = normal(PREFIX, K, H, seed=seed), normal(PREFIX, K, D, seed=seed + 1)
    return SharedPrefix(stored(key, storage), stored(value, storage))


def stored(array, storage):
    return jnp.asarray(array) if storage is None else _quantized(array, storage)


_quantized = jax.jit(QuantizedArray.quantize, static_argnums=1)


def _plain(array):
    return np.asarray(array.dequantize() if isinstance(array, QuantizedArray) else array)


def _piece(array, starts, counts, tokens):
    out = np.full((B, tokens, *array.shape[2:]), np.nan, np.float32)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        out[row, :count] = array[row, start : start + count]
    return jnp.asarray(out)


@functools.partial(jax.jit, static_argnames="method")
def written(cache, key, value, lengths, *, method="append"):
    return getattr(cache, method)(key, value, lengths=lengths)


_STATIC = ("scale", "soft_cap", "mode", "return_partial", "return_max_logits")


@functools.partial(jax.jit, static_argnames=_STATIC)
def attended(cache, query, **options):
    return cache.attend(query, **options)


@functools.partial(jax.jit, static_argnames=_STATIC)
def decoded(cache, query, key, value, **options):
    return cache.decode(query, key, value, **options)


@functools.partial(jax.jit, static_argnames=_STATIC)
def answers(cache, query, *, prefix=None, sinks=None, **options):
    """What `attend` returns: the output, that of its Partial, lse, and the largest logits where there is no prefix."""
    out = cache.attend(query, prefix=prefix, sinks=sinks, **options)
    partial = cache.attend(query, prefix=prefix, return_partial=True, return_max_logits=prefix is None, **options)
    partial, largest = partial if prefix is None else (partial, None)
    return out, kernelry.finalize(partial, sinks), to_lse(partial).lse, largest


def two_part(storage=None, *, prefill=8, decode=7, batch=B):
    return _rotten(
        TwoPartCache.create(
            batch=batch,
            prefill=prefill,
            decode=decode,
            kv_heads=K,
            head_dim=H,
            value_dim=D,
            dtype=jnp.float32,
            storage=storage,
        )
    )


def rolling(storage=None, *, window=WINDOW, max_append=MAX_APPEND, batch=B):
    return _rotten(
        RollingCache.create(
            batch=batch,
            window=window,
            max_append=max_append,
            kv_heads=K,
            head_dim=H,
            value_dim=D,
            dtype=jnp.float32,
            storage=storage,
        )
    )


def _rotten(cache):
    """NaN in every slot that is not written, as memory may hold."""

    def rotten(array):
        is_floating = jnp.issubdtype(array.dtype, jnp.floating)
        return jnp.asarray(np.full(array.shape, np.nan, array.dtype)) if is_floating else array

    return jax.tree.map(rotten, cache)


@dataclasses.dataclass(frozen=True, slots=True)
class Fed:
    """A cache and the tokens that came into it; `starts` and `counts` are those of the last call, of `tokens` a row."""

    cache: Any
    stream: Stream
    starts: np.ndarray
    counts: np.ndarray
    tokens: int

    @classmethod
    def new(cls, cache, storage=None):
        zero = np.zeros(B, np.int32)
        return cls(cache, stream_of(storage), zero, zero, 0)

    def feed(self, method, tokens, counts):
        """The next `counts` tokens of every row, among `tokens` passed."""
        counts = np.asarray(counts, np.int32)
        starts = np.zeros(B, np.int32) if method == "prefill" else self.starts + self.counts
        _, key, value = self.stream.piece(starts, counts, tokens)
        after = written(self.cache, key, value, counts, method=method)
        np.testing.assert_array_equal(after.lengths, starts + counts)
        return dataclasses.replace(self, cache=after, starts=starts, counts=counts, tokens=tokens)

    def last(self, tokens):
        """As if only the last tokens had come with the last call."""
        counts = np.minimum(self.counts, tokens)
        return dataclasses.replace(self, starts=self.starts + self.counts - counts, counts=counts, tokens=tokens)

    def attend(self, mask, **options):
        query, _, _ = self.stream.piece(self.starts, self.counts, self.tokens)
        return attended(self.cache, query, mask=mask, lengths=self.counts, **options)

    def oracle(self, mask, *, prefix=None, mode=None, **options):
        """Attention over each row's whole stream so far, whatever the mode."""
        key, value = self.stream.kept(prefix)
        start = 0 if prefix is None else prefix.length
        query, _, _ = self.stream.piece(self.starts, self.counts, self.tokens)
        end = self.starts + self.counts + start
        seen = mask.at(query_offset=self.starts + start, kv_offset=0) & Lengths(end, self.counts)
        return reference_attention(np.nan_to_num(query), key, value, mask=seen, **options)

    def check(self, mask, *, prefix=None, sinks=None, atol=3e-6, **options):
        """Attends and compares everything that can be asked for with the oracle."""
        want = self.oracle(mask, prefix=prefix, sinks=sinks, **options)
        query, _, _ = self.stream.piece(self.starts, self.counts, self.tokens)
        found = answers(self.cache, query, mask=mask, lengths=self.counts, prefix=prefix, sinks=sinks, **options)
        out, finalized, lse, largest = found
        close(out, want.out, atol)
        close(finalized, want.out, atol)
        close(lse, want.lse, 1e-5)
        if largest is not None:
            close(largest, want.max_logits, 1e-5)
        return self


def in_shuffled_pages(key, value, page_size=16):
    """The same keys and values in shuffled pages, among pages of NaN that belong to nobody, and the table of pages."""
    batch, pages = key.shape[0], key.shape[1] // page_size
    table = 1 + np.random.default_rng(5).permutation(batch * pages).reshape(batch, pages)

    def cut(array):
        found = np.full((batch * pages + 2, page_size, *array.shape[2:]), np.nan, np.float32)
        found[table] = np.asarray(array).reshape(batch, pages, page_size, *array.shape[2:])
        return jnp.asarray(found)

    return cut(key), cut(value), table.astype(np.int32)


def close(got, want, atol=3e-6):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=0, atol=atol)
