"""The attention part of a training script's config: read, validated, turned into a Policy.

[attention]
type = "local_sliding"                # what a layer is: see AttentionConfig
window = 512
soft_cap = 50.0
kernel = "auto"                       # or a kernel's name, absolutely
forbid_adapters = []

[attention.thresholds]
flash_min_q_len = 128

[attention.tilings]
splash = { block_q = 1024 }           # where that kernel is chosen; a rule's own tiling goes before it

[[attention.rules]]                   # the first rule that applies decides
when = { platform = "gpu", mode = ["train", "prefill"], q_len = ">=128", mask = ["window"] }
use = ["pallas_mha", "auto"]          # exhaustive unless it ends in "auto"
tiling = { block_q = 64 }
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelry._maxtext import from_maxtext
from kernelry.adapters import ADAPTERS
from kernelry.errors import ConfigError, nearest
from kernelry.layer import AttentionConfig, AttentionType, MoBA
from kernelry.policy import SHIPPED_THRESHOLDS, Condition, Range, Rule
from kernelry.request import Mode

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from kernelry._config_schema import AttentionTable, RuleTable

__all__ = ["AttentionConfig", "AttentionType", "MoBA", "from_maxtext", "load_config"]


def load_config(source: str | Path | Mapping[str, Any], *, table: str = "attention") -> AttentionConfig:
    """Reads a config from a TOML or YAML file, or from a mapping.

    Args:
      source: a path ending in .toml, .yaml or .yml, or the content of the table itself.
      table: the table of the file that is about attention; other tables are not looked at. A
        dotted name reaches inside; an absent table means the defaults.

    Returns:
      The validated config.

    Raises:
      ConfigError: the file cannot be read, or a key or value is wrong; the message names the key,
        what was found and the nearest valid name.
    """
    if isinstance(source, Mapping):
        return _validated(source, "config")
    if not isinstance(source, str | Path) or not isinstance(table, str):
        raise ConfigError(f"load_config takes a path or a mapping, and a table's name, got {source!r} and {table!r}.")
    path = Path(source)
    content: Any = _read(path)
    for name in table.split("."):
        content = content.get(name, {}) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: [{table}] must be a table, got {content!r}.")
    return _validated(content, str(path))


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8.") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path, text)
    raise ConfigError(f"{path}: unknown kind of config {path.suffix!r}; use .toml, .yaml or .yml.")


def _read_yaml(path: Path, text: str) -> Any:
    yaml = _need("yaml")
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error


def _need(module: str) -> Any:
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"reading configs needs {error.name}; pip install 'kernelry[config]'.") from error


def _validated(content: Mapping[str, Any], source: str) -> AttentionConfig:
    pydantic = _need("pydantic")
    from kernelry import _config_schema as schema

    try:
        table = schema.AttentionTable.model_validate(dict(content))
    except pydantic.ValidationError as error:
        problems = "; ".join(_problem(detail, schema.KEYS) for detail in error.errors())
        raise ConfigError(f"{source}: {problems}.") from error
    _check_names("thresholds", table.thresholds, {threshold.name for threshold in SHIPPED_THRESHOLDS}, source)
    _check_names("forbid_adapters", table.forbid_adapters, {adapter.name for adapter in ADAPTERS}, source)
    rules = tuple(_rule(rule, f"{source}: rule {place}") for place, rule in enumerate(table.rules, start=1))
    return _config(table, rules, source)


def _config(table: AttentionTable, rules: tuple[Rule, ...], source: str) -> AttentionConfig:
    given = {name: getattr(table, name) for name in table.model_fields_set}
    moba = None if table.moba is None else MoBA(table.moba.chunk_size, table.moba.top_k)
    lists = {
        "rules": rules,
        "thresholds": tuple(sorted(table.thresholds.items())),
        "forbid_adapters": tuple(sorted(table.forbid_adapters)),
    }
    try:
        return AttentionConfig(**{**given, **lists, "moba": moba, "source": source})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_names(key: str, names: Any, known: set[str], source: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{source}: {key}: unknown name {name!r}{nearest(name, known)}")


def _rule(rule: RuleTable, source: str) -> Rule:
    when = rule.when
    ranges = {name: _range(name, value, source) for name, value in when.ranges().items()}
    try:
        condition = Condition(
            platform=when.platform,
            kind=when.kind,
            mode=tuple(Mode.parse(mode) for mode in when.mode),
            dtype=when.dtype,
            mask=when.mask,
            **ranges,
        )
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    return Rule(condition, rule.use, tuple(sorted(rule.tiling.items())), source)


def _range(name: str, value: Any, source: str) -> Range:
    try:
        return Range.parse(value)
    except ConfigError as error:
        raise ConfigError(f"{source}: when.{name}: {error}") from error


def _problem(detail: ErrorDetails, keys: Mapping[str, tuple[str, ...]]) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        table = next((str(part) for part in reversed(detail["loc"][:-1]) if not isinstance(part, int)), "attention")
        return f"unknown key {where!r}{nearest(str(detail['loc'][-1]), keys[table])}"
    return f"{where}: {detail['msg'].lower()}, got {detail['input']!r}"
