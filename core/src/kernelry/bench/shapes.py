"""What is timed by name: layers of well-known models at usual sizes, and small ones for a CPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, final

import numpy as np

from kernelry.bench.cases import Case, Pass, cases_of
from kernelry.config.layer import AttentionConfig, AttentionType
from kernelry.errors import ArgumentError, nearest
from kernelry.masks import Segments
from kernelry.models.model import LayerKind
from kernelry.models.named import model_from
from kernelry.phases.model_shape import ModelShape
from kernelry.request.target import Target

_TRAINED = (Pass.FORWARD, Pass.BOTH)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NamedShape:
    """A layer with the sizes at which it is timed.

    Args:
      about: what it is, in a line.
      layer: makes the layer.
      length: T, and of a decode step S.
      batch: B.
      dtype: of query, key and value.
      passes: those that are timed unless others are asked for.
      cache: what a decode step reads, as `ModelShape` takes it.
      documents: lengths in tokens that are packed in each row and do not see each other; of another T they are scaled.
    """

    about: str
    layer: Callable[[], AttentionConfig | LayerKind]
    length: int
    batch: int = 1
    dtype: str = "bfloat16"
    passes: tuple[Pass, ...] = (Pass.FORWARD, Pass.BOTH, Pass.DECODE)
    cache: str = "contiguous"
    documents: tuple[int, ...] = ()

    def cases(
        self,
        name: str,
        target: Target,
        *,
        length: int | None = None,
        batch: int | None = None,
        dtype: str | None = None,
        passes: Collection[Pass] = (),
    ) -> Iterator[Case]:
        """Its cases; sizes that are None, and passes that are empty, are its own.

        Raises:
          ArgumentError: it has none of the passes, or a size is not valid.
        """
        wanted = [which for which in passes or self.passes if self._has(which)]
        if not wanted:
            raise ArgumentError(
                f"shape {name!r} has no {' or '.join(which.value for which in passes)} pass; it has "
                f"{', '.join(which.value for which in self.passes)}."
            )
        length, batch = length or self.length, batch or self.batch
        shape = ModelShape(
            q_len=length,
            max_len=length,
            batch=batch,
            dtype=dtype or self.dtype,
            cache=self.cache,
            mask=Segments(self._ids(length, batch)) if self.documents else "config",
        )
        yield from cases_of(self.layer(), shape, target, wanted, name)

    def _has(self, which: Pass) -> bool:
        """Layers that train may decode, too, unless they pack documents or see later tokens; the others only decode."""
        if which in self.passes:
            return True
        layer = self.layer()
        config = layer.config if isinstance(layer, LayerKind) else layer
        return which is Pass.DECODE and not self.documents and not config.sees_later_tokens

    def _ids(self, length: int, batch: int) -> np.ndarray:
        """int32 [B, T]: documents of the same shares of a row of any length."""
        ends = np.cumsum(self.documents) * length // sum(self.documents)
        row = np.searchsorted(ends, np.arange(length), side="right")
        return np.broadcast_to(row.astype(np.int32), (batch, length))


def _of(model: str, kind: str = "full", **changes: Any) -> Callable[[], AttentionConfig | LayerKind]:
    """A kind of layers of a model that `kernelry.models.named` knows, with changes of its config."""

    def layer() -> AttentionConfig | LayerKind:
        found = model_from(model).kind(kind)
        return dataclasses.replace(found, config=dataclasses.replace(found.config, **changes)) if changes else found

    return layer


def _layer(heads: tuple[int, int, int], *, kind: str = "global", **others: Any) -> Callable[[], AttentionConfig]:
    """A layer of N, K, H."""
    q_heads, kv_heads, head_dim = heads
    return functools.partial(
        AttentionConfig, type=AttentionType(kind), q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, **others
    )


_ABSORBED: dict[str, Any] = {"kv_heads": 1, "head_dim": 576, "value_dim": 512}
"""Of DeepSeek's MLA: the latent of 512 and the rotated 64 are the key of all heads, and the latent is the value."""
_PACKED = (1500, 300, 2100, 900, 2548, 844)
"""Tokens; documents of unequal lengths, none a multiple of a block, that fill 8192."""

