"""Rules of encoders, of models with several stacks, and of decoders with learned positions or biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kernelry.models.keys import LARGEST, Keys, brief
from kernelry.models.patterns import FULL, SLIDING, Layers, every_or_last
from kernelry.models.rules import Heads, checked_heads, is_causal

IMAGE = "image_attention"
"""Layers that attend to the keys of an image."""


# Which layers


def count_of(key: str, other: str) -> Callable[[Keys], int]:
    """The number of layers by a key, or by another where it has no value."""
    return lambda keys: keys.optional_count(key) or keys.count(other)


def cross_count(flag: str, needed: str | None = None) -> Callable[[Keys], int]:
    """As many layers of cross attention as there are layers, where a flag is set; none otherwise.

    Args:
      flag: the flag.
      needed: another flag, without which the code refuses it.
    """

    def count(keys: Keys) -> int:
        if not keys.flag(flag):
            return 0
        if needed is not None and not keys.flag(needed):
            raise keys.error(f"{flag} is true and {needed} is not: only a decoder attends to an encoder.")
        return keys.count("num_hidden_layers")

    return count


def from_attention_types(keys: Keys, count: int) -> tuple[str, ...]:
    """GPT-Neo's `attention_types`: pairs of the kinds of some layers, and how often they come in turn."""
    pairs = keys.get("attention_types")
    words: list[str] = []
    for pair in _pairs(keys, [[["global", "local"], 12]] if pairs is None else pairs):
        words.extend(list(pair[0]) * pair[1])
    if len(words) != count:
        raise keys.error(
            f"attention_types says {len(words)} layers, {keys.named('num_hidden_layers')} = {count}; both must agree."
        )
    said = keys.items("attention_layers", str)
    if said is not None and said != words:
        raise keys.error("attention_layers and attention_types contradict each other: keep one.")
    return tuple(words)


def _pairs(keys: Keys, pairs: Any) -> list[Any]:
    """Checks pairs of words and a number of times."""
    if not isinstance(pairs, list | tuple):
        raise keys.error(f"attention_types must be a list, got {brief(pairs)}.")
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], list | tuple)):
            raise keys.error(f"attention_types must have pairs of kinds and a number of times, got {brief(pair)}.")
        words, times = pair
        if type(times) is not int or not 0 <= times * len(words) <= LARGEST:
            raise keys.error(f"attention_types must say how many times as a whole number, got {brief(times)}.")
        if any(word not in ("global", "local") for word in words):
            raise keys.error(f"attention_types must be 'global' and 'local', got {brief(words)}.")
    return list(pairs)


def crossing(key: str, default: tuple[int, ...]) -> Layers:
    """The layers of a list attend to an image, and the others are full."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        listed = keys.items(key, int)
        return tuple(IMAGE if layer in (default if listed is None else listed) else FULL for layer in range(count))

    return layers


def listed_windows(key: str, otherwise: Layers) -> Layers:
    """The layers slide whose entry in a list is a window, and not 0 or null; another rule where there is no list."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        windows = _windows(keys, key)
        if windows is None:
            return otherwise(keys, count)
        if len(windows) != count:
            raise keys.error(f"{key} has {len(windows)} entries, num_hidden_layers = {count}; both must agree.")
        return tuple(SLIDING if window else FULL for window in windows)

    return layers


def _windows(keys: Keys, key: str) -> list[int | None] | None:
    windows = keys.get(key)
    if windows is None:
        return None
    if not isinstance(windows, list | tuple) or not all(
        each is None or (type(each) is int and 0 <= each <= LARGEST) for each in windows
    ):
        raise keys.error(f"{key} must be a list of windows, with 0 or null where there is none, got {brief(windows)}.")
    return list(windows)


# Windows


def first_listed(key: str) -> Callable[[Keys, int], int]:
    """The first window of a list, which all sliding layers have; the key of the window without one."""
    return lambda keys, window: next((each for each in _windows(keys, key) or () if each), window)


def half_unless(other: str) -> Callable[[Keys, int], int]:
    """Half of a window that counts both directions together; another key says the half."""

    def resized(keys: Keys, window: int) -> int:
        if keys.says(other):
            return keys.count(other)
        if window < 2:
            raise keys.error(f"local_attention must be at least 2, half of it on each side, got {window}.")
        return window // 2

    return resized


# Heads


