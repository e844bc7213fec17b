"""What a row of the table of families may say, and the rules that its cells name.

A rule is a function of the keys of a config. Those that take arguments return the function, so that a row reads as
data: `scale=root_of("query_pre_attn_scalar")`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import final

from kernelry.models.keys import Keys

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

Layers = Callable[[Keys, int], tuple[str, ...]]
"""The words of `layer_types` that a family means where its config has none, for a number of layers."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """N, K, H and D of a layer."""

    query: int
    kv: int
    head_dim: int
    value_dim: int


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What transformers' code says of model types whose configs are read alike.

    Args:
      stack: `encoder`, `decoder` or `cross`, in a model that has several.
      count: the key of the number of layers, or a rule.
      layers: the kinds of layers where the config has no `layer_types`.
      layer_types: the key that says the kinds, which then wins over `layers`; None where the code reads no such key.
      last_full: whether the last layer is full, whatever is said.
      causal: whether a query sees no later tokens: True, False, or a rule.
      window: the key of the window of sliding layers; without causality it is that of each side.
      resized: what the code makes of that window.
      chunk: the key of the size of chunks.
      heads: N, K, H and D.
      scale: the factor on the logits; None means H ** -0.5.
      soft_cap: the key of the logits' cap.
      sinks: the kinds of layers with one sink logit per query head.
      bias: what is added to the logits, in words.
      rope: whether a layer rotates queries and keys; of the keys, the layer's word and its number.
      shared_kv: the key of the number of last layers that read an earlier layer's keys and values.
      bidirectional: the tokens that see each other besides the mask, or a rule; of the keys and the layer's word.
      remarks: what a call must know besides, or a rule; of the keys, the layer's word and its number.
      refused: why no layer of these types can be described.
      version: the release of transformers whose code these facts are read from.
    """

    stack: str = ""
    count: str | Callable[[Keys], int] = "num_hidden_layers"
    layers: Layers
    layer_types: str | None = "layer_types"
    last_full: bool = False
    causal: bool | Callable[[Keys], bool] = True
    window: str = "sliding_window"
    resized: Callable[[Keys, int], int] | None = None
    chunk: str = "attention_chunk_size"
    heads: Callable[[Keys], Heads]
    scale: Callable[[Keys, Heads, int], float | None]
    soft_cap: str | None = None
    sinks: Callable[[Keys, str], bool]
    bias: str | Callable[[Keys], str | None] | None = None
    rope: Callable[[Keys, str, int], bool]
    shared_kv: str | None = None
    bidirectional: str | Callable[[Keys, str], str | None] | None = None
    remarks: tuple[str, ...] | Callable[[Keys, str, int], tuple[str, ...]] = ()
    refused: str | None = None
    version: str = "5.24.0"


# Which layers


def all_full(keys: Keys, count: int) -> tuple[str, ...]:
    """Every layer is full."""
    return (FULL,) * count


def all_sliding(keys: Keys, count: int) -> tuple[str, ...]:
    """Every layer slides."""
    return (SLIDING,) * count


def windowed(key: str) -> Layers:
    """Every layer slides where a window is set, else none."""
    return lambda keys, count: (FULL if keys.get(key) is None else SLIDING,) * count


def every(number: int, key: str | None = None, *, window: str | None = None, other: str = SLIDING) -> Layers:
    """Layers number − 1, 2 number − 1, … are full and the others slide; a key may say another number.

    Args:
      number: of layers, where the config has none.
      key: whose value is the number.
      window: a key without which no layer slides.
      other: the word of the other layers.
    """

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        period = number if key is None else keys.count(key, number)
        other_word = FULL if window is not None and keys.get(window) is None else other
        return tuple(FULL if (layer + 1) % period == 0 else other_word for layer in range(count))

    return layers


def first_of(number: int, key: str | None = None) -> Layers:
    """Layers 0, number, 2 number, … are full and the others slide."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        period = number if key is None else keys.count(key, number)
        return tuple(SLIDING if layer % period else FULL for layer in range(count))

    return layers


def from_layer(flag: str, first: str) -> Layers:
    """The layers from a number on slide, where a flag is set."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        start = keys.count(first, count, least=0) if keys.flag(flag) else count
        return tuple(SLIDING if layer >= start else FULL for layer in range(count))

    return layers