ACCELERATOR: Mapping[str, NamedShape] = {
    "llama-3-8b": NamedShape(about="Llama 3 8B", layer=_of("llama-3-8b"), length=8192),
    "llama-3-8b-decode": NamedShape(
        about="Llama 3 8B, 64 rows decoding", layer=_of("llama-3-8b"), length=8192, batch=64, passes=(Pass.DECODE,)
    ),
    "llama-3-8b-decode-long": NamedShape(
        about="Llama 3 8B, a row of 128k", layer=_of("llama-3-8b"), length=131072, passes=(Pass.DECODE,)
    ),
    "llama-3-70b": NamedShape(about="Llama 3 70B", layer=_of("llama-3-70b"), length=8192),
    "packed": NamedShape(
        about="pretraining of Llama 3 8B on packed documents",
        layer=_of("llama-3-8b"),
        length=8192,
        documents=_PACKED,
        passes=_TRAINED,
    ),
    "gemma-2-local": NamedShape(
        about="Gemma 2 27B, window of 4096, soft cap", layer=_of("gemma-2-27b", "sliding"), length=8192
    ),
    "gemma-2-global": NamedShape(about="Gemma 2 27B, soft cap", layer=_of("gemma-2-27b"), length=8192),
    "gemma-3-local": NamedShape(about="Gemma 3 27B, window of 1024", layer=_of("gemma-3-27b", "sliding"), length=16384),
    "gemma-3-global": NamedShape(about="Gemma 3 27B", layer=_of("gemma-3-27b"), length=16384),
    "mistral": NamedShape(about="Mistral 7B, window of 4096", layer=_of("mistral-7b", "sliding"), length=8192),
    "qwen-3": NamedShape(about="Qwen 3 32B", layer=_of("qwen-3-32b"), length=8192),
    "deepseek-mla": NamedShape(
        about="DeepSeek V3, H = 192 and D = 128", layer=_of("deepseek-v3"), length=4096, passes=_TRAINED
    ),
    "deepseek-mla-decode": NamedShape(
        about="DeepSeek V3, absorbed: values are the first 512 of 576 columns of the keys",
        layer=_of("deepseek-v3", **_ABSORBED),
        length=8192,
        batch=8,
        cache="contiguous:value_in_key",
        passes=(Pass.DECODE,),
    ),
    "gpt-oss-local": NamedShape(
        about="gpt-oss 120B, window of 128, sinks", layer=_of("gpt-oss-120b", "sliding"), length=8192
    ),
    "gpt-oss-global": NamedShape(about="gpt-oss 120B, sinks", layer=_of("gpt-oss-120b"), length=8192),
    "vit": NamedShape(
        about="ViT-L of 256 patches", layer=_layer((16, 16, 64), kind="full"), length=256, batch=64, passes=_TRAINED
    ),
}
"""What a GPU or TPU is timed on."""

CPU: Mapping[str, NamedShape] = {
    name: dataclasses.replace(shape, dtype="float32")
    for name, shape in {
        "small": NamedShape(about="causal", layer=_layer((8, 2, 64)), length=1024),
        "small-window": NamedShape(
            about="window of 256", layer=_layer((8, 2, 64), kind="local_sliding", window=256), length=1024
        ),
        "small-soft-cap": NamedShape(about="soft cap", layer=_layer((8, 2, 64), soft_cap=50.0), length=1024),
        "small-sinks": NamedShape(
            about="window of 128, sinks",
            layer=_layer((8, 2, 64), kind="local_sliding", window=128, sinks=True),
            length=1024,
        ),
        "small-packed": NamedShape(
            about="packed documents", layer=_layer((8, 2, 64)), length=1024, documents=_PACKED, passes=_TRAINED
        ),
        "small-mla": NamedShape(
            about="H = 96 and D = 64", layer=_layer((8, 8, 96), value_dim=64), length=1024, passes=_TRAINED
        ),
        "small-mla-decode": NamedShape(
            about="absorbed: values are the first 256 of 288 columns of the keys",
            layer=_layer((16, 1, 288), value_dim=256),
            length=4096,
            cache="contiguous:value_in_key",
            passes=(Pass.DECODE,),
        ),
        "small-vit": NamedShape(
            about="256 patches", layer=_layer((8, 8, 64), kind="full"), length=256, batch=4, passes=_TRAINED
        ),
    }.items()
}
"""The same kinds of layers for a few cores of a CPU."""

SHAPES: Mapping[str, NamedShape] = {**ACCELERATOR, **CPU}
"""All, by name."""


def shape_of(name: str) -> NamedShape:
    """The shape of a name.

    Raises:
      ArgumentError: there is none.
    """
    if name not in SHAPES:
        raise ArgumentError(f"unknown shape {name!r}{nearest(name, SHAPES)} `kernelry bench --list` describes them.")
    return SHAPES[name]


def named_cases(
    names: Collection[str],
    target: Target,
    *,
    lengths: Collection[int] = (),
    batches: Collection[int] = (),
    dtype: str | None = None,
    passes: Collection[Pass] = (),
) -> list[Case]:
    """The cases of named shapes, at each length and batch; none of the names are those for the target's platform.

    Raises:
      ArgumentError: a shape is unknown, or has none of the passes.
    """
    found = {name: shape_of(name) for name in names} or (CPU if target.platform == "cpu" else ACCELERATOR)
    cases = list[Case]()
    for (name, shape), batch, length in itertools.product(found.items(), batches or (None,), lengths or (None,)):
        wanted = passes if names else [which for which in shape.passes if which in (passes or shape.passes)]
        if wanted or names:
            cases += shape.cases(name, target, length=length, batch=batch, dtype=dtype, passes=wanted)
    return cases