def equal_of(name: str) -> Callable[[Keys], Heads]:
    """As many key/value heads as query heads, by another key; the hidden size over the heads."""

    def heads(keys: Keys) -> Heads:
        query, hidden = keys.count(name), keys.count("hidden_size")
        if hidden % query:
            raise keys.error(f"{name} = {query} must divide {keys.named('hidden_size')} = {hidden}.")
        return Heads(query, query, hidden // query, hidden // query)

    return heads


def one_kv_where(flag: str) -> Callable[[Keys], Heads]:
    """One key/value head where a flag is set or absent, else as many as query heads."""

    def heads(keys: Keys) -> Heads:
        query = keys.count("num_attention_heads")
        return checked_heads(keys, query, 1 if keys.flag(flag, True) else query, None)

    return heads


def falcon_heads(keys: Keys) -> Heads:
    """`num_kv_heads` in the new architecture; else one key/value head with `multi_query`, and as many without."""
    query = keys.count("num_attention_heads")
    kv = 1 if keys.flag("multi_query", True) else query
    if keys.flag("new_decoder_architecture"):
        kv = keys.optional_count("num_kv_heads") or query
        if query % kv:
            raise keys.error(f"num_kv_heads = {kv} must divide {keys.named('num_attention_heads')} = {query}.")
    return checked_heads(keys, query, kv, None)


# What one layer's keys say


def wide_full(keys: Keys, kind: str, layer: int) -> Mapping[str, Any]:
    """Full layers have `global_head_dim` and `num_global_key_value_heads`, unless there is a `per_layer_config`."""
    if kind != FULL or keys.has("per_layer_config"):
        return {}
    heads = keys.count("num_global_key_value_heads", 1)
    return {"head_dim": keys.count("global_head_dim", 512), "num_key_value_heads": heads}


def short_and_long(keys: Keys, kind: str, layer: int) -> Mapping[str, Any]:
    """Every other sliding layer has a window of 1024, and full ones none, unless there is a `per_layer_config`."""
    if keys.has("per_layer_config"):
        return {}
    if kind == FULL:
        return {"sliding_window": None}
    count = keys.count("num_hidden_layers")
    words = keys.items("layer_types", str) or every_or_last(6)(keys, count)
    return {"sliding_window": 1024} if list(words[:layer]).count(SLIDING) % 2 else {}


# Scales


def scaled_where(flag: str) -> Callable[[Keys, Heads, int], float | None]:
    """H ** -0.5 where a flag is set or absent, else 1."""

    def scale(keys: Keys, heads: Heads, layer: int) -> float | None:
        return None if keys.flag(flag, True) else 1.0

    return scale


def gpt2_scale(keys: Keys, heads: Heads, layer: int) -> float | None:
    """H ** -0.5, or 1 without `scale_attn_weights`; over layer + 1 with `scale_attn_by_inverse_layer_idx`."""
    scale = scaled_where("scale_attn_weights")(keys, heads, layer)
    if not keys.flag("scale_attn_by_inverse_layer_idx"):
        return scale
    return float((heads.head_dim**-0.5 if scale is None else scale) / (layer + 1))


def in_table(name: str, key: str) -> Callable[[Keys, Heads, int], float | None]:
    """A value of a key that is an object."""

    def scale(keys: Keys, heads: Heads, layer: int) -> float | None:
        return keys.inner(name).number(key)

    return scale


# Rotary embeddings, biases and the rest


def decoder_where(flag: str) -> Callable[[Keys], bool]:
    """Causal where a flag is set, unless `is_causal` is false."""
    return lambda keys: keys.flag(flag) and is_causal(keys)


def rotary_where(key: str, word: str) -> Callable[[Keys, str, int], bool]:
    """Where a key has a value."""

    def rope(keys: Keys, kind: str, layer: int) -> bool:
        return keys.text(key) == word

    return rope


def without(flag: str) -> Callable[[Keys, str, int], bool]:
    """Unless a flag is set."""

    def rope(keys: Keys, kind: str, layer: int) -> bool:
        return not keys.flag(flag)

    return rope


def where_flag(flag: str, text: str) -> Callable[[Keys], str | None]:
    """A text, where a flag is set."""
    return lambda keys: text if keys.flag(flag) else None


def absolute(*others: str) -> Callable[[Keys], None]:
    """No bias, of models whose positions are added to the embeddings, or are of another kind that adds none.

    Raises:
      ConfigError: `position_embedding_type` is of any other kind.
    """

    def bias(keys: Keys) -> None:
        kind = keys.text("position_embedding_type")
        if kind not in (None, "absolute", *others):
            raise keys.error(
                f"position_embedding_type = {brief(kind)} is not described: it adds products of queries and learned "
                "distances to the logits, and transformers no longer has it."
            )

    return bias


_IN_WINDOW = (
    "an image longer than the window: its tokens see it to the left no farther than the window, i.e. "
    "(Causal() | spans) & SlidingWindow(window - 1, S)"
)


def image_in_window(keys: Keys, kind: str, layer: int) -> tuple[str, ...]:
    """Says of sliding layers that the tokens of an image keep to the window on their left."""
    return (_IN_WINDOW,) if kind == SLIDING else ()


def vision_in_window(keys: Keys, kind: str, layer: int) -> tuple[str, ...]:
    """As `image_in_window`, where images see each other."""
    return (_IN_WINDOW,) if vision_on_sliding(keys, kind) else ()


def vision_on_sliding(keys: Keys, kind: str) -> str | None:
    """Images and videos on the sliding layers, where `use_bidirectional_attention` is "vision"."""
    return "image and video" if kind == SLIDING and keys.text("use_bidirectional_attention") == "vision" else None
