"""The calls of attention in training, prefill and decode, from a model's config and shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp

from kernelry.config.layer import AttentionConfig, AttentionType, options_of
from kernelry.errors import ArgumentError
from kernelry.masks import BlockSelection, Lengths
from kernelry.masks.arrays import filled
from kernelry.masks.base import Extent, Mask
from kernelry.masks.fit import check_fits
from kernelry.masks.parse import parse_shaped
from kernelry.models.model import LayerKind, config_of
from kernelry.phases.model_shape import CacheKind, CacheShape, ModelShape
from kernelry.policy.scope import current_scope
from kernelry.registry import installed
from kernelry.request.arguments import CallOptions
from kernelry.request.request import Mode, Request
from kernelry.request.sharding import Sharding
from kernelry.request.target import Target
from kernelry.storage import VALUE_IN_KEY, ValueInKey

if TYPE_CHECKING:
    from kernelry.cache import KVCache


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PhaseCall:
    """One call of a phase: its request, and operands of the right shapes without values.

    Args:
      name: which call of the model it is, for display.
      request: the request.
      mask: a mask of the request's form.
      key, value: trees of `jax.ShapeDtypeStruct`.
    """

    name: str
    request: Request
    mask: Mask
    key: Any
    value: Any


def calls(layer: AttentionConfig | LayerKind, shape: ModelShape, target: Target) -> tuple[PhaseCall, ...]:
    """The calls of training, prefill and decode; the first of each mode is the one that `Phases` names.

    Prefill attends to the prompt itself, or reads it from the cache it was just written to. A decode step is at any
    position of a partly filled cache. Layers that do not decode have no cache, and the keys of cross attention are one
    array of the encoder's length, which does not grow.

    Raises:
      ArgumentError: the layer is neither a config nor a kind of layers, or the shape does not fit it.
    """
    config = config_of(layer)
    shape = shape.of(config)
    kv_len = (shape.encoder_len or shape.q_len) if is_cross(layer) else shape.q_len
    extent = dataclasses.replace(shape.prompt, kv_len=kv_len)
    prompt = _with_blocks(config, _prompt_mask(config, shape.mask, extent), extent)
    key, value = _plain(shape, kv_len, CacheShape())
    make = functools.partial(_call, config, shape, target)
    train = make("train", Mode.TRAIN, prompt, key, value)
    itself = make("prefill", Mode.PREFILL, prompt, key, value)
    if not decodes(layer):
        return train, itself
    kind = CacheShape.parse(shape.cache).kind
    if kind is CacheKind.CONTIGUOUS or is_cross(layer):
        slots = kv_len if is_cross(layer) else shape.max_len
        return train, itself, _contiguous_step(config, shape, slots, make)
    # A rolling cache keeps only the end of a prompt.
    read = () if kind is CacheKind.ROLLING else _from_cache(config, shape, make, Mode.PREFILL, "prefill from the cache")
    prefill = (*read, itself) if kind is CacheKind.TWO_PART else (itself, *read)
    return train, *prefill, *_from_cache(config, shape, make, Mode.DECODE, "decode")


def decodes(layer: AttentionConfig | LayerKind) -> bool:
    """Whether one token after another is decoded: not by a model's layers that see later tokens, as encoders do.

    Layers of cross attention see all tokens, of the encoder. A config alone does not say what it is used for.
    """
    if not isinstance(layer, LayerKind) or is_cross(layer):
        return True
    return not layer.config.sees_later_tokens or layer.config.type is AttentionType.BLOCK_DIFFUSION


def is_cross(layer: AttentionConfig | LayerKind) -> bool:
    """Whether the keys are those of an encoder, which precedes the decoder."""
    return isinstance(layer, LayerKind) and layer.name.startswith("cross")


def _prompt_mask(config: AttentionConfig, more: Mask | str, extent: Extent) -> Mask:
    if not isinstance(more, str):
        check_fits(more, extent)
        return config.mask & more
    asked: list[Mask] = []

    def own() -> Mask:
        asked.append(config.mask)
        return config.mask

    read = parse_shaped(more, extent, {**installed.registry().masks, "config": own})
    check_fits(read, extent)
    return read if asked else config.mask & read


def mask_of(config: AttentionConfig, mode: Mode, extent: Extent) -> Mask:
    """The mask of a layer over keys that are passed as one array; only the form of its arrays matters.

    A decode step, and a prompt with more keys than queries, may be at any position.
    """
    mask = config.mask
    if mode is Mode.DECODE or extent.q_len != extent.kv_len:
        mask = mask.at(query_offset=_anywhere())
    if mode is not Mode.DECODE:
        return _with_blocks(config, mask, extent)
    return _with_blocks(config, mask, extent) & Lengths(filled(extent.kv_len, (extent.batch,)))


def _contiguous_step(
    config: AttentionConfig, shape: ModelShape, slots: int, make: Callable[..., PhaseCall]
) -> PhaseCall:
    mask = mask_of(config, Mode.DECODE, dataclasses.replace(shape.prompt, q_len=1, kv_len=slots))
    return make("decode", Mode.DECODE, mask, *_plain(shape, slots, CacheShape.parse(shape.cache)))


def _anywhere() -> jax.Array:
    """An offset known only at run time, as in a loop over tokens: JAX arrays are not static."""
    return jnp.zeros((), jnp.int32)


def _plain(shape: ModelShape, length: int, held: CacheShape) -> tuple[Any, Any]:
    """The shapes of keys and values in one array each, [B, S, K, H] and [B, S, K, D]."""
    # Imported here, like the caches below, because training needs none.
    from kernelry.cache.slots import empty

    _, kv_heads, head_dim, value_dim = shape.heads
    dims = (shape.batch, length, kv_heads)

    def stored() -> tuple[Any, Any]:
        key = empty((*dims, head_dim), shape.dtype, held.storage)
        if held.layout == VALUE_IN_KEY:
            return key, ValueInKey(value_dim)
        return key, empty((*dims, value_dim), shape.dtype, held.storage)

    found: tuple[Any, Any] = jax.eval_shape(stored)
    return found


def _from_cache(
    config: AttentionConfig, shape: ModelShape, make: Callable[..., PhaseCall], mode: Mode, name: str
) -> tuple[PhaseCall, ...]:
    """The calls that `attend` of a cache makes, one for each of its parts."""
    q_len = 1 if mode is Mode.DECODE else shape.q_len

    found = cached(config, shape, q_len)
    numbered = [name] if len(found) == 1 else [f"{name} part {number + 1}" for number in range(len(found))]
    ask = functools.partial(make, partial=len(found) > 1, from_cache=True)
    return tuple(ask(label, mode, *part) for label, part in zip(numbered, found, strict=True))


def cached(config: AttentionConfig, shape: ModelShape, q_len: int) -> list[tuple[Mask, Any, Any]]:
    """The mask of T tokens over each part of a cache, with the part's keys and values.

    Raises:
      ArgumentError: the config needs keys that the cache does not keep.
    """
    if config.moba is not None:
        raise ArgumentError(
            f"cache {str(shape.cache)!r} with moba: blocks are chosen among the keys of one array; use 'contiguous'."
        )
    if config.bias:
        raise ArgumentError(
            f"cache {str(shape.cache)!r} with a bias: `attend` of a cache does not take one; use 'contiguous'."
        )

    def masked() -> list[tuple[Mask, Any, Any]]:
        cache = _cache(config, shape)
        parts = cache.masked_parts(config.mask, q_len, cache.lengths)
        return [(part.mask, part.key, part.value) for part in parts]

    found: list[tuple[Mask, Any, Any]] = jax.eval_shape(masked)
    return found


def _cache(config: AttentionConfig, shape: ModelShape) -> KVCache:
    from kernelry.cache import PagedCache, RollingCache, TwoPartCache

    asked = CacheShape.parse(shape.cache)
    _, kv_heads, head_dim, value_dim = shape.heads
    sizes: dict[str, Any] = {
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "dtype": shape.dtype,
        "storage": asked.storage,
    }
    if asked.kind is CacheKind.TWO_PART:
        return TwoPartCache.create(batch=shape.batch, prefill=shape.q_len, decode=shape.max_len - shape.q_len, **sizes)
    if asked.kind is CacheKind.ROLLING:
        return RollingCache.create(batch=shape.batch, window=_window(config), **sizes)
    assert asked.page_size is not None
    pages = shape.batch * -(-shape.max_len // asked.page_size)
    return PagedCache.create(
        rows=shape.batch,
        pages=pages,
        page_size=asked.page_size,
        max_length=shape.max_len,
        layout=asked.layout,
        **sizes,
    )


def _window(config: AttentionConfig) -> int:
    window = config.window or config.chunk_size
    if isinstance(window, tuple):
        raise ArgumentError(
            f"cache 'rolling' keeps only the last tokens, and window={window} sees later tokens, too; use 'contiguous'."
        )
    if window is None:
        raise ArgumentError(
            f"cache 'rolling' keeps only the last tokens, for layers with a window or chunks, and type "
            f"{config.type.value!r} sees all tokens; use 'two-part' or 'paged:16'."
        )
    return window


def _with_blocks(config: AttentionConfig, mask: Mask, extent: Extent) -> Mask:
    """Adds MoBA's selection of blocks, of which only the form matters here."""
    if config.moba is None:
        return mask
    blocks = -(-extent.kv_len // config.moba.chunk_size)
    selected = filled(False, (extent.batch, extent.kv_heads, extent.q_len, blocks))
    return mask & BlockSelection(selected, config.moba.chunk_size).at(query_offset=_anywhere())


def _call(
    config: AttentionConfig,
    shape: ModelShape,
    target: Target,
    name: str,
    mode: Mode,
    mask: Mask,
    key: Any,
    value: Any,
    *,
    partial: bool = False,
    from_cache: bool = False,
) -> PhaseCall:
    q_len = 1 if mode is Mode.DECODE else shape.q_len
    q_heads, _, head_dim, _ = shape.heads
    request = options_in(mode, config, partial=partial, from_cache=from_cache).request(
        jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            (shape.batch, q_len, q_heads, head_dim), shape.dtype
        ),
        key,
        value,
        mask=mask.form,
        target=target,
        bias=(1, q_heads, q_len, key.shape[1]) if config.bias else None,
        sinks=config.sinks and not partial,  # sinks join once, after the merge of the parts
        interpret=current_scope().interpret,
        sharding=sharding_in(mode, config if shape.sharding is None else Sharding.parse(shape.sharding)),
    )
    return PhaseCall(name, request, mask, key, value)


def sharding_in(mode: Mode, given: AttentionConfig | Sharding | str) -> str | None:
    """How a call of a phase is cut, as text with sizes; None on one device.

    Args:
      mode: the mode of the phase: the query of a decode step has one token, which every device has.
      given: the sharding, or the config that has one.

    Raises:
      ArgumentError: it does not say the size of an axis.
    """
    sharding = given.sharding if isinstance(given, AttentionConfig) else Sharding.parse(given)
    if sharding is None:
        return None
    located = sharding.located
    return str(located.of_one_token if mode is Mode.DECODE else located) or None


def options_in(mode: Mode, config: AttentionConfig, *, partial: bool = False, from_cache: bool = False) -> CallOptions:
    """The options of a call of a phase.

    Args:
      mode: the mode of the phase; only training has dropout.
      config: the config of the layer.
      partial: whether statistics are requested, of a part of the keys.
      from_cache: whether a cache attends, which returns the largest logits only if its own call requests them.
    """
    options = options_of(config)
    return dataclasses.replace(
        options,
        mode=mode,
        dropout_rate=options.dropout_rate if mode is Mode.TRAIN else 0.0,
        partial=partial,
        max_logits=options.max_logits and not from_cache,
    )
