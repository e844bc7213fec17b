"""What a model's config does not say: sizes, the cache, and what else is masked."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, final

from kernelry.config.layer import HEADS, AttentionConfig
from kernelry.errors import ArgumentError, nearest
from kernelry.masks.base import Extent, Mask, is_mask
from kernelry.masks.fit import check_fits
from kernelry.request.checks import is_dtype, shown, spelled
from kernelry.request.names import named_dtype
from kernelry.request.sharding import Sharding
from kernelry.storage import INTERLEAVED, KV_LAYOUTS, SEPARATE, Quantization

LARGEST_SIZE = 2**31 - 1
"""Of a dimension, so that positions fit int32."""
_LARGEST_ARRAY = 2**60
"""Elements, below what JAX and NumPy can count in bytes."""


@final
class CacheKind(enum.Enum):
    """How the keys that a decode step reads are stored."""

    CONTIGUOUS = "contiguous"
    TWO_PART = "two-part"
    ROLLING = "rolling"
    PAGED = "paged"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CacheShape:
    """How the keys that a decode step reads are stored, written `two-part`, `rolling:int8` or `paged:16:int8`.

    With a layout it is written `paged:16:interleaved` or `contiguous:value_in_key:int8`.

    Args:
      kind: `contiguous` is one array [B, S, K, H] passed to `kernelry.attention` with `Lengths`; the others are
        `kernelry.cache.TwoPartCache`, `RollingCache` and `PagedCache`.
      page_size: the slots of a page of a paged cache; None for the others.
      storage: how keys and values are quantised, e.g. `int8`; None means not at all.
      layout: how they are stored relative to each other: `separate`; `value_in_key`, of contiguous and paged keys; or
        `interleaved`, of pages that are not quantised.

    Raises:
      ArgumentError: page_size or the layout does not go with the kind, or the storage or the layout is unknown.
    """

    kind: CacheKind = CacheKind.CONTIGUOUS
    page_size: int | None = None
    storage: str | None = None
    layout: str = SEPARATE

    def __post_init__(self) -> None:
        paged = self.kind is CacheKind.PAGED
        size = self.page_size
        if paged and (type(size) is not int or not 1 <= size <= LARGEST_SIZE):
            raise ArgumentError(f"cache: a paged cache needs its page size, e.g. 'paged:16', got {size!r}.")
        if not paged and size is not None:
            raise ArgumentError(f"cache: page_size={size} goes with 'paged' only, got {self.kind.value!r}.")
        if self.storage is not None:
            object.__setattr__(self, "storage", str(Quantization.parse(self.storage)))
        if not isinstance(self.layout, str) or self.layout not in KV_LAYOUTS:
            raise ArgumentError(f"cache: unknown layout {self.layout!r}{nearest(str(self.layout), KV_LAYOUTS)}")
        if self.layout == INTERLEAVED and (not paged or self.storage is not None):
            raise ArgumentError(
                f"cache: layout={self.layout!r} is one of pages that are not quantised, e.g. 'paged:16:interleaved', "
                f"got '{self}'."
            )
        if self.layout != SEPARATE and self.kind not in (CacheKind.CONTIGUOUS, CacheKind.PAGED):
            raise ArgumentError(f"cache: layout={self.layout!r} goes with 'contiguous' and 'paged' only, got {self}.")

    @classmethod
    def parse(cls, text: str | CacheShape) -> CacheShape:
        """Reads `kind[:layout][:storage]` or `paged:page_size[:layout][:storage]`.

        Raises:
          ArgumentError: it is neither, or the storage is unknown.
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
            size = int(number) if number.isdecimal() and len(number) <= len(str(LARGEST_SIZE)) else None
            if size is None:
                raise ArgumentError(f"cache {text!r}: a paged cache needs its page size, e.g. 'paged:16'.")
        first, _, others = rest.partition(":")
        layout, storage = (first, others) if first in KV_LAYOUTS else (SEPARATE, rest)
        return cls(kind, size, storage or None, layout)

    def __str__(self) -> str:
        layout = None if self.layout == SEPARATE else self.layout
        parts = (self.kind.value, self.page_size, layout, self.storage)
        return ":".join(str(part) for part in parts if part is not None)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a model's config does not say.

    Args:
      q_len: T, the length of a training sequence and of a prompt.
      max_len: S, the slots of the cache that a decode step reads.
      encoder_len: S of cross attention, the tokens of the encoder; None is q_len.
      batch: B.
      q_heads, kv_heads, head_dim, value_dim: N, K, H and D; None means the config's, else 1, N, 64 and H.
      dtype: the dtype of query, key and value, and of a cache that is not quantised.
      two_part: the same as `cache="two-part"`.
      cache: a CacheShape, or its text.
      mask: what training and prefill see besides the config's mask: a mask that fits [B, T], or an expression such as
        `segments`. In an expression the word `config` means the config's mask, e.g. `(config & segments) | spans`;
        without that word it is combined with the config's mask by `&`.
      sharding: how the calls are cut over the axes of a mesh, with their sizes, as in `kernelry.parallel.Sharding`, or
        its text; of a decode step, whose query has one token, only the keys are cut along a sequence. None is the
        config's, and "" one device.

    Raises:
      ArgumentError: a size is not an integer from 1 to 2**31 - 1, the heads, the prompt and its cache, or the mask do
        not fit, or the dtype, the cache, the mask or the sharding is invalid.
    """

    q_len: int
    max_len: int
    batch: int = 1
    q_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    dtype: str = "bfloat16"
    two_part: bool = False
    cache: CacheShape | str = CacheShape()
    mask: Mask | str = "config"
    sharding: Sharding | str | None = None
    encoder_len: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        object.__setattr__(self, "dtype", _dtype(self.dtype))
        if type(self.two_part) is not bool:
            raise ArgumentError(f"two_part must be True or False, got {shown(self.two_part)}.")
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
                f"cache 'two-part' keeps the prompt of q_len={self.q_len} tokens apart from those decoded after it, "
                f"and max_len={self.max_len} leaves no slot for these; raise max_len."
            )
        if not isinstance(self.mask, str) and not is_mask(self.mask):
            raise ArgumentError(
                f"mask must be a kernelry mask or an expression such as 'segments', got {type(self.mask).__name__}."
            )
        if self.sharding is not None:
            object.__setattr__(self, "sharding", str(Sharding.parse(self.sharding).located))
        object.__setattr__(self, "cache", cache)
        object.__setattr__(self, "two_part", two_part)
        if not isinstance(self.mask, str) and self.q_heads is not None:
            check_fits(self.mask, self.prompt)
        _check_arrays(self, cache)

    def of(self, config: AttentionConfig) -> ModelShape:
        """Returns this shape with heads and head dims, which it, or else the config, or else the defaults say.

        Raises:
          ArgumentError: a size that the config has is another one here, or the sizes do not fit together.
        """
        sizes: dict[str, int | None] = {}
        for name in HEADS:
            own, said = getattr(self, name), getattr(config, name)
            if own is not None and said is not None and own != said:
                raise ArgumentError(f"{name}={own} contradicts {name}={said} of {config.source}; leave it out.")
            sizes[name] = said if own is None else own
        found = dataclasses.replace(self, **sizes)  # type: ignore[arg-type]
        return dataclasses.replace(found, **dict(zip(HEADS, found.heads, strict=True)))  # type: ignore[arg-type]

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """N, K, H, D; where nothing says them, the defaults."""
        q_heads, head_dim = self.q_heads or 1, self.head_dim or 64
        return q_heads, self.kv_heads or q_heads, head_dim, self.value_dim or head_dim

    @property
    def prompt(self) -> Extent:
        """The sizes that the mask of training and of a prompt must fit: B, N, K, and T twice."""
        q_heads, kv_heads, _, _ = self.heads
        return Extent(batch=self.batch, q_heads=q_heads, kv_heads=kv_heads, q_len=self.q_len, kv_len=self.q_len)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `ModelShape(**data)` is this shape again.

        Raises:
          ArgumentError: the mask is not an expression.
        """
        if not isinstance(self.mask, str):
            raise ArgumentError(f"mask={self.mask!r} cannot be written as JSON; pass an expression, e.g. 'segments'.")
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.encoder_len is None:
            del data["encoder_len"]  # as in lock files that were written before there was such a size
        return {**data, "cache": str(self.cache)}


