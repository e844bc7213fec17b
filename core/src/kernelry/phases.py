"""Training, prefill and decode of one model, resolved together: what must agree, and what does not."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry import installation
from kernelry.errors import ArgumentError, nearest
from kernelry.kernel import KernelSpec
from kernelry.layer import AttentionConfig, AttentionType
from kernelry.masks import BlockSelection, Causal, Full, Lengths
from kernelry.masks.base import Extent, Mask, is_mask
from kernelry.masks.parse import parse_shaped
from kernelry.operands import page_size_of, quantization_of
from kernelry.request import Mode, Request
from kernelry.resolution import Plan, Resolution
from kernelry.resolver import explain
from kernelry.scope import current_scope
from kernelry.storage import Quantization
from kernelry.target import Target, current_target

if TYPE_CHECKING:
    from kernelry.cache import KVCache


@final
class CacheKind(enum.Enum):
    """How the keys that a decode step reads are held."""

    CONTIGUOUS = "contiguous"
    TWO_PART = "two-part"
    ROLLING = "rolling"
    PAGED = "paged"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CacheShape:
    """How the keys that a decode step reads are held, written `two-part`, `rolling:int8` or `paged:16:int8`.

    Args:
      kind: `contiguous` is one array [B, S, K, H] passed to `kernelry.attention` with `Lengths`; the others are
        `kernelry.cache.TwoPartCache`, `RollingCache` and `PagedCache`.
      page_size: the slots of a page of a paged cache; None for the others.
      storage: how keys and values are quantised, e.g. `int8`; None is not at all.

    Raises:
      ArgumentError: page_size and kind do not go together, or a storage is unknown.
    """

    kind: CacheKind = CacheKind.CONTIGUOUS
    page_size: int | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        paged = self.kind is CacheKind.PAGED
        size = self.page_size
        if paged and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ArgumentError(f"cache: a paged cache needs its page size, e.g. 'paged:16', got {size!r}.")
        if not paged and size is not None:
            raise ArgumentError(f"cache: page_size={size} goes with 'paged' only, got {self.kind.value!r}.")
        if self.storage is not None:
            object.__setattr__(self, "storage", str(Quantization.parse(self.storage)))

    @classmethod
    def parse(cls, text: str | CacheShape) -> CacheShape:
        """Reads `kind[:storage]` or `paged:page_size[:storage]`.

        Raises:
          ArgumentError: it is neither, or a storage is unknown.
        """
        if isinstance(text, CacheShape):
            return text
        kinds = [kind.value for kind in CacheKind]
        word, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
        if word not in kinds:
            raise ArgumentError(f"unknown cache {text!r}{nearest(word or str(text), kinds)}")
        kind, size = CacheKind(word), None
        if kind is CacheKind.PAGED:
            number, _, rest = rest.partition(":")
            size = int(number) if number.isdecimal() else None
            if size is None:
                raise ArgumentError(f"cache {text!r}: a paged cache needs its page size, e.g. 'paged:16'.")
        return cls(kind, size, rest or None)

    def __str__(self) -> str:
        parts = (self.kind.value, self.page_size, self.storage)
        return ":".join(str(part) for part in parts if part is not None)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The facts of a model that its config does not hold.

    Args:
      q_len: T, the tokens of a training sequence and of a prompt.
      max_len: S, the slots of the cache that a decode step reads.
      batch: B.
      q_heads, kv_heads: N and K; `kv_heads=None` is N.
      head_dim, value_dim: H and D; `value_dim=None` is H.
      dtype: of query, key and value, and of a cache that is not quantised.
      two_part: the same as `cache="two-part"`.
      cache: a CacheShape, or its text.
      mask: what training and prefill see besides the config's mask: a mask that fits [B, T], or an expression such as
        `segments`. In an expression the word `config` is the config's mask, e.g. `(config & segments) | spans`;
        without the word it is added by `&`.

    Raises:
      ArgumentError: the prompt does not fit into the cache, or the cache or the mask means nothing.
    """

    q_len: int
    max_len: int
    batch: int = 1
    q_heads: int = 1
    kv_heads: int | None = None
    head_dim: int = 64
    value_dim: int | None = None
    dtype: str = "bfloat16"
    two_part: bool = False
    cache: CacheShape | str = CacheShape()
    mask: Mask | str = "config"

    def __post_init__(self) -> None:
        if self.max_len < self.q_len:
            raise ArgumentError(
                f"max_len={self.max_len} slots cannot hold the prompt of q_len={self.q_len} tokens; raise max_len."
            )
        cache = CacheShape.parse(self.cache)
        if self.two_part and cache.kind is CacheKind.CONTIGUOUS:
            cache = dataclasses.replace(cache, kind=CacheKind.TWO_PART)
        two_part = cache.kind is CacheKind.TWO_PART
        if self.two_part and not two_part:
            raise ArgumentError(f"two_part=True and cache={str(cache)!r} are two caches; leave one of them out.")
        if two_part and self.max_len == self.q_len:
            raise ArgumentError(
                f"cache 'two-part' holds the prompt of q_len={self.q_len} tokens apart from what is decoded after it, "
                f"and max_len={self.max_len} leaves no slot for that; raise max_len."
            )
        if not isinstance(self.mask, str) and not is_mask(self.mask):
            raise ArgumentError(
                f"mask must be a kernelry mask or an expression such as 'segments', got {type(self.mask).__name__}."
            )
        object.__setattr__(self, "cache", cache)
        object.__setattr__(self, "two_part", two_part)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `ModelShape(**data)` is this shape again.

        Raises:
          ArgumentError: the mask is not an expression.
        """
        if not isinstance(self.mask, str):
            raise ArgumentError(f"mask={self.mask!r} cannot be written as JSON; pass an expression, e.g. 'segments'.")
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**data, "cache": str(self.cache)}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """The resolutions of one model; `disagreements` says what does not fit together.

    Args:
      train: forward and backward over whole sequences.
      prefill: the prompt.
      decode: one token that reads the cache, or its first part.
      disagreements: one sentence each; empty where all agree.
      more: what else prefill and decode ask of a cache: its other parts, and a prompt that is read from it.
    """

    train: Resolution
    prefill: Resolution
    decode: Resolution
    disagreements: tuple[str, ...] = ()
    more: tuple[Resolution, ...] = ()

    @property
    def all(self) -> tuple[Resolution, ...]:
        """All resolutions: train, prefill, decode, and then `more`."""
        return self.train, self.prefill, self.decode, *self.more

    def explain(self) -> str:
        """Returns the explanations and the disagreements as text."""
        parts = [f"{r.request.mode.value}: {r.explain()}" for r in self.all]
        return "\n".join([*parts, *(f"disagreement: {text}" for text in self.disagreements or ("none",))])

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: train, prefill, decode, more, disagreements."""
        found = {name: getattr(self, name).to_json() for name in ("train", "prefill", "decode")}
        more = [resolution.to_json() for resolution in self.more]
        return {**found, "more": more, "disagreements": list(self.disagreements)}


