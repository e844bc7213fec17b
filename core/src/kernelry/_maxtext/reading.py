"""Reads a mapping of MaxText's options: checks every key and value, then builds the AttentionConfig."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
from collections.abc import Iterable, Mapping
from typing import Any

from kernelry._maxtext import choice
from kernelry._maxtext.options import OPTIONS, Fate, Option, is_none
from kernelry.errors import ConfigError
from kernelry.layer import AttentionConfig, AttentionType, MoBA

_BY_NAME = {option.name: option for option in OPTIONS}


def from_maxtext(mapping: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> AttentionConfig:
    """Builds an AttentionConfig from MaxText's options, by their names in base.yml.

    A whole base.yml is accepted, as YAML reads it, and so is a part of one: what is absent is at
    base.yml's default. Keys that are not about attention are not looked at. Options about attention
    become an option here, or are accepted at their default only, with an error that says why.

    The config is that of one layer. A model with several kinds of layers builds one for each:
    `from_maxtext({**base, "attention_type": "local_sliding"})`. So sizes of other types than
    `attention_type`'s may be set, and are not used.

    MaxText scales queries before attention, so `scale` is 1.0. float32_qk_product and float32_logits
    change nothing: logits and softmax are float32 here. matmul_precision and dropout_rate, which
    some of MaxText's kernels leave out, are asked of every kernel here; `ignore` drops them.

    Args:
      mapping: option names to values.
      ignore: names of options to leave out, as if the mapping did not have them.

    Returns:
      The config; its `source` is "MaxText".

    Raises:
      ConfigError: a key is unknown, a value is of the wrong kind, or an option has no meaning here.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"from_maxtext takes a mapping of option names to values, got {type(mapping).__name__}; "
            "of a config of MaxText, pass config.get_keys()."
        )
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise ConfigError(f"ignore must be names in a tuple, got {ignore!r}; write ignore=({str(ignore)!r},).")
    dropped = frozenset(ignore)
    given = {name: value for name, value in mapping.items() if name not in dropped}
    _check_known(given)
    about = {name: value for name, value in given.items() if name in _BY_NAME}
    for name, value in about.items():
        _check_value(_BY_NAME[name], value)
    return _built({option.name: about.get(option.name, option.default) for option in OPTIONS})


def _built(options: Mapping[str, Any]) -> AttentionConfig:
    kernel, rules = choice.kernel_and_rules(options)
    type_ = _type(options["attention_type"])
    soft_cap = options["attn_logits_soft_cap"]
    return AttentionConfig(
        kernel=kernel,
        rules=rules,
        source="MaxText",
        type=type_,
        window=_size(options, "sliding_window_size", type_, AttentionType.LOCAL_SLIDING),
        chunk_size=_size(options, "chunk_attn_window_size", type_, AttentionType.CHUNK),
        block_size=_size(options, "causal_block_size", type_, AttentionType.BLOCK_DIFFUSION),
        soft_cap=None if is_none(soft_cap) or soft_cap == 0 else _in_range("attn_logits_soft_cap", soft_cap, None),
        scale=1.0,
        sinks=options["attention_sink"],
        moba=MoBA(options["moba_chunk_size"], options["moba_topk"]) if options["moba"] else None,
        record_max_logits=options["use_qk_clip"],
        dropout_rate=_in_range("dropout_rate", options["dropout_rate"], 1.0) if options["enable_dropout"] else 0.0,
        precision=_precision(options["matmul_precision"]),
        tilings=choice.tilings(options, local=type_ is AttentionType.LOCAL_SLIDING),
    )


def _type(name: str) -> AttentionType:
    try:
        return AttentionType.parse(name)
    except ConfigError as error:
        raise ConfigError(f"MaxText option attention_type: {error}") from error


def _size(options: Mapping[str, Any], name: str, type_: AttentionType, owner: AttentionType) -> int | None:
    size: int = options[name]
    if type_ is not owner:
        return None
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


def _check_value(option: Option, value: Any) -> None:
    if not option.accepts(value):
        raise ConfigError(f"MaxText option {option.name} must be {option.expected}, got {value!r}.")
    if option.fate is Fate.FOREIGN and value not in (option.default, *option.neutral):
        raise ConfigError(
            f"MaxText option {option.name} = {value!r} has no meaning here: {option.meaning}. "
            f"Leave it at {option.default!r}, or drop it with ignore=({option.name!r},)."
        )


def _check_known(given: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in _BY_NAME and name not in not_attention()]
    if not unknown:
        return
    described = " ".join(f"Unknown MaxText option {name!r}; {_nearest(name)}" for name in unknown)
    raise ConfigError(f"{described} What is not about attention passes with ignore={tuple(unknown)!r}.")


def _nearest(name: object) -> str:
    """The nearest option about attention; another key where that is much nearer, or the only near one."""
    for likeness in (0.9, 0.6):
        for names in (_BY_NAME, not_attention()):
            close = difflib.get_close_matches(str(name), sorted(names), n=1, cutoff=likeness)
            if close:
                return f"did you mean {close[0]!r}?"
    return "no known one is near it."


@functools.cache
def not_attention() -> frozenset[str]:
    """The keys of MaxText that are not about attention, from the shipped list."""
    text = importlib.resources.files("kernelry._maxtext").joinpath("not_attention.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))
