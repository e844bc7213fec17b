"""The shipped preferences: thresholds and rules, each with the source of its number or of its order.

`shipped.json` next to this file holds them; `make policy` builds it from recordings. Every row names its source: what
was measured and where, what a device's compiler predicts, or what others published. Where there is none, it says so.

A rule's `when` has the fields of `Condition`. A range is bounds that all hold, e.g. `>=128` or `>=this, >=that`; a
bound may be the name of a threshold. `use` goes on with `auto`. A rule that `follows` a threshold has the reason of its
number.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, final

from kernelry.errors import ConfigError, nearest
from kernelry.kernel.spec import AUTO
from kernelry.policy.rules import RANGES, Condition, Range, Rule
from kernelry.request.request import Mode

SHIPPED: Mapping[str, Any] = json.loads(
    resources.files("kernelry.policy").joinpath("shipped.json").read_text(encoding="utf-8")
)
"""`sources` by name, `thresholds` and `rules`: what the file contains."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Threshold:
    """A number that decides between kernels, with its unit and where it comes from."""

    name: str
    value: int
    unit: str
    source: str


def shipped_thresholds(data: Mapping[str, Any]) -> tuple[Threshold, ...]:
    """Returns the thresholds of a file such as `shipped.json`."""
    return tuple(Threshold(row["name"], row["value"], row["unit"], row["reason"]) for row in data["thresholds"])


SHIPPED_THRESHOLDS = shipped_thresholds(SHIPPED)
_BY_NAME = {threshold.name: threshold for threshold in SHIPPED_THRESHOLDS}
FLASH_MIN_Q_LEN = _BY_NAME["flash_min_q_len"]
ADAPTERS_MAX_EXTRA_WORK = _BY_NAME["adapters_max_extra_work"]


def thresholds_with(values: Mapping[str, int]) -> dict[str, Threshold]:
    """Returns the shipped thresholds by name, some with a user's values.

    Raises:
      ConfigError: a name is unknown, or a value is not a number that it may be.
    """
    chosen = dict(_BY_NAME)
    for name, value in values.items():
        if name not in chosen:
            raise ConfigError(f"unknown threshold {name!r}{nearest(name, chosen)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"threshold {name} must be an integer, 0 or more {chosen[name].unit}, got {value!r}.")
        chosen[name] = dataclasses.replace(chosen[name], value=value, source="the user's config")
    return chosen


def shipped_rules(thresholds: Mapping[str, Threshold], data: Mapping[str, Any] = SHIPPED) -> tuple[Rule, ...]:
    """Returns the shipped preferences; the first that applies orders the kernels it names.

    Args:
      thresholds: by name.
      data: a file such as `shipped.json`.
    """
    rules: dict[Condition, Rule] = {}
    for row in data["rules"]:
        reason = thresholds[row["follows"]].source if "follows" in row else row["reason"]
        rule = Rule(condition(row["when"], thresholds), (*row["use"], AUTO), source="shipped policy", reason=reason)
        rules.setdefault(rule.when, rule)  # the first of two with the same numbers decides
    return tuple(rules.values())


def condition(when: Mapping[str, Any], thresholds: Mapping[str, Threshold]) -> Condition:
    """Reads the `when` of a rule of the file.

    Args:
      when: values of fields of `Condition`.
      thresholds: by name.
    """
    fields: dict[str, Any] = {}
    for name, value in when.items():
        if name in RANGES:
            fields[name] = _range(value, thresholds)
        else:
            fields[name] = tuple(map(Mode, value)) if name == "mode" else tuple(value)
    return Condition(**fields)


def _range(text: str, thresholds: Mapping[str, Threshold]) -> Range:
    minima: list[int] = []
    maxima: list[int] = []
    for bound in text.split(", "):
        name = bound.lstrip("<>=")
        value = thresholds[name].value if name in thresholds else int(name)
        (minima if bound.startswith(">=") else maxima).append(value - bound.startswith("<"))
    return Range(max(minima, default=None), min(maxima, default=None))


SHIPPED_RULES = shipped_rules(thresholds_with({}))