def _check_sizes(shape: ModelShape) -> None:
    for name in ("q_len", "max_len", "batch", *HEADS, "encoder_len"):
        size = getattr(shape, name)
        if size is None and name in (*HEADS, "encoder_len"):
            continue
        if type(size) is not int or not 1 <= size <= LARGEST_SIZE:
            raise ArgumentError(f"{name} must be an integer from 1 to {LARGEST_SIZE}, got {shown(size)}.")
    if None not in (shape.q_heads, shape.kv_heads) and shape.heads[0] % shape.heads[1]:
        raise ArgumentError(f"kv_heads={shape.kv_heads} must divide q_heads={shape.q_heads}.")


def _check_arrays(shape: ModelShape, cache: CacheShape) -> None:
    """Refuses sizes that are possible one by one, but whose arrays would be too large."""
    page = cache.page_size or 1
    slots = max(-(-shape.max_len // page) * page, shape.encoder_len or 0)
    q_heads, kv_heads, head_dim, value_dim = shape.heads
    largest = shape.batch * max(slots * kv_heads, shape.q_len * q_heads) * max(head_dim, value_dim)
    if largest > _LARGEST_ARRAY:
        raise ArgumentError(
            f"batch={shape.batch}, q_len={shape.q_len}, max_len={shape.max_len} and the heads give arrays of {largest} "
            "elements, too large for any machine; use smaller sizes."
        )


def _dtype(dtype: Any) -> str:
    """The full name of a dtype."""
    name = named_dtype(dtype)
    if not isinstance(name, str) or not is_dtype(name):
        raise ArgumentError(f"dtype must be the name of a dtype, e.g. bfloat16, got {shown(dtype)}{spelled(dtype)}.")
    return name
