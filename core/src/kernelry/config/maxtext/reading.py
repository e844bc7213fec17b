"""Reads a mapping of MaxText's options: checks every key and value, then builds the AttentionConfig."""

from __future__ import annotations

import difflib
import enum
import functools
import importlib.resources
import shlex
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, final

from kernelry.config.layer import AttentionConfig, AttentionType, MoBA
from kernelry.config.maxtext import choice, mesh
from kernelry.config.maxtext.blocks import LAYERS
from kernelry.config.maxtext.options import OPTIONS, SIZES, Fate, Option, is_none
from kernelry.errors import ConfigError

_BY_NAME = {option.name: option for option in OPTIONS}

_EVAL_RULES = "logical_axis_rules_for_eval"

_MISSPELT = 0.85
"""The difflib ratio from which an unknown key counts as a misspelt option. A name of five letters with one wrong letter
is above it, and of the 820 other keys of base.yml two would be taken for an option if they were unknown."""


@final
class Caller(enum.Enum):
    """Whether messages say what to write in Python, or on the command line."""

    PYTHON = enum.auto()
    COMMAND = enum.auto()

    def ignoring(self, names: Iterable[str]) -> str:
        """Returns what leaves options out."""
        if self is Caller.PYTHON:
            return f"ignore={tuple(names)!r}"
        return shlex.join(word for name in names for word in ("--ignore", str(name)))

    def of_type(self, name: str) -> str:
        """Returns a sentence on what builds the config of another layer, and those of all."""
        if self is Caller.COMMAND:
            return (
                f"One more --maxtext FILE with attention_type: {name} builds the config of such a layer, and --model "
                "FILE, in place of the model's --maxtext FILE, describes all layers."
            )
        return (
            f"from_maxtext({{**options, 'attention_type': {name!r}}}) builds the config of such a layer, and "
            "kernelry.models.from_maxtext_model(base, model_yml) those of all layers of a model."
        )


def from_maxtext(mapping: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> AttentionConfig:
    """Builds an AttentionConfig from MaxText's options, by their names in base.yml.

    A whole base.yml is accepted, as YAML reads it, and so is a part of one: options that are absent
    have base.yml's default. Keys that are not about attention are ignored. Options about attention are
    mapped to options of the config; those that change how MaxText runs and not what attention means (a
    layout, a tunable that kernels here do not have) are not read, which one warning says of all of
    them; others are accepted at their default only, and any other value is an error that says why.

    The config is that of one layer. A model with several kinds of layers builds one for each:
    `from_maxtext({**base, "attention_type": "local_sliding"})`. A warning says where a size belongs to
    another type than `attention_type`, and where MaxText takes the types of the layers from
    `decoder_block`: in both cases MaxText's layers may see other keys than this config's.

    An unknown key that resembles an option about attention, or is a part of its name, is an error,
    since it may be a misspelling. Any other unknown key is a warning, since new releases of MaxText
    have new keys.

    MaxText scales queries before attention, so `scale` is 1.0. float32_qk_product and float32_logits
    change nothing: logits and softmax are float32 here. matmul_precision and dropout_rate, which
    some of MaxText's kernels ignore, are required of every kernel here; `ignore` drops them.

    A mapping with any option about a mesh, such as mesh_axes or context_parallel_strategy, makes the config's
    `sharding`, and layers then need that mesh: `AttentionOp(config, mesh=mesh)`, or the active one. A part
    of the options without them makes none.

    Args:
      mapping: option names to values.
      ignore: names of options to leave out, as if the mapping did not have them.

    Returns:
      The config; its `source` is "MaxText".

    Raises:
      ConfigError: a key is a misspelt option about attention, a value is not valid, or an option is
        not supported.
    """
    config, notices = read_options(mapping, ignore)
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    return config


def read_options(
    mapping: Mapping[str, Any], ignore: Iterable[str], caller: Caller = Caller.PYTHON
) -> tuple[AttentionConfig, tuple[str, ...]]:
    """Reads what `from_maxtext` reads, and returns its warnings with the config.

    Args:
      mapping, ignore: as there.
      caller: says whether messages are about Python or the command line.

    Raises:
      ConfigError: as there.
    """
    options, given, notices = checked(mapping, ignore, caller)
    config = built(options, given)
    return config, (*notices, *_unused(options, config, caller))


def checked(
    mapping: Mapping[str, Any], ignore: Iterable[str], caller: Caller
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Checks options, and fills in base.yml's defaults of those that are absent.

    Args:
      mapping, ignore, caller: as in `read_options`.

    Returns:
      The value of every option about attention, the names of those that the mapping has, and notices of keys that are
      unknown or without effect.

    Raises:
      ConfigError: as in `from_maxtext`.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"from_maxtext takes a mapping of option names to values, got {type(mapping).__name__}; "
            "of a config of MaxText, pass config.get_keys()."
        )
    dropped = checked_names(ignore)
    given = {name: value for name, value in mapping.items() if name not in dropped}
    unread = _unknown(given, caller)
    about = {name: plain(value) for name, value in given.items() if name in _BY_NAME}
    for name, value in about.items():
        check_value(_BY_NAME[name], value, caller)
    options = {option.name: about.get(option.name, option.default) for option in OPTIONS}
    return options, tuple(about), (*unread, *_without_effect(about, caller))


def checked_names(ignore: Iterable[str]) -> frozenset[str]:
    """Returns the names of options to leave out.

    Raises:
      ConfigError: they are not names.
    """
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise ConfigError(f"ignore must be names in a tuple, got {ignore!r}; write ignore=({str(ignore)!r},).")
    names = tuple(ignore)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"ignore must be names in a tuple, got {names!r}.")
    return frozenset(names)


