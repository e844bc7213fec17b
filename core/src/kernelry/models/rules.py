"""What a row of the table of families may say, and the rules that its cells name.

A rule is a function of the keys of a config. Those that take arguments return the function, so that a row reads as
data: `scale=root_of("query_pre_attn_scalar")`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, final

from kernelry.models.keys import Keys
from kernelry.models.layerwise import rope_options
from kernelry.models.patterns import SLIDING, Layers


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
      full_slides: whether full layers slide too where a window is set.
      causal: whether a query sees no later tokens: True, False, or a rule.
      window: the key of the window of sliding layers; without causality it is that of each side.
      resized: what the code makes of that window.
      chunk: the key of the size of chunks.
      own: what keys say of one layer instead of the model, besides `per_layer_config`; of the keys, its word and its
        number.
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
    full_slides: bool = False
    causal: bool | Callable[[Keys], bool] = True
    window: str = "sliding_window"
    resized: Callable[[Keys, int], int] | None = None
    chunk: str = "attention_chunk_size"
    own: Callable[[Keys, str, int], Mapping[str, Any]] | None = None
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


def equal_and_sized(keys: Keys) -> Heads:
    """As many key/value heads as query heads; `head_dim`, or the hidden size over the heads."""
    query = keys.count("num_attention_heads")
    return checked_heads(keys, query, query, keys.optional_count("head_dim"))


def latent(keys: Keys) -> Heads:
    """Latent attention: as many key/value heads as query heads, and two parts of each query and key.

    Raises:
      ConfigError: the key/value heads are fewer.
    """
    query = keys.count("num_attention_heads")
    kv = keys.optional_count("num_key_value_heads") or query
    if kv != query:
        raise keys.error(
            f"{keys.named('num_key_value_heads')} = {kv} must be {keys.named('num_attention_heads')} = {query} in "
            "latent attention, whose heads all have their own keys."
        )
    head_dim = keys.count("qk_nope_head_dim", least=0) + keys.count("qk_rope_head_dim", least=0)
    value_dim = keys.optional_count("v_head_dim") or checked_heads(keys, query, query, None).head_dim
    return checked_heads(keys, query, query, keys.optional_count("qk_head_dim") or head_dim, value_dim)


def other_values(keys: Keys) -> Heads:
    """As `grouped`, and the values' head dim is `v_head_dim`."""
    heads = grouped(keys)
    return dataclasses.replace(heads, value_dim=keys.count("v_head_dim", heads.head_dim))


def wide(keys: Keys) -> Heads:
    """Of twice the hidden size, unless `head_dim` says otherwise."""
    query = keys.count("num_attention_heads")
    kv = keys.optional_count("num_key_value_heads") or query
    head_dim = keys.optional_count("head_dim") or 2 * keys.count("hidden_size") // query
    return checked_heads(keys, query, kv, head_dim)


def single(keys: Keys) -> Heads:
    """One key/value head, whatever `num_key_value_heads` says."""
    return checked_heads(keys, keys.count("num_attention_heads"), 1, keys.optional_count("head_dim"))


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
                f"{keys.named('num_attention_heads')} = {query} must divide {keys.named('hidden_size')} = {hidden}, "
                "as there is no head_dim."
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


def latent_scale(default: Mapping[str, Any] | None = None) -> Callable[[Keys, Heads, int], float | None]:
    """H ** -0.5 · m², where m = 0.1 mscale_all_dim ln(factor) + 1 under a scaled rotary embedding, as in DeepSeek-V3.

    Args:
      default: the options of a config that has none.
    """

    def scale(keys: Keys, heads: Heads, layer: int) -> float | None:
        options = rope_options(keys) or Keys(default or {}, "", keys.where)
        kind = options.text("rope_type") or options.text("type") or "default"
        mscale = options.number("mscale_all_dim")
        if kind == "default" or not mscale:
            return None
        factor = options.positive("factor")
        if factor is None:
            raise options.error("mscale_all_dim needs factor, and there is none.")
        m = 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
        return float(heads.head_dim**-0.5 * m * m)

    return scale


def half_dim_scale(keys: Keys, heads: Heads, layer: int) -> float:
    """(H / 2) ** -0.5: two hidden states are read as one."""
    return float((heads.head_dim / 2) ** -0.5)


# Sinks and masks


def no_sinks(keys: Keys, word: str) -> bool:
    """No layer has sinks."""
    return False


def all_sinks(keys: Keys, word: str) -> bool:
    """Every layer has sinks."""
    return True


def sliding_sinks(keys: Keys, word: str) -> bool:
    """The layers that slide have sinks."""
    return word == SLIDING


def is_causal(keys: Keys) -> bool:
    """Causal unless `is_causal` is false, which the code of every decoder's mask reads."""
    return keys.flag("is_causal", True)


def unless_all(keys: Keys) -> bool:
    """Causal unless `use_bidirectional_attention` is "all"."""
    return keys.text("use_bidirectional_attention") != "all" and is_causal(keys)


def unless_bidirectional(keys: Keys) -> bool:
    """Causal unless `use_bidirectional_attention` is true."""
    return not keys.flag("use_bidirectional_attention") and is_causal(keys)


def refused_flag(flag: str, why: str) -> Callable[[Keys], bool]:
    """As `is_causal`; a flag is refused.

    Raises:
      ConfigError: it is set.
    """

    def causal(keys: Keys) -> bool:
        if keys.flag(flag):
            raise keys.error(f"{flag} is true, and it is not described: {why}.")
        return is_causal(keys)

    return causal


# Windows


def half_where_bidirectional(keys: Keys, window: int) -> int:
    """Half of it on each side, where `use_bidirectional_attention` is true."""
    return window // 2 if keys.flag("use_bidirectional_attention") else window


def half_where_all(keys: Keys, window: int) -> int:
    """Half of it and one on each side, where `use_bidirectional_attention` is "all"."""
    return window // 2 + 1 if keys.text("use_bidirectional_attention") == "all" else window


def or_one_more_than(key: str) -> Callable[[Keys, int], int]:
    """One more than another key's, where there is one."""

    def resized(keys: Keys, window: int) -> int:
        other = keys.optional_count(key)
        return window if other is None else other + 1

    return resized


def only_where(flag: str) -> Callable[[Keys, int], int]:
    """The window, which a flag allows.

    Raises:
      ConfigError: the flag is not set.
    """

    def resized(keys: Keys, window: int) -> int:
        if not keys.flag(flag):
            raise keys.error(f"{flag} is false, and layer_types has sliding layers: the two contradict each other.")
        return window

    return resized
