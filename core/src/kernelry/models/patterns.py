"""Which layers attend, and how, where a config has no `layer_types`: the rules of the cells `layers` and `count`.

A rule takes the keys of a config and the number of layers and returns a word of `layer_types` for each layer. Rules
that take arguments return such a function.
"""

from __future__ import annotations

from collections.abc import Callable

from kernelry.models.keys import Keys

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, CONV, INDEXED = "linear_attention", "conv", "indexed_attention"

CHOSEN_KEYS = (
    "it attends to compressed keys, or to keys that an indexer chooses: pass them as arrays of a call, with a mask"
)
"""Why such layers are not described."""

Layers = Callable[[Keys, int], tuple[str, ...]]
"""The words of `layer_types` that a family means where its config has none, for a number of layers."""


def all_full(keys: Keys, count: int) -> tuple[str, ...]:
    """Every layer is full."""
    return (FULL,) * count


def all_sliding(keys: Keys, count: int) -> tuple[str, ...]:
    """Every layer slides."""
    return (SLIDING,) * count


def all_of(word: str) -> Layers:
    """Every layer has one word."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        return (word,) * count

    return layers


def constant(words: tuple[str, ...]) -> Layers:
    """The words of one published model.

    Raises:
      ConfigError: the config has another number of layers.
    """

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        if count != len(words):
            raise keys.error(f"{keys.named('layer_types')} is missing, and only {len(words)} layers have a default.")
        return words

    return layers


def named_besides(word: str, layers: Layers) -> Layers:
    """The words of `layer_types` besides one, which names blocks that are no layers; a rule where it is absent."""

    def others(keys: Keys, count: int) -> tuple[str, ...]:
        words = keys.items("layer_types", str)
        return layers(keys, count) if words is None else tuple(each for each in words if each != word)

    return others


def said(keys: Keys, count: int) -> tuple[str, ...]:
    """The config must say it.

    Raises:
      ConfigError: it does not.
    """
    raise keys.error(f"{keys.named('layer_types')} is missing, and its model type has no default.")


def windowed(key: str, flag: str | None = None) -> Layers:
    """Every layer slides where a window is set and, if there is one, a flag; else none."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        slides = keys.get(key) is not None and (flag is None or keys.flag(flag))
        return (SLIDING if slides else FULL,) * count

    return layers


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


def every_or_last(number: int, other: str = SLIDING, *, always: bool = True) -> Layers:
    """As `every`, and the last layer is full: always, or else where no other layer is."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        words = every(number, other=other)(keys, count)
        return (*words[:-1], FULL) if always or FULL not in words else words

    return layers


def first_of(number: int, key: str | None = None) -> Layers:
    """Layers 0, number, 2 number, … are full and the others slide."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        period = number if key is None else keys.count(key, number)
        return tuple(SLIDING if layer % period else FULL for layer in range(count))

    return layers


def back_from_last(number: int) -> Layers:
    """Full are the last layer and every so many before it; the others slide."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        return tuple(FULL if (count - 1 - layer) % number == 0 else SLIDING for layer in range(count))

    return layers


def alternating(*words: str) -> Layers:
    """The words again and again."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        return tuple(words[layer % len(words)] for layer in range(count))

    return layers


def each(word: Callable[[int], str], last: str | None = None) -> Layers:
    """The words that a function of a layer's number returns, and another for the last layer."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        words = tuple(word(layer) for layer in range(count))
        return words if last is None else (*words[:-1], last)

    return layers


def from_layer(flag: str | None, first: str, window: str = "sliding_window") -> Layers:
    """The layers from a number on slide, where a window is set and, if there is one, a flag."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        slides = keys.get(window) is not None and (flag is None or keys.flag(flag))
        start = keys.count(first, count, least=0) if slides else count
        return tuple(SLIDING if layer >= start else FULL for layer in range(count))

    return layers


def even_below(flag: str, first: str) -> Layers:
    """The even layers below a number slide, where a flag is set."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        end = keys.count(first, count, least=0) if keys.flag(flag) else 0
        return tuple(SLIDING if layer < end and layer % 2 == 0 else FULL for layer in range(count))

    return layers


def with_prefix(prefix: str, prefix_period: str, number: int, period: str) -> Layers:
    """Two patterns of `every`: one for the first layers, and one that starts anew after them.

    Args:
      prefix: the key of the number of first layers.
      prefix_period: the key of their period.
      number: the period of the others.
      period: a key for that period.
    """

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        first = min(keys.count(prefix, 0, least=0), count)
        return every(1, prefix_period)(keys, first) + every(number, period)(keys, count - first)

    return layers


def periodic(period: str, offset: str, other: str = LINEAR, word: str = FULL) -> Layers:
    """A word for the layers whose number leaves an offset when it is divided by a period, which both are keys."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        step, start = keys.count(period), keys.count(offset, least=0)
        return tuple(word if layer % step == start else other for layer in range(count))

    return layers


