"""The keys of a Hugging Face config: checked when read, under either name, with the defaults of its model type."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any, final

from kernelry.errors import ConfigError
from kernelry.request.checks import is_finite

LARGEST = 2**20
"""Of layers, heads and dims: more is a mistake, and no model has it."""


OLDER_NAMES: Mapping[str, Mapping[str, str]] = {
    "bloom": {"hidden_size": "n_embed"},
    "falcon": {"hidden_size": "n_embed"},
}
"""Names in published files that the code reads and `attribute_map` of its config lacks, by model type."""


def brief(value: Any) -> str:
    """A value as it is written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def defaults() -> Mapping[str, Mapping[str, Any]]:
    """The defaults, and the other names of keys, by model type; written by `make model-defaults` from transformers."""
    file = importlib.resources.files("kernelry.models").joinpath("defaults.json")
    found: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["types"]
    return found


@final
class Keys:
    """The keys of a config.

    Args:
      given: the config's content.
      model_type: whose defaults replace absent keys.
      where: what errors name, e.g. the file.
      read: of keys that these override, which are then read with them.
    """

    def __init__(
        self, given: Mapping[str, Any], model_type: str, where: str, read: dict[str, None] | None = None
    ) -> None:
        self._given = given
        self._model_type = model_type
        about = defaults().get(model_type, {})
        self._defaults: Mapping[str, Any] = about.get("defaults", {})
        self._names: Mapping[str, str] = about.get("names", {})
        self._older: Mapping[str, str] = OLDER_NAMES.get(model_type, {})
        self.where = where
        self.read = {} if read is None else read  # the keys that the config has and that were asked for, in order

    def error(self, text: str) -> ConfigError:
        """Returns an error that names the config."""
        return ConfigError(f"{self.where}: {text}")

    def of_layer(self, layer: int) -> Keys:
        """Returns the keys of one layer: `per_layer_config` overrides those of the model."""
        table = self.table("per_layer_config")
        changed: dict[str, Any] = {}
        for key, own in table.items():
            if not (str(key).isascii() and str(key).isdecimal()):
                raise self.error(f"per_layer_config: {brief(key)} must be the number of a layer.")
            if str(key).lstrip("0") == str(layer).lstrip("0"):
                if not isinstance(own, Mapping):
                    raise self.error(f"per_layer_config[{key!r}] must be an object, got {brief(own)}.")
                changed.update(own)
        if changed.get("skip"):
            raise self.error(f"per_layer_config of layer {layer} skips {brief(changed['skip'])}: it is not described.")
        return self.overridden(changed)

    def overridden(self, changed: Mapping[str, Any]) -> Keys:
        """Returns these keys with other values."""
        if not changed:
            return self
        names = {alike for key in changed for alike in self._alike(key)}
        kept = {key: value for key, value in self._given.items() if key not in names}
        return Keys({**kept, **changed}, self._model_type, self.where, self.read)

    def _alike(self, name: str) -> tuple[str, ...]:
        """The names of one key: the model type's own first, then those that mean the same."""
        own = self._names.get(name, name)
        common = (common for common, meant in self._names.items() if meant == own)
        return (own, *common, *(older for key, older in self._older.items() if key == own))

    def _written(self, name: str) -> list[str]:
        return [alike for alike in self._alike(name) if alike in self._given]

    def has(self, name: str) -> bool:
        """Whether the config itself has a key, under any of its names, also with null."""
        return bool(self._written(name))

    def says(self, name: str) -> bool:
        """Whether the config itself has a key, under any of its names, with a value other than null."""
        return self.has(name) and self.get(name) is not None

    def get(self, name: str) -> Any:
        """Returns a value: the config's, else the default of its model type, else None. A null is None.

        Raises:
          ConfigError: the config has it under two names, and the values differ.
        """
        written = self._written(name)
        if not written:
            return self._defaults.get(self._alike(name)[0])
        self.read[written[0]] = None
        first, *others = written
        for other in others:
            if self._given[first] != self._given[other]:
                values = f"{first} = {brief(self._given[first])} and {other} = {brief(self._given[other])}"
                raise self.error(f"{values} contradict each other: keep one.")
        return self._given[first]

    def named(self, name: str) -> str:
        """Returns the name that the config uses, or would use, for a key."""
        return next(iter(self._written(name)), self._alike(name)[0])

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Returns a whole number that must be there.

        Raises:
          ConfigError: it is absent and has no default, or it is not such a number.
        """
        found = self.optional_count(name, least=least)
        found = default if found is None else found
        if found is None:
            raise self.error(f"{self.named(name)} is missing, and its model type has no default.")
        return found

    def optional_count(self, name: str, *, least: int = 1) -> int | None:
        """Returns a whole number, or None where there is none.

        Raises:
          ConfigError: it is not a whole number, or is out of range.
        """
        found = self.get(name)
        if found is None or (type(found) is int and least <= found <= LARGEST):
            return found
        expected = f"an integer from {least} to {LARGEST}"
        raise self.error(f"{self.named(name)} must be {expected}, got {brief(found)}.")

    def number(self, name: str, default: float | None = None) -> float | None:
        """Returns a finite number, or the default, also where the config has null.

        Raises:
          ConfigError: it is not a finite number.
        """
        found = self.get(name)
        if found is None:
            return default
        if is_finite(found):
            return float(found)
        raise self.error(f"{self.named(name)} must be a finite number, got {brief(found)}.")

    def positive(self, name: str, default: float | None = None) -> float | None:
        """Returns a number above 0, as `number` does."""
        found = self.number(name, default)
        if found is not None and found <= 0:
            raise self.error(f"{self.named(name)} must be positive, got {found}.")
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns true or false; the default where it is absent or null.

        Raises:
          ConfigError: it is neither.
        """
        found = self.get(name)
        if found is None:
            return default
        if isinstance(found, bool):
            return found
        raise self.error(f"{self.named(name)} must be true or false, got {brief(found)}.")

    def text(self, name: str) -> str | None:
        """Returns a text, or None.

        Raises:
          ConfigError: it is not a text.
        """
        found = self.get(name)
        if found is None or isinstance(found, str):
            return found
        raise self.error(f"{self.named(name)} must be a text, got {brief(found)}.")

    def items(self, name: str, kind: type, length: int | None = None) -> list[Any] | None:
        """Returns a list of values of one kind, or None.

        Raises:
          ConfigError: it is not such a list, or has another length.
        """
        found = self.get(name)
        if found is None:
            return None
        if not isinstance(found, list | tuple) or not all(type(item) is kind for item in found):
            raise self.error(f"{self.named(name)} must be a list of {kind.__name__}, got {brief(found)}.")
        if length is not None and len(found) != length:
            raise self.error(f"{self.named(name)} has {len(found)} entries for {length} layers; both must agree.")
        return list(found)

    def table(self, name: str) -> Mapping[Any, Any]:
        """Returns a mapping, empty where there is none.

        Raises:
          ConfigError: it is not a mapping.
        """
        found = self.get(name)
        if found is None:
            return {}
        if isinstance(found, Mapping) and all(isinstance(key, str) or type(key) is int for key in found):
            return found
        raise self.error(f"{self.named(name)} must be an object, got {brief(found)}.")

    def inner(self, name: str) -> Keys:
        """Returns the keys of an object, none where it is absent."""
        return Keys(self.table(name), "", f"{self.where}: {self.named(name)}")