def resolve_phases(
    config: AttentionConfig,
    shape: ModelShape,
    *,
    target: Target | str | None = None,
    kernels: tuple[KernelSpec, ...] | None = None,
    changes: bool = True,
) -> Phases:
    """Resolves training, prefill and decode of one model, and compares them.

    Compared are the cache's layout as prefill and decode read it (dtype, heads, dimensions), the
    statistics of a cache in two parts, and what the mask means. Nothing is raised where a phase
    has no kernel; that is a disagreement.

    Args:
      config: the layer's options and policy.
      shape: the sizes, the cache and the mask.
      target: the hardware; None is that of `use`, else the one at hand.
      kernels: the kernels to choose among; None is the installed ones.
      changes: as in `kernelry.explain`.

    Raises:
      ArgumentError, ConfigError: a size, the cache, the mask or the target means nothing.
    """
    found = [
        explain(call.request, kernels=kernels, policy=config.policy, changes=changes)
        for call in calls(config, shape, _target(target))
    ]
    train, prefill, decode = (next(r for r in found if r.request.mode is mode) for mode in Mode)
    more = tuple(resolution for resolution in found if not any(resolution is r for r in (train, prefill, decode)))
    disagreements = (*_unserved(found), *_layout(prefill, decode), *_statistics(found), *_meaning(config))
    return Phases(train, prefill, decode, tuple(dict.fromkeys(disagreements)), more)


