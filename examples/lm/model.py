"""A decoder: RMSNorm, rotary positions, grouped heads, SwiGLU, local and global layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import kernelry
from kernelry import Mode
from kernelry.cache import PagedCache, PagedView
from kernelry.config import AttentionConfig, AttentionType
from kernelry.errors import ConfigError
from kernelry.flax import AttentionOp, Tokens
from lm.mesh import written
from lm.settings import ModelSettings

VOCABULARY = 256  # bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer in slots 0 … length − 1 of a fixed capacity, [B, S, K, H]."""

    key: jax.Array
    value: jax.Array
    length: jax.Array

    def append(self, key: jax.Array, value: jax.Array) -> Cache:
        """Writes the next keys and values."""
        return Cache(
            written(self.key, key, self.length), written(self.value, value, self.length), self.length + key.shape[1]
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Which tokens belong together, and where in their sequence they are; None is one sequence, in its order."""

    segments: jax.Array | None = None  # [B, T]
    positions: jax.Array | None = None  # [T]


ALONE = Packed()


class Attention(nnx.Module):
    """Grouped-query attention; the config says whether the layer is local or global."""

    def __init__(self, model: ModelSettings, kind: str, config: AttentionConfig, rngs: nnx.Rngs) -> None:
        heads, width = (model.heads, model.head_dim), model.width
        kv_heads = (model.kv_heads, model.head_dim)
        self.query = nnx.LinearGeneral(width, heads, use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(width, kv_heads, use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(width, kv_heads, use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral(heads, width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.attend = AttentionOp(
            layer_config(config, kind, model.window), sink_heads=model.heads if config.sinks else None
        )

    def __call__(
        self, x: jax.Array, mode: Mode, cache: Cache | None, packed: Packed = ALONE
    ) -> tuple[jax.Array, Cache | None]:
        start = 0 if cache is None else cache.length
        where = start + jnp.arange(x.shape[1]) if packed.positions is None else packed.positions
        query, key, value = rotate(self.query(x), where), rotate(self.key(x), where), self.value(x)
        if cache is not None:
            cache = cache.append(key, value)
        if cache is not None and mode is Mode.DECODE:
            # The layer's mask, at the position of the new query, hides the unwritten slots, too.
            x = self.attend(query, cache.key, cache.value, tokens=Tokens(query_offset=start), mode=mode)
        else:
            x = self.attend(query, key, value, tokens=Tokens(segment_ids=packed.segments), mode=mode)
        return self.out(x), cache

    def paged(self, x: jax.Array, view: PagedView, counts: jax.Array, mode: Mode) -> tuple[jax.Array, PagedCache]:
        """Writes the last counts[b] tokens of each row of a cache, and attends from them."""
        start, config, held = view.lengths - counts, self.attend.config, view.cache.keys[0]
        dtype = held.dtype if isinstance(held, jax.Array) else x.dtype  # quantised pages serve any query
        where = start[:, None] + jnp.arange(x.shape[1])[None]
        query, key, value = rotate(self.query(x), where), rotate(self.key(x), where), self.value(x)
        view = view.write(key, value, lengths=counts)
        with kernelry.use(policy=config.policy):
            attended = view.attend(
                query.astype(dtype),
                mask=config.mask,
                lengths=counts,
                scale=config.scale,
                soft_cap=config.soft_cap,
                sinks=None if self.attend.sinks is None else self.attend.sinks[...],
                mode=mode,
                logits_dtype=config.logits_dtype,
                precision=config.precision,
            )
        return self.out(attended.astype(x.dtype)), view.cache


class Block(nnx.Module):
    """Attention and a SwiGLU, each behind a norm and around a residual."""

    def __init__(self, model: ModelSettings, kind: str, config: AttentionConfig, rngs: nnx.Rngs) -> None:
        self.kind = kind
        self.attention_norm = nnx.RMSNorm(model.width, rngs=rngs)
        self.attention = Attention(model, kind, config, rngs)
        self.feed_norm = nnx.RMSNorm(model.width, rngs=rngs)
        self.gate = nnx.Linear(model.width, model.hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(model.width, model.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(model.hidden, model.width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: jax.Array, mode: Mode, cache: Cache | None, packed: Packed = ALONE
    ) -> tuple[jax.Array, Cache | None]:
        attended, cache = self.attention(self.attention_norm(x), mode, cache, packed)
        return self.feed(x + attended), cache

    def paged(self, x: jax.Array, view: PagedView, counts: jax.Array, mode: Mode) -> tuple[jax.Array, PagedCache]:
        """The same over a paged cache."""
        attended, cache = self.attention.paged(self.attention_norm(x), view, counts, mode)
        return self.feed(x + attended), cache

    def feed(self, x: jax.Array) -> jax.Array:
        """Adds the SwiGLU."""
        fed = self.feed_norm(x)
        return x + self.down(nnx.silu(self.gate(fed)) * self.up(fed))


class Decoder(nnx.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, model: ModelSettings, config: AttentionConfig, *, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.settings = model
        small = nnx.initializers.normal(0.02)  # so that a tied head starts near uniform: ln 256 = 5.5 nats
        self.embed = nnx.Embed(VOCABULARY, model.width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(model, kind, config, rngs) for kind in model.layers])
        self.norm = nnx.RMSNorm(model.width, rngs=rngs)
        head = None if model.tied else nnx.Linear(model.width, VOCABULARY, use_bias=False, kernel_init=small, rngs=rngs)
        self.head = nnx.data(head)

    def __call__(
        self, tokens: jax.Array, *, mode: Mode = Mode.TRAIN, caches: tuple[Cache, ...] | None = None
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """Returns logits [B, T, 256] and, where caches [layers] were given, those after these tokens."""
        x = self.embed(tokens)
        after: list[Cache] = []
        for place, block in enumerate(self.blocks):
            x, cache = block(x, mode, None if caches is None else caches[place])
            after.append(cache)
        return self.logits(x), None if caches is None else tuple(after)

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns the logits after the last layer."""
        x = self.norm(x)
        return self.embed.attend(x) if self.head is None else self.head(x)

    def paged(
        self,
        tokens: jax.Array,
        cache: PagedCache,
        counts: jax.Array,
        *,
        mode: Mode,
        rows: jax.Array | None = None,
        shared_pages: int = 0,
    ) -> tuple[jax.Array, PagedCache]:
        """Reads the next tokens of rows of a paged cache with a layer for each of the model's.

        Args:
          tokens: [B, T], of which the first counts[b] of row b are tokens.
          cache: before them.
          counts: [B].
          mode: prefill or decode.
          rows: [B], which rows they belong to; None is all.
          shared_pages: that all rows begin with.

        Returns:
          The logits [B, 256] after the last token of each row, and the cache after them all.
        """
        if rows is None:
            cache = cache.allocate(counts)
        else:
            cache = cache.allocate(jnp.zeros_like(cache.lengths).at[rows].set(counts, mode="drop"))
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x, cache = block.paged(x, cache.view(rows, layer, shared_pages), counts, mode)
        last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        return self.logits(last), cache

    def empty_caches(self, batch: int, capacity: int) -> tuple[Cache, ...]:
        """Returns one empty cache per layer."""
        slots = jnp.zeros((batch, capacity, self.settings.kv_heads, self.settings.head_dim))
        return tuple(Cache(slots, slots, jnp.int32(0)) for _ in self.blocks)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))


def layer_config(config: AttentionConfig, kind: str, window: int) -> AttentionConfig:
    """Makes the config of a run that of a local or global layer.

    Raises:
      ConfigError: it has an option that this script has no use for.
    """
    for name in ("type", "dropout_rate", "record_max_logits"):
        if getattr(config, name) != getattr(AttentionConfig(), name):
            raise ConfigError(f"attention.{name}: this script does not use it (layers are named in model.layers).")
    if kind == "global":
        return config
    return dataclasses.replace(config, type=AttentionType.LOCAL_SLIDING, window=window)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding of [B, L, heads, H] at positions [L] or [B, L]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.atleast_2d(positions)[:, :, None] * frequencies[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
