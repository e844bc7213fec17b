"""Reads a Hugging Face config.json into a Model, by the table of facts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from kernelry.config.layer import AttentionConfig, AttentionType
from kernelry.errors import ConfigError, nearest
from kernelry.models.encoding import IMAGE
from kernelry.models.families import families, text_families
from kernelry.models.keys import Keys, brief
from kernelry.models.model import MOST_LAYERS, LayerKind, Model, OtherLayers
from kernelry.models.patterns import CHOSEN_KEYS, CHUNKED, FULL, SLIDING
from kernelry.models.rules import Family

_KINDS = {
    FULL: "full",
    "attention": "full",
    "global": "full",
    "hybrid": "full",
    SLIDING: "sliding",
    "local": "sliding",
    CHUNKED: "chunked",
}
"""The kinds of layers that a config describes, by the words of `layer_types`."""

_LINEAR = "its layers keep a state and no keys, which is not attention"
_NO_ATTENTION = "its layers do not attend"

_OTHERS = {
    **dict.fromkeys(("linear_attention", "lightning_attention", "mamba", "mamba2", "recurrent", "kda", "gdn"), _LINEAR),
    **dict.fromkeys(
        (
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "indexed_attention",
            "sparse_attention",
            "deepseek_sparse_attention",
            "qwen_sparse_attention",
            "minimax_m3_sparse",
        ),
        CHOSEN_KEYS,
    ),
    **dict.fromkeys(("conv", "mlp", "moe"), _NO_ATTENTION),
    IMAGE: "it attends to the keys of an image, whose number and mask a call says",
}
"""Why the layers of the other words are not described."""


def from_huggingface(source: str | Path | Mapping[str, Any] | Any) -> Model:
    """Reads what a model's config says about attention, and what transformers' code adds to it.

    Neither transformers nor torch is imported. Of a multimodal config, `text_config` is read.

    Args:
      source: the path of a config.json, or of a folder that has one; its content; or a `PretrainedConfig`.

    Returns:
      The kinds of layers, and the layers of each; layers that do not attend are in `others`.

    Raises:
      ConfigError: the file cannot be read, the model type is unknown or not described, or a key is missing, has a value
        that is not valid, or contradicts another; the message names the key.
    """
    given, name = _content(source)
    outer = given.get("model_type")
    if not isinstance(outer, str):
        raise ConfigError(f"{name}: model_type must be a text, e.g. 'llama', got {brief(outer)}.")
    where, model_type = name, outer
    changes: Mapping[str, Any] = {}
    if outer not in families() and outer in text_families():
        inner, changes = text_families()[outer]
        given, where = _text_config(given, outer, inner, name)
        model_type = given.get("model_type", inner)
    if not isinstance(model_type, str) or model_type not in families():
        raise ConfigError(f"{where}: {_unknown(model_type)}")
    keys = Keys(given, model_type, where)
    layers: list[_Layer] = []
    for family in families()[model_type]:
        layers.extend(_layers(dataclasses.replace(family, **changes), keys))
    kinds, others = _grouped(layers, name)
    if not kinds:
        why = others[0].why if others else "it has none"
        by = f" (read from {', '.join(keys.read)})" if keys.read else ""
        raise ConfigError(f"{where}: model_type {model_type!r} has no layer that a config describes: {why}{by}.")
    first = dataclasses.replace(families()[model_type][0], **changes)
    remarks = (*_unread(keys, first, model_type, kinds), *_unused(keys, first, kinds))
    return Model(outer, kinds, others, source=name, facts=f"transformers {first.version}", remarks=remarks)


_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout", "attention_dropout_rate")


_ABOUT_ATTENTION = (
    "attn_logit_softcapping",
    "use_bidirectional_attention",
    "attention_chunk_size",
    "dual_chunk_attention_config",
    "sliding_window_pattern",
    "no_rope_layers",
    "attn_type_list",
)
"""Keys that change attention where they are read."""


def _unread(keys: Keys, family: Family, model_type: str, kinds: Iterable[LayerKind]) -> Iterator[str]:
    """Yields what the config says of attention and the code of its model type does not read."""
    for name in ("layer_types", *_ABOUT_ATTENTION):
        written = keys.named(name)
        if written in keys.read or not keys.has(name) or not (value := keys.get(name)):
            continue
        if name == "sliding_window_pattern" and keys.says("layer_types"):
            continue  # the list was made by it
        if name == "layer_types" and _names_in(keys) <= {word for kind in kinds for word in kind.name.split()}:
            continue
        if name == "use_bidirectional_attention" and isinstance(family.causal, bool):
            continue  # the whole model says what its tokens see, whatever its text_config says
        yield f"{written} = {brief(value)} is not used: the code of {model_type} does not read it"


def _names_in(keys: Keys) -> set[str]:
    """The names of kinds that `layer_types` means."""
    return {_KINDS[word] for word in keys.items("layer_types", str) or () if word in _KINDS}


def _unused(keys: Keys, family: Family, kinds: Iterable[LayerKind]) -> Iterator[str]:
    """Yields what the config says of attention and the kinds do not."""
    slides = any(kind.config.type is AttentionType.LOCAL_SLIDING for kind in kinds)
    if not slides and keys.says(family.window):
        yield f"{keys.named(family.window)} = {brief(keys.get(family.window))} is not used: no layer slides"
    for name in _DROPOUT:
        if keys.number(name):
            rate = f"{keys.named(name)} = {keys.number(name)}"
            yield f"{rate}, dropout of training, is not in the kinds' configs: set dropout_rate where it is wanted"
            return


def _content(source: Any) -> tuple[Mapping[str, Any], str]:
    """Returns the content of a config, and what errors call it."""
    if isinstance(source, Mapping):
        return source, "config"
    if isinstance(source, str | Path):
        path = Path(source)
        return _file(path / "config.json" if path.is_dir() else path)
    if callable(getattr(source, "to_dict", None)) and isinstance(content := source.to_dict(), Mapping):
        return content, type(source).__name__
    raise ConfigError(
        "from_huggingface takes the path of a config.json, its content or a PretrainedConfig, got "
        f"{type(source).__name__}."
    )


def _file(path: Path) -> tuple[Mapping[str, Any], str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} must have an object with the keys of a config, got {brief(content)}.")
    return content, str(path)


def _text_config(given: Mapping[str, Any], outer: str, inner: str, name: str) -> tuple[Mapping[str, Any], str]:
    """The part of a multimodal config that is about text, and what errors call it."""
    part = given.get("text_config")
    if isinstance(part, Mapping):
        return part, f"{name}: text_config"
    if part is not None:
        raise ConfigError(f"{name}: text_config of {outer!r} must be an object, got {brief(part)}.")
    flat = {key: value for key, value in given.items() if key not in ("model_type", "text_config")}
    if not Keys(flat, inner, name).says("num_hidden_layers"):  # files of the first releases are flat
        raise ConfigError(f"{name}: text_config is missing: without it, the layers of {outer!r} are unknown.")
    return flat, name


def _unknown(model_type: Any) -> str:
    if isinstance(model_type, str) and model_type in text_families():
        inner, _ = text_families()[model_type]
        return f"model_type {model_type!r} is that of a whole multimodal model; that of its text is, e.g., {inner!r}."
    known = sorted({*families(), *text_families()})
    hint = nearest(str(model_type)[:80], known, listed=False) or f", which is none of the {len(known)} that are known."
    return (
        f"unknown model_type {brief(model_type)}{hint} What its layers see is never guessed: write an AttentionConfig "
        "for each kind of layers, or pass the config of a part that is known, e.g. text_config."
    )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: the kind of a name, or a word that is not described."""

    number: int
    kind: LayerKind | None
    other: OtherLayers | None = None