def _target(target: Target | str | None) -> Target:
    if isinstance(target, str):
        return Target.parse(target)
    return target or current_scope().target or current_target()


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a phase: its request, and operands that have the right shapes and no meaning.

    Args:
      name: which call of the model it is, for people.
      request: what is asked.
      mask: a mask of that form.
      key, value: trees of `jax.ShapeDtypeStruct`.
    """

    name: str
    request: Request
    mask: Mask
    key: Any
    value: Any


def calls(config: AttentionConfig, shape: ModelShape, target: Target) -> tuple[Call, ...]:
    """What train, prefill and decode ask of attention; the first call of each mode is the one that `Phases` names.

    Prefill attends to the prompt itself, or reads it from the cache it was just written to. A decode step stands
    anywhere in a cache filled in part.
    """
    extent = _extent(shape, shape.q_len, shape.q_len)
    prompt = _with_blocks(config, _prompt_mask(config, shape.mask, extent), extent)
    key, value = _plain(shape, shape.q_len, None)
    make = functools.partial(_call, config, shape, target)
    train = make("train", Mode.TRAIN, prompt, key, value)
    itself = make("prefill", Mode.PREFILL, prompt, key, value)
    kind = CacheShape.parse(shape.cache).kind
    if kind is CacheKind.CONTIGUOUS:
        return train, itself, _contiguous_step(config, shape, make)
    if config.moba is not None:
        raise ArgumentError(
            f"cache {str(shape.cache)!r} with moba: blocks are chosen among the keys of one array; use 'contiguous'."
        )
    # A rolling cache holds the end of a prompt only.
    read = () if kind is CacheKind.ROLLING else _from_cache(config, shape, make, Mode.PREFILL, "prefill from the cache")
    prefill = (*read, itself) if kind is CacheKind.TWO_PART else (itself, *read)
    return train, *prefill, *_from_cache(config, shape, make, Mode.DECODE, "decode")


def _extent(shape: ModelShape, q_len: int, kv_len: int) -> Extent:
    q_heads, kv_heads, _, _ = _heads(shape)
    return Extent(batch=shape.batch, q_heads=q_heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len)


def _prompt_mask(config: AttentionConfig, more: Mask | str, extent: Extent) -> Mask:
    if not isinstance(more, str):
        return config.mask & more
    asked: list[Mask] = []

    def own() -> Mask:
        asked.append(config.mask)
        return config.mask

    read = parse_shaped(more, extent, {**installation.installed().masks, "config": own})
    return read if asked else config.mask & read


def mask_of(config: AttentionConfig, mode: Mode, extent: Extent, *, paged: bool = False) -> Mask:
    """What a layer sees of keys that are passed as one array, or found in pages; only the form of its arrays matters.

    A decode step, and a prompt with more keys than queries, stands anywhere in them.
    """
    mask = config.mask
    if mode is Mode.DECODE or extent.q_len != extent.kv_len:
        mask = mask.at(query_offset=_anywhere())
    if mode is not Mode.DECODE:
        return _with_blocks(config, mask, extent)
    if paged and extent.q_len == 1 and isinstance(config.mask, Causal):
        mask = Full()  # as a cache asks for one token, which sees all before it
    return _with_blocks(config, mask, extent) & Lengths(np.full(extent.batch, extent.kv_len, np.int32))


def _contiguous_step(config: AttentionConfig, shape: ModelShape, make: Callable[..., Call]) -> Call:
    mask = mask_of(config, Mode.DECODE, _extent(shape, 1, shape.max_len))
    storage = CacheShape.parse(shape.cache).storage
    return make("decode", Mode.DECODE, mask, *_plain(shape, shape.max_len, storage))


def _anywhere() -> jax.Array:
    """An offset known only at run time, as in a loop over tokens: a JAX array is not static."""
    return jnp.zeros((), jnp.int32)


def _plain(shape: ModelShape, length: int, storage: str | None) -> tuple[Any, Any]:
    """Keys and values of one array each, [B, S, K, H] and [B, S, K, D]."""
    # Imported here, as everything of caches below, because training needs none.
    from kernelry.cache.slots import empty

    _, kv_heads, head_dim, value_dim = _heads(shape)
    dims = (shape.batch, length, kv_heads)
    found: tuple[Any, Any] = jax.eval_shape(
        lambda: tuple(empty((*dims, width), shape.dtype, storage) for width in (head_dim, value_dim))
    )
    return found


def _heads(shape: ModelShape) -> tuple[int, int, int, int]:
    """N, K, H, D."""
    return (
        shape.q_heads,
        shape.q_heads if shape.kv_heads is None else shape.kv_heads,
        shape.head_dim,
        shape.head_dim if shape.value_dim is None else shape.value_dim,
    )


def _from_cache(
    config: AttentionConfig, shape: ModelShape, make: Callable[..., Call], mode: Mode, name: str
) -> tuple[Call, ...]:
    """What `attend` of a cache asks, a call for each of its parts."""
    q_len = 1 if mode is Mode.DECODE else shape.q_len

    def parts() -> list[tuple[Mask, Any, Any]]:
        cache = _cache(config, shape)
        masked = cache.masked_parts(config.mask, q_len, cache.lengths)
        return [(mask, part.key, part.value) for part, mask in masked]

    found = jax.eval_shape(parts)
    numbered = [name] if len(found) == 1 else [f"{name}, part {number + 1}" for number in range(len(found))]
    ask = functools.partial(make, partial=len(found) > 1, from_cache=True)
    return tuple(ask(label, mode, *part) for label, part in zip(numbered, found, strict=True))


def _cache(config: AttentionConfig, shape: ModelShape) -> KVCache:
    from kernelry.cache import PagedCache, RollingCache, TwoPartCache

    held = CacheShape.parse(shape.cache)
    _, kv_heads, head_dim, value_dim = _heads(shape)
    facts: dict[str, Any] = {
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "dtype": shape.dtype,
        "storage": held.storage,
    }
    if held.kind is CacheKind.TWO_PART:
        return TwoPartCache.create(batch=shape.batch, prefill=shape.q_len, decode=shape.max_len - shape.q_len, **facts)
    if held.kind is CacheKind.ROLLING:
        return RollingCache.create(batch=shape.batch, window=_window(config), **facts)
    assert held.page_size is not None
    pages = shape.batch * -(-shape.max_len // held.page_size)
    return PagedCache.create(rows=shape.batch, pages=pages, page_size=held.page_size, max_length=shape.max_len, **facts)


def _window(config: AttentionConfig) -> int:
    window = config.window or config.chunk_size
    if window is None:
        raise ArgumentError(
            f"cache 'rolling' keeps the last tokens for layers with a window or chunks, and type {config.type.value!r} "
            "looks at all; use 'two-part' or 'paged:16'."
        )
    return window


def _with_blocks(config: AttentionConfig, mask: Mask, extent: Extent) -> Mask:
    """Adds MoBA's choice of blocks, of which only the form matters here."""
    if config.moba is None:
        return mask
    blocks = -(-extent.kv_len // config.moba.chunk_size)
    selected = np.zeros((extent.batch, extent.kv_heads, extent.q_len, blocks), bool)
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
) -> Call:
    _, kv_len, kv_heads, head_dim = key.shape
    request = Request(
        target=target,
        mode=mode,
        batch=shape.batch,
        q_len=1 if mode is Mode.DECODE else shape.q_len,
        kv_len=kv_len,
        q_heads=shape.q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value.shape[-1],
        dtype=shape.dtype,
        partial=partial,
        kv_quantization=quantization_of(key),
        page_size=page_size_of(key),
        interpret=current_scope().interpret,
        mask=mask.form,
        **options_of(config, mode, partial=partial, from_cache=from_cache),
    )
    return Call(name, request, mask, key, value)