def merged(options: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a file with those of a later one over them.

    As in MaxText, rules of logical names replace those of the same names, and all others only where the later file sets
    override_logical_axis_rules.
    """
    name = "logical_axis_rules"
    both = {**options, **later}
    rules, new = options.get(name), later.get(name)
    if not isinstance(rules, list) or not isinstance(new, list) or both.get("override_logical_axis_rules"):
        return both
    replaced = [rule[0] for rule in new if isinstance(rule, list) and rule]
    kept = [rule for rule in rules if not (isinstance(rule, list) and rule and rule[0] in replaced)]
    return {**both, name: [*kept, *new]}


def built(options: Mapping[str, Any], given: Iterable[str]) -> AttentionConfig:
    """Returns the config of a layer of the type that `attention_type` names.

    Args:
      options: the value of every option about attention.
      given: the names of those that are not defaults of an absent option.

    Raises:
      ConfigError: a value is not valid, or two options contradict each other.
    """
    kernel, rules = choice.kernel_and_rules(options)
    type_ = _type(options["attention_type"])
    soft_cap = options["attn_logits_soft_cap"]
    return AttentionConfig(
        kernel=kernel,
        rules=rules,
        source="MaxText",
        type=type_,
        window=_size(options, type_, AttentionType.LOCAL_SLIDING),
        chunk_size=_size(options, type_, AttentionType.CHUNK),
        block_size=_size(options, type_, AttentionType.BLOCK_DIFFUSION),
        soft_cap=None if is_none(soft_cap) or soft_cap == 0 else _in_range("attn_logits_soft_cap", soft_cap, None),
        scale=1.0,
        sinks=options["attention_sink"],
        moba=MoBA(options["moba_chunk_size"], options["moba_topk"]) if options["moba"] else None,
        record_max_logits=options["use_qk_clip"],
        dropout_rate=_in_range("dropout_rate", options["dropout_rate"], 1.0) if options["enable_dropout"] else 0.0,
        precision=_precision(options["matmul_precision"]),
        tilings=choice.tilings(options, local=type_ is AttentionType.LOCAL_SLIDING),
        sharding=mesh.sharding_of(options, given),
    )


def plain(value: Any) -> Any:
    """Returns the value of an enum's member: `config.get_keys()` has members where base.yml has texts."""
    return value.value if isinstance(value, enum.Enum) else value


def _without_effect(about: Mapping[str, Any], caller: Caller) -> Iterator[str]:
    """Yields a notice of the options that have no effect, grouped by reason."""
    unread = [name for name in about if _BY_NAME[name].fate is Fate.UNREAD]
    changed = [name for name in unread if _BY_NAME[name].says(about[name])]
    if about.get(_EVAL_RULES) == about.get("logical_axis_rules"):  # as MaxText fills them in where it has none
        changed = [name for name in changed if name != _EVAL_RULES]
    reasons: dict[str, list[str]] = {}
    for name in changed:
        reasons.setdefault(_BY_NAME[name].meaning, []).append(f"{name} = {_shown(about[name])}")
    if changed:
        said = "; ".join(f"{', '.join(values)} ({reason})" for reason, values in reasons.items())
        yield (
            f"MaxText options that are not read, as they do not change what attention means: {said}. "
            f"Pass {caller.ignoring(changed)} to leave them out."
        )


def _shown(value: Any) -> str:
    return "[…]" if isinstance(value, list | tuple) and len(repr(value)) > 80 else repr(value)


def _unused(options: Mapping[str, Any], config: AttentionConfig, caller: Caller) -> Iterator[str]:
    """Yields a notice of the sizes, and of the layers of the decoder block, that the config leaves out."""
    type_, block = options["attention_type"], options["decoder_block"]
    left_out = [
        name for owner, name in SIZES.items() if owner != type_ and options[name] not in (0, _BY_NAME[name].default)
    ]
    layers = LAYERS.get(block, ())
    if type_ in layers and type_ != _BY_NAME["attention_type"].default:
        layers = ()  # one of its kinds was chosen
    if layers:
        left_out.append("decoder_block")
    if not left_out:
        return
    listed = " and ".join(f"{name} = {options[name]!r}" for name in left_out)
    others = [owner for owner, name in SIZES.items() if name in left_out]
    kinds = f"MaxText's layers of {block} are {' and '.join(layers)}. " if layers else ""
    yield (
        f"MaxText: {listed} {'is' if len(left_out) == 1 else 'are'} not used: attention_type is {type_!r}, so the mask "
        f"is {config.mask!r}. {kinds}{caller.of_type((*layers, *others)[0])} "
        f"If {config.mask!r} is right for this layer, pass {caller.ignoring(left_out)}."
    )


def _type(name: str) -> AttentionType:
    try:
        return AttentionType.parse(name)
    except ConfigError as error:
        raise ConfigError(f"MaxText option attention_type: {error}") from error


def _size(options: Mapping[str, Any], type_: AttentionType, owner: AttentionType) -> int | None:
    if type_ is not owner:
        return None
    name = SIZES[owner.value]
    size: int = options[name]
    if size == 0:
        raise ConfigError(f"MaxText option attention_type = {type_.value!r} needs {name}, a positive integer; it is 0.")
    return size


def _in_range(name: str, number: float, end: float | None) -> float:
    if number < 0 or (end is not None and number >= end):
        expected = "0 or more" if end is None else f"in [0, {end:g})"
        raise ConfigError(f"MaxText option {name} must be {expected}, got {number!r}.")
    return float(number)


def _precision(name: str) -> str | None:
    if name not in ("default", "high", "highest"):
        raise ConfigError(f"MaxText option matmul_precision must be default, high or highest, got {name!r}.")
    return None if name == "default" else name


def check_value(option: Option, value: Any, caller: Caller) -> None:
    """Checks the value of one option.

    Raises:
      ConfigError: it is not of its kind, or the option is not supported at another value than its default.
    """
    if not option.accepts(value):
        raise ConfigError(f"MaxText option {option.name} must be {option.expected}, got {value!r}.")
    if option.fate is Fate.FOREIGN and option.says(value):
        raise ConfigError(
            f"MaxText option {option.name} = {value!r} is not supported: {option.meaning}. "
            f"Leave it at {option.default!r}, or drop it with {caller.ignoring([option.name])}."
        )


def _unknown(given: Mapping[str, Any], caller: Caller) -> list[str]:
    """Returns a notice of the unknown keys.

    Raises:
      ConfigError: one of them is a misspelt option about attention.
    """
    unknown = [name for name in given if name not in _BY_NAME and name not in not_attention()]
    meant = {name: option for name in unknown if (option := misspelt(str(name), _BY_NAME)) is not None}
    if meant:
        described = " ".join(
            f"Unknown MaxText option {name!r}; did you mean {option!r}?" for name, option in meant.items()
        )
        raise ConfigError(f"{described} If it is not about attention, pass {caller.ignoring(meant)}.")
    if not unknown:
        return []
    described = ", ".join(f"{name!r}{_like(str(name))}" for name in unknown)
    return [
        f"Unknown MaxText options that are not read: {described}. "
        f"Pass {caller.ignoring(unknown)} if they are not about attention."
    ]


def misspelt(name: str, options: Collection[str]) -> str | None:
    """Returns the one of these options that an unknown key resembles, or whose name it is a part of."""
    name = name.lower().replace("-", "_")
    close = difflib.get_close_matches(name, [*options, *(not_attention() - set(options))], n=1, cutoff=_MISSPELT)
    if close and close[0] in options:
        return close[0]
    parts = [option for option in sorted(options) if "_" in name and f"_{name}_" in f"_{option}_"]
    return min(parts, key=len, default=None)


def _like(name: str) -> str:
    close = difflib.get_close_matches(name, sorted(not_attention()), n=1, cutoff=0.8)
    return f" (MaxText 0.2.5 has {close[0]!r})" if close else ""


@functools.cache
def not_attention() -> frozenset[str]:
    """The keys of MaxText that are not about attention, from the shipped list."""
    file = importlib.resources.files("kernelry.config.maxtext").joinpath("not_attention.txt")
    text = file.read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))