def _layers(family: Family, keys: Keys) -> Iterable[_Layer]:
    count = keys.count(family.count) if isinstance(family.count, str) else family.count(keys)
    if count > MOST_LAYERS:
        raise keys.error(f"{family.count} must be at most {MOST_LAYERS}, got {count}.")
    words = _words(family, keys, count)
    shared = _shared(family, keys, words)
    for number, word in enumerate(words):
        why = family.refused or _OTHERS.get(word)
        if why is not None:
            yield _Layer(number, None, OtherLayers(_named(family, word), (number,), why))
            continue
        own = keys.of_layer(number)
        changed = {} if family.own is None else family.own(own, word, number)
        yield _Layer(number, _kind(family, own.overridden(changed), word, number, shared.get(number)))


def _named(family: Family, name: str) -> str:
    return f"{family.stack} {name}".strip() if family.stack != "cross" else "cross"


def _words(family: Family, keys: Keys, count: int) -> list[str]:
    """The word of each layer, by `layer_types` or else by the family's own rule."""
    said = keys.items(family.layer_types, str, count) if family.layer_types else None
    words = [FULL if word == "attention" else word for word in (family.layers(keys, count) if said is None else said)]
    for number, word in enumerate(words):
        if word not in _KINDS and word not in _OTHERS:
            known = nearest(word[:80], [*_KINDS, *_OTHERS])
            key = keys.named(family.layer_types or "layer_types")
            raise keys.error(f"{key}[{number}]: unknown kind of layer {brief(word)}{known}")
    if family.last_full:
        words[-1] = FULL
    return words