def options_of(
    config: AttentionConfig, mode: Mode, *, partial: bool = False, from_cache: bool = False
) -> dict[str, Any]:
    """What a config says of a call besides its mask, as fields of a Request.

    Args:
      config: the layer's.
      mode: only training drops out.
      partial: whether statistics are wanted, of a part of the keys.
      from_cache: whether a cache attends, which returns largest logits only where its call asks for them.
    """
    return {
        "scale": config.scale,
        "soft_cap": config.soft_cap,
        # Sinks join once, after the merge of the parts; Request refuses them in a part.
        "sinks": config.sinks and not partial,
        "dropout_rate": config.dropout_rate if mode is Mode.TRAIN else 0.0,
        "logits_dtype": config.logits_dtype,
        "precision": config.precision,
        "max_logits": config.record_max_logits and not from_cache,
    }


def _unserved(resolutions: Iterable[Resolution]) -> Iterator[str]:
    for resolution in resolutions:
        if resolution.plan is None:
            reasons = "; ".join(f"{c.name}: {c.refusals[0]}" for c in resolution.refused) or "no kernels are installed"
            yield f"{resolution.request.mode.value}: no kernel serves it ({reasons})"


_LAYOUT = ("dtype", "kv_heads", "head_dim", "value_dim")


def _layout(prefill: Resolution, decode: Resolution) -> Iterator[str]:
    """A cache is written once: where one phase's kernel reads it otherwise, it is rewritten at every step."""
    if prefill.plan is None or decode.plan is None:
        return
    for name in _LAYOUT:
        first, second = (getattr(plan.inner_request, name) for plan in (prefill.plan, decode.plan))
        if first != second:
            yield (
                f"cache layout: the kernel of prefill reads {name}={first} ({_through(prefill.plan)}), that of decode "
                f"{name}={second} ({_through(decode.plan)}); the adapters copy keys and values on every call"
            )


def _through(plan: Plan) -> str:
    return f"{plan.kernel.name}{''.join(f' through {step.adapter.name}' for step in plan.steps)}"


def _statistics(resolutions: Iterable[Resolution]) -> Iterator[str]:
    """Parts merge in either form of the statistics, but each must have one."""
    for resolution in resolutions:
        if resolution.plan is None or not resolution.request.partial:
            continue
        if not resolution.plan.kernel.capabilities.statistics:
            mode = resolution.request.mode.value
            yield f"statistics: {resolution.kernel} of {mode} returns none that could be merged"


def _meaning(config: AttentionConfig) -> Iterator[str]:
    """In training a query may see later tokens, which one step of decode does not have yet."""
    if config.type in (AttentionType.FULL, AttentionType.BLOCK_DIFFUSION):
        yield (
            f"mask meaning: with type {config.type.value!r} a query of training sees later tokens, and a decode step "
            "of one token does not; decode whole blocks at a time, or choose a causal type"
        )
