"""What differs from layer to layer: whether queries and keys are rotated, the keys of one layer, and remarks.

A rule takes the keys of a config, the word of a layer in `layer_types`, and its number. Rules that take arguments
return such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kernelry.models.keys import Keys, brief
from kernelry.models.patterns import FULL, SLIDING, rotary_layers
from kernelry.request.checks import is_finite

# Rotary embeddings


def rope_options(keys: Keys) -> Keys | None:
    """Returns the options of the rotary embedding, of either generation of keys: the old one wins, as in the code."""
    for name in ("rope_scaling", "rope_parameters"):
        table = keys.table(name)
        if table:
            return Keys(table, "", f"{keys.where}: {name}")
    return None


def everywhere(keys: Keys, word: str, layer: int) -> bool:
    """Yes."""
    return True


def nowhere(keys: Keys, word: str, layer: int) -> bool:
    """No."""
    return False


def on_sliding(keys: Keys, word: str, layer: int) -> bool:
    """On the layers that slide."""
    return word == SLIDING


def unless_windowed_or_sliding(keys: Keys, word: str, layer: int) -> bool:
    """On the layers that slide, and everywhere where no window is set."""
    return word == SLIDING or keys.get("sliding_window") is None


def on_rotary(interval: int) -> Callable[[Keys, str, int], bool]:
    """As `no_rope_layers` says, which is 1 where there are rotary embeddings; else on all layers but every so many."""

    def rope(keys: Keys, word: str, layer: int) -> bool:
        return rotary_layers(keys, keys.count("num_hidden_layers"), interval)[layer]

    return rope


def where_theta(except_every: int | None = None) -> Callable[[Keys, str, int], bool]:
    """On the layers whose `layer_rope_theta` is not 0; without it, not on the last and every so many before it."""

    def rope(keys: Keys, word: str, layer: int) -> bool:
        count = keys.count("num_hidden_layers")
        thetas = keys.get("layer_rope_theta")
        if thetas is None:
            return except_every is None or (count - 1 - layer) % except_every != 0
        if not isinstance(thetas, list | tuple) or len(thetas) != count or not all(is_finite(each) for each in thetas):
            raise keys.error(f"layer_rope_theta must be a list of {count} finite numbers, got {brief(thetas)}.")
        return bool(thetas[layer])

    return rope


def where_parameters(default: tuple[str, ...] = ()) -> Callable[[Keys, str, int], bool]:
    """On the kinds of layers with `rope_parameters`; on the default kinds where there is no such key."""

    def rope(keys: Keys, word: str, layer: int) -> bool:
        table = keys.table("rope_parameters")
        return table.get(word) is not None if table else word in default

    return rope


def unless_theta_is_null(keys: Keys, word: str, layer: int) -> bool:
    """Everywhere, unless the base of the rotary embedding is null."""
    options = rope_options(keys)
    for found in (options, keys):
        if found is not None and found.has("rope_theta"):
            return found.number("rope_theta") is not None
    return True


def where_key(key: str, value: Any) -> Callable[[Keys, str, int], bool]:
    """Where a key has a value."""

    def rope(keys: Keys, word: str, layer: int) -> bool:
        return bool(keys.get(key) == value)

    return rope


def dense_or_sliding(keys: Keys, word: str, layer: int) -> bool:
    """On the layers that slide, and on the first dense ones where their own pattern makes all of them full."""
    listed = keys.items("mlp_layer_types", str, keys.count("num_hidden_layers"))
    dense = layer < keys.count("first_k_dense_replace", 0, least=0) if listed is None else listed[layer] == "dense"
    return word == SLIDING or (dense and keys.count("prefix_dense_sliding_window_pattern", 1) == 1)


# What one layer's keys say


def global_heads(keys: Keys, word: str, layer: int) -> Mapping[str, Any]:
    """Full layers have `global_head_dim`, and other key/value heads where keys are the values too."""
    if word != FULL or keys.has("per_layer_config"):
        return {}
    kv = keys.optional_count("num_global_key_value_heads") if keys.flag("attention_k_eq_v") else None
    return {"head_dim": keys.count("global_head_dim", 512), **({} if kv is None else {"num_key_value_heads": kv})}


def listed_heads(keys: Keys, word: str, layer: int) -> Mapping[str, Any]:
    """`num_attention_heads_per_layer` lists the query heads."""
    heads = keys.items("num_attention_heads_per_layer", int, keys.count("num_hidden_layers"))
    return {} if heads is None else {"num_attention_heads": heads[layer]}


def twice_as_many_sliding(keys: Keys, word: str, layer: int) -> Mapping[str, Any]:
    """Sliding layers have twice as many key/value heads."""
    return {"num_key_value_heads": 2 * keys.count("num_key_value_heads")} if word == SLIDING else {}


def heads_of_experts(keys: Keys, word: str, layer: int) -> Mapping[str, Any]:
    """Each of a token's experts has its own query heads, and the keys and values are repeated for each."""
    heads = keys.count("num_key_value_heads") * keys.count("num_experts_per_tok")
    return {"num_attention_heads": heads, "num_key_value_heads": heads}


# Remarks


def on_layers_without_rope(
    rope: Callable[[Keys, str, int], bool], flag: str, text: str
) -> Callable[..., tuple[str, ...]]:
    """A remark on the layers without rotary embeddings, where a flag is set, which is a number in the first files."""

    def remarks(keys: Keys, word: str, layer: int) -> tuple[str, ...]:
        value = keys.get(flag)
        is_set = bool(value) if type(value) is int else keys.flag(flag)
        return (text,) if is_set and not rope(keys, word, layer) else ()

    return remarks