def _shared(family: Family, keys: Keys, words: list[str]) -> dict[int, int]:
    """The earlier layers whose keys and values the last layers read: the last of the same word that has its own."""
    number = 0 if family.shared_kv is None else keys.count(family.shared_kv, 0, least=0)
    if not number:
        return {}
    own = words[: max(len(words) - number, 0)]
    if set(words) - set(own):
        raise keys.error(f"{family.shared_kv} = {number} leaves no layer of some kind with keys and values of its own.")
    last = {word: layer for layer, word in enumerate(own)}
    return {layer: last[words[layer]] for layer in range(len(own), len(words))}


def _kind(family: Family, keys: Keys, word: str, number: int, shared: int | None) -> LayerKind:
    heads = family.heads(keys)
    causal = family.causal if isinstance(family.causal, bool) else family.causal(keys)
    bias = family.bias(keys) if callable(family.bias) else family.bias
    name = "sliding" if family.full_slides and keys.get(family.window) is not None else _KINDS[word]
    remarks = family.remarks(keys, word, number) if callable(family.remarks) else family.remarks
    try:
        config = AttentionConfig(
            source=f"{keys.where}: {_named(family, name)}",
            **_mask_options(family, keys, name, causal=causal),
            scale=family.scale(keys, heads, number),
            soft_cap=None if family.soft_cap is None else keys.positive(family.soft_cap),
            sinks=family.sinks(keys, word),
            bias=bias is not None,
            q_heads=heads.query,
            kv_heads=heads.kv,
            head_dim=heads.head_dim,
            value_dim=heads.value_dim,
        )
    except OverflowError as error:
        raise keys.error(f"the scale of layer {number} is out of range: {error}.") from error
    return LayerKind(
        _named(family, name),
        (number,),
        config,
        rope=family.rope(keys, word, number),
        shared_kv=() if shared is None else ((number, shared),),
        bidirectional=family.bidirectional(keys, word) if callable(family.bidirectional) else family.bidirectional,
        remarks=(*((f"bias: {bias}",) if bias else ()), *remarks),
    )


def _mask_options(family: Family, keys: Keys, name: str, *, causal: bool) -> dict[str, Any]:
    if name == "full":
        return {"type": AttentionType.GLOBAL if causal else AttentionType.FULL}
    if name == "chunked":
        return {"type": AttentionType.CHUNK, "chunk_size": _size(family.chunk, keys, name)}
    window = _size(family.window, keys, name)
    if family.resized is not None:
        window = family.resized(keys, window)
    return {"type": AttentionType.LOCAL_SLIDING, "window": window if causal else (window, window)}


def _size(key: str, keys: Keys, name: str) -> int:
    size = keys.optional_count(key)
    if size is None:
        raise keys.error(
            f"{keys.named(key)} is missing or null, and there are {name} layers: set it, or change layer_types."
        )
    return size


def _grouped(layers: Iterable[_Layer], where: str) -> tuple[tuple[LayerKind, ...], tuple[OtherLayers, ...]]:
    """Joins the layers that are alike; kinds of one name are numbered."""
    kinds: dict[LayerKind, list[LayerKind]] = {}
    others: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        if layer.kind is not None:
            kinds.setdefault(dataclasses.replace(layer.kind, layers=(), shared_kv=()), []).append(layer.kind)
        if layer.other is not None:
            others.setdefault((layer.other.name, layer.other.why), []).append(layer.number)
    names = [kind.name for kind in kinds]
    found = []
    for index, (kind, members) in enumerate(kinds.items()):
        before = names[:index].count(kind.name)
        name = f"{kind.name} {before + 1}" if names.count(kind.name) > 1 else kind.name
        found.append(
            dataclasses.replace(
                kind,
                name=name,
                layers=tuple(number for member in members for number in member.layers),
                shared_kv=tuple(pair for member in members for pair in member.shared_kv),
                config=dataclasses.replace(kind.config, source=f"{where}: {name}"),
            )
        )
    return tuple(found), tuple(OtherLayers(name, tuple(numbers), why) for (name, why), numbers in others.items())