def after(first: tuple[str, ...], layers: Layers) -> Layers:
    """Words of the first layers, and a rule for the others, which are counted from 0 again."""
    return lambda keys, count: (*first, *layers(keys, max(count - len(first), 0)))[:count]


def numbered(key: str, other: str, *, default: Layers) -> Layers:
    """Full are the layers whose numbers a key lists; the default where there is no such key."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        numbers = keys.items(key, int)
        if numbers is None:
            return default(keys, count)
        return tuple(FULL if layer in numbers else other for layer in range(count))

    return layers


def on_rotary_layers(interval: int, words: Callable[[Keys, bool], str]) -> Layers:
    """The word depends on whether a layer has rotary embeddings, by `no_rope_layers`."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        return tuple(words(keys, rotary) for rotary in rotary_layers(keys, count, interval))

    return layers


def rotary_layers(keys: Keys, count: int, interval: int) -> tuple[bool, ...]:
    """Whether each layer has rotary embeddings: 1 in `no_rope_layers`, or all but every so many."""
    if keys.items("no_rope_layers", int):
        listed = keys.items("no_rope_layers", int, count) or ()
        return tuple(bool(each) for each in listed)
    period = keys.count("no_rope_layer_interval", interval)
    return tuple((layer + 1) % period != 0 for layer in range(count))


def cycled(key: str, words: dict[str, str]) -> Layers:
    """The words of a list again and again, translated."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        cycle = keys.items(key, str)
        if not cycle:
            raise keys.error(f"{keys.named(key)} is missing or empty, and its model type has no default.")
        return tuple(words.get(cycle[layer % len(cycle)], cycle[layer % len(cycle)]) for layer in range(count))

    return layers


def lettered(key: str, words: dict[str, str], *, default: tuple[str, ...]) -> Layers:
    """A letter for each layer, e.g. `M*M-`; the default where there is no such text."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        letters = keys.text(key)
        if letters is None:
            return default
        unknown = sorted(set(letters) - set(words))
        if unknown or not letters:
            raise keys.error(f"{key} must be a text of the letters {''.join(words)}, got {letters[:80]!r}.")
        return tuple(words[letter] for letter in letters)

    return layers


def ratios(key: str, words: dict[int, str], *, default: Layers) -> Layers:
    """A number for each layer; the default where there is no such list."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        numbers = keys.items(key, int)
        if numbers is None:
            return default(keys, count)
        if len(numbers) < count or not set(numbers) <= set(words):
            raise keys.error(f"{key} must have {count} numbers of {', '.join(map(str, words))}, got {len(numbers)}.")
        return tuple(words[number] for number in numbers[:count])

    return layers


def within(table: str, words: dict[str, str], *, default: Layers) -> Layers:
    """Lists of layers, counted from 1, in an object: one list for each word."""

    def layers(keys: Keys, count: int) -> tuple[str, ...]:
        found = Keys(keys.table(table), "", f"{keys.where}: {table}")
        lists = {word: found.items(name, int) for name, word in words.items()}
        if any(numbers is None for numbers in lists.values()):
            return default(keys, count)
        named = {number: word for word, numbers in lists.items() for number in numbers or ()}
        missing = sorted(set(range(1, count + 1)) - set(named))
        if missing:
            raise keys.error(f"{table} names layer {missing[0]} of {count}, counted from 1, in none of its lists.")
        return tuple(named[layer + 1] for layer in range(count))

    return layers


# How many layers


def twice(key: str) -> Callable[[Keys], int]:
    """Two for each of a key, or else `num_hidden_layers`, which then is even.

    Raises:
      ConfigError: the two keys contradict each other.
    """

    def count(keys: Keys) -> int:
        layers = keys.optional_count("num_hidden_layers", least=2)
        if layers is None or (keys.says(key) and layers == 2 * keys.count(key)):
            return 2 * keys.count(key)
        if keys.says(key) or layers % 2:
            said = f", and {key} = {keys.count(key)}" if keys.says(key) else ""
            raise keys.error(f"num_hidden_layers must be two for each of {key}, got {layers}{said}.")
        return layers

    return count


def length_of(layers: Layers, key: str) -> Callable[[Keys], int]:
    """As many as the words of a key, or else of a rule that needs no number."""

    def count(keys: Keys) -> int:
        words = keys.items(key, str)
        return len(layers(keys, 0) if words is None else words)

    return count


def besides(word: str) -> Callable[[Keys], int]:
    """`num_hidden_layers`, which counts the blocks of a word too where `layer_types` names them."""

    def count(keys: Keys) -> int:
        words = keys.items("layer_types", str) or []
        given = keys.count("num_hidden_layers")
        if words and len(words) != given:
            raise keys.error(f"layer_types has {len(words)} entries for {given} layers; both must agree.")
        return max(given - words.count(word), 1)

    return count