# Heads and head dims


def grouped(keys: Keys) -> Heads:
    """`num_key_value_heads`, and `head_dim` or the hidden size over the heads."""
    query = keys.count("num_attention_heads")
    kv = keys.optional_count("num_key_value_heads") or query
    return checked_heads(keys, query, kv, keys.optional_count("head_dim"))


def equal(keys: Keys) -> Heads:
    """As many key/value heads as query heads; the hidden size over the heads."""
    query = keys.count("num_attention_heads")
    return checked_heads(keys, query, query, None)


def checked_heads(keys: Keys, query: int, kv: int, head_dim: int | None, value_dim: int | None = None) -> Heads:
    """Checks what is said of the heads, and divides the hidden size where their dim is not.

    Raises:
      ConfigError: the heads, or the hidden size, do not divide.
    """
    if query % kv:
        raise keys.error(
            f"{keys.named('num_key_value_heads')} = {kv} must divide {keys.named('num_attention_heads')} = {query}."
        )
    if head_dim is None:
        hidden = keys.count("hidden_size")
        head_dim, rest = divmod(hidden, query)
        if rest or not head_dim:
            raise keys.error(
                f"{keys.named('num_attention_heads')} = {query} must divide {keys.named('hidden_size')} = {hidden}."
            )
    return Heads(query, kv, head_dim, value_dim or head_dim)


# Scales


def head_dim_scale(keys: Keys, heads: Heads, layer: int) -> float | None:
    """H ** -0.5, kernelry's default."""
    return None


def unscaled(keys: Keys, heads: Heads, layer: int) -> float:
    """1: the logits are the products."""
    return 1.0


def root_of(key: str) -> Callable[[Keys, Heads, int], float | None]:
    """A key's value ** -0.5."""

    def scale(keys: Keys, heads: Heads, layer: int) -> float | None:
        value = keys.positive(key)
        return None if value is None else value**-0.5

    return scale


def value_of(key: str, default: float | None = None) -> Callable[[Keys, Heads, int], float | None]:
    """A key's value itself."""

    def scale(keys: Keys, heads: Heads, layer: int) -> float | None:
        return keys.number(key, default)

    return scale


def yarn(keys: Keys) -> Keys | None:
    """Returns the options of a scaled rotary embedding, of either generation of keys; None without one."""
    for name in ("rope_parameters", "rope_scaling"):
        table = keys.table(name)
        if table.get("rope_type", table.get("type", "default")) != "default":
            return Keys(table, "", f"{keys.where}: {name}")
    return None


def mla_scale(keys: Keys, heads: Heads, layer: int) -> float | None:
    """H ** -0.5 · m², where m = 0.1 mscale_all_dim ln(factor) + 1 under scaled rotary embedding, as in DeepSeek-V3."""
    scaled = yarn(keys)
    mscale = scaled and scaled.number("mscale_all_dim")
    if not scaled or not mscale:
        return None
    factor = scaled.positive("factor")
    if factor is None:
        raise scaled.error("mscale_all_dim needs factor, and there is none.")
    m = 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
    return float(heads.head_dim**-0.5 * m * m)


# Rotary embeddings, sinks and the rest


def everywhere(keys: Keys, word: str, layer: int) -> bool:
    """Yes."""
    return True


def nowhere(keys: Keys, word: str, layer: int) -> bool:
    """No."""
    return False


def on_sliding(keys: Keys, word: str, layer: int) -> bool:
    """On the layers that slide."""
    return word == SLIDING


def no_sinks(keys: Keys, word: str) -> bool:
    """No layer has sinks."""
    return False


def all_sinks(keys: Keys, word: str) -> bool:
    """Every layer has sinks."""
    return True


def unless(flag: str) -> Callable[[Keys], bool]:
    """Causal, unless a flag is set."""
    return lambda keys: not keys.flag(flag)


def where(flag: str, default: bool = False) -> Callable[[Keys], bool]:
    """Causal where a flag is set."""
    return lambda keys: keys.flag(flag, default)
