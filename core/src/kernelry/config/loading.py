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
splash = { block_q = 1024 }           # where that kernel is chosen; a rule's tiling takes precedence

[attention.sharding]                  # on a mesh; or a text: sharding = "batch=data,fsdp sequence=context ring"
batch = ["data", "fsdp"]
sequence = "context"
strategy = "ring"

[[attention.rules]]                   # the first rule that applies decides
when = { platform = "gpu", mode = ["train", "prefill"], q_len = ">=128", mask = ["window"] }
use = ["pallas_mha", "auto"]          # exhaustive unless it ends in "auto"
tiling = { block_q = 64 }
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelry.config.layer import AttentionConfig, MoBA
from kernelry.config.lines import Keys, TableLines, toml_lines, yaml_lines
from kernelry.config.maxtext import Caller, merged, read_options
from kernelry.errors import ConfigError, nearest, sentence
from kernelry.execution.adapters.order import ADAPTERS
from kernelry.policy.rules import RANGES, AnyRange, Condition, Rule
from kernelry.policy.shipped import SHIPPED_THRESHOLDS
from kernelry.request.request import Mode

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from kernelry.config.schema import AttentionTable, RuleTable


def load_config(
    source: str | Path | Mapping[str, Any], *, table: str = "attention", required: bool = False
) -> AttentionConfig:
    """Reads a config from a TOML or YAML file, or from a mapping.

    Args:
      source: a path ending in .toml, .yaml or .yml, or the content of the table itself,
        or a mapping that contains the table.
      table: the table of the file that is about attention; other tables are ignored. A dotted
        name is that of a table inside another; an absent table means the defaults.
      required: whether an absent table is an error instead.

    Returns:
      The validated config.

    Raises:
      ConfigError: the file cannot be read, or a key or value is wrong; the message names the file,
        the line, the key, what was found and the nearest valid name; for a mapping, the key.
    """
    if not isinstance(source, str | Path | Mapping) or not isinstance(table, str):
        raise ConfigError(f"load_config takes a path or a mapping, and a table's name, got {source!r} and {table!r}.")
    if isinstance(source, Mapping):
        inner = source.get(table)
        return _validated(inner if isinstance(inner, Mapping) else source, TableLines("config"))
    path = Path(source)
    content, lines = _read(path)
    location = TableLines(str(path), lines)
    for name in table.split("."):
        content = _inside(content, name, table, location, required=required)
        location = TableLines(location.name, lines, (*location.table, name))
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{location.at()}: [{table}] must be a table, got {content!r}; MaxText's own files are read by "
            "load_maxtext, or by the command's option --maxtext."
        )
    return _validated(content, location)


def load_maxtext(*paths: str | Path, ignore: Iterable[str] = ()) -> AttentionConfig:
    """Reads MaxText's YAML files, later ones over earlier ones, as `from_maxtext` reads their options.

    Of logical_axis_rules, a later file's replace those of the same names, or all with override_logical_axis_rules.

    Args:
      *paths: one or more, e.g. base.yml and a model's file.
      ignore: names of options to leave out, as if no file had them.

    Raises:
      ConfigError: a file cannot be read, or an option is not supported.
    """
    if not paths or not all(isinstance(path, str | Path) for path in paths):
        given = ", ".join(map(repr, paths)) or "nothing"
        raise ConfigError(
            f"load_maxtext takes the paths of MaxText's files, got {given}; pass a mapping to from_maxtext."
        )
    return read_maxtext(paths, ignore, Caller.PYTHON, stacklevel=3)


def read_maxtext(
    paths: Sequence[str | Path], ignore: Iterable[str], caller: Caller, *, stacklevel: int = 2
) -> AttentionConfig:
    """Does what `load_maxtext` does, with messages for Python or for the command."""
    names, options = maxtext_options(paths)
    try:
        config, notices = read_options(options, ignore, caller)
    except ConfigError as error:
        raise ConfigError(f"{names}: {error}") from error
    for notice in notices:
        warnings.warn(f"{names}: {notice}", stacklevel=stacklevel)
    return dataclasses.replace(config, source=names)


def maxtext_options(sources: Sequence[str | Path | Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Reads MaxText's options, later sources over earlier ones.

    Args:
      sources: paths of YAML files, and mappings of option names to values.

    Returns:
      Names of the sources, and the options.

    Raises:
      ConfigError: a file cannot be read, or has no options.
    """
    places = ["options" if isinstance(source, Mapping) else str(source) for source in sources if source != {}]
    names = " + ".join(dict.fromkeys(places)) or "options"
    options: dict[str, Any] = {}
    for source in sources:
        content = source if isinstance(source, Mapping) else _maxtext_file(Path(source))
        options = merged(options, content)
    return names, options


def _maxtext_file(path: Path) -> Mapping[str, Any]:
    if path.suffix not in (".yaml", ".yml"):
        others = "others are read by load_config, or by the command without --maxtext"
        raise ConfigError(f"{path}: MaxText's files are YAML, .yml or .yaml; {others}.")
    content, _ = _read(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} must have MaxText's option names and values, got {content!r}.")
    return content


def _inside(content: Any, name: str, table: str, location: TableLines, *, required: bool) -> Any:
    """Returns the table of a name, empty where it is absent and not required; a misspelt one is an error."""
    if not isinstance(content, Mapping) or name in content:
        return content[name] if isinstance(content, Mapping) else content
    for found in difflib.get_close_matches(name, [key for key in content if isinstance(key, str)], n=1, cutoff=0.8):
        raise ConfigError(f"{location.at(found)}: unknown table {found!r}; did you mean {name!r}?")
    if required:
        found = ", ".join(map(str, content)) or "nothing"
        raise ConfigError(
            f"{location.name}: there is no table [{table}]; found instead: {found}. Write one, even if it is only "
            f"the line [{table}], or name the file that has it."
        )
    return {}


def _read(path: Path) -> tuple[Any, dict[Keys, int]]:
    """Reads a file, and the lines of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8.") from error
    except ValueError as error:  # a character that names of files cannot have
        raise ConfigError(f"cannot read the config {str(path)!r}: {error}.") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text), toml_lines(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path, text)
    raise ConfigError(f"{path}: unknown kind of config {path.suffix!r}; use .toml, .yaml or .yml.")


def _read_yaml(path: Path, text: str) -> tuple[Any, dict[Keys, int]]:
    import yaml  # imported here, as TOML files do not need it

    try:
        return yaml.safe_load(text) or {}, yaml_lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error


def _validated(content: Mapping[str, Any], location: TableLines) -> AttentionConfig:
    import pydantic  # imported here, as configs made in Python do not need it

    from kernelry.config import schema

    try:
        table = schema.AttentionTable.model_validate(dict(content))
    except pydantic.ValidationError as error:
        problems = [sentence(_problem(detail, schema.KEYS, location)) for detail in error.errors()]
        raise ConfigError(" ".join(problems)) from error
    _check_names("thresholds", table.thresholds, {threshold.name for threshold in SHIPPED_THRESHOLDS}, location)
    _check_names("forbid_adapters", table.forbid_adapters, {adapter.name for adapter in ADAPTERS}, location)
    rules = tuple(_rule(rule, index, location) for index, rule in enumerate(table.rules))
    return _config(table, rules, location)


def _config(table: AttentionTable, rules: tuple[Rule, ...], location: TableLines) -> AttentionConfig:
    given = {name: getattr(table, name) for name in table.model_fields_set}
    moba = None if table.moba is None else MoBA(table.moba.chunk_size, table.moba.top_k)
    lists = {
        "rules": rules,
        "thresholds": tuple(sorted(table.thresholds.items())),
        "forbid_adapters": tuple(sorted(table.forbid_adapters)),
    }
    source = location.at("kernel") if "kernel" in given else location.name
    try:
        return AttentionConfig(**{**given, **lists, "moba": moba, "source": source})
    except ConfigError as error:
        raise ConfigError(f"{location.at(*_named_by(str(error), given))}: {error}") from error


def _named_by(message: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that lead to what a message is about: it names them first, or the type that needs an absent option."""
    words = iter(re.findall(r"\w+", message))
    named = next((word for word in words if word in given), None)
    if named is None:
        return ()
    table = given[named]
    inner = next((word for word in words if word in table), None) if isinstance(table, Mapping) else None
    return (named,) if inner is None else (named, inner)


def _check_names(key: str, names: Any, known: set[str], location: TableLines) -> None:
    for index, name in enumerate(names):
        if name not in known:
            where = location.at(key, name if isinstance(names, Mapping) else index)
            raise ConfigError(f"{where}: {key}: unknown name {name!r}{nearest(name, known)}")


def _rule(rule: RuleTable, index: int, location: TableLines) -> Rule:
    source = f"{location.at('rules', index)}: rule {index + 1}"
    facts: dict[str, Any] = {}
    for name in sorted(rule.when.model_fields_set):
        where = f"{location.at('rules', index, 'when', name)}: rule {index + 1}"
        facts[name] = _fact(name, getattr(rule.when, name), where)
    try:
        return Rule(Condition(**facts), rule.use, tuple(sorted(rule.tiling.items())), source)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(source) else f"{source}: {message}") from error


def _fact(name: str, value: Any, where: str) -> Any:
    """Reads one condition, and checks it alone, so that an error can name its line."""
    try:
        if name in RANGES:
            return None if value is None else AnyRange.parse(value)
        read: Any = tuple(Mode.parse(mode) for mode in value) if name == "mode" else value
        Condition(**{name: read})
    except ValueError as error:
        message = str(error).removeprefix(f"when.{name}: ")
        raise ConfigError(f"{where}: when.{name}: {message}") from error
    return read


def _problem(detail: ErrorDetails, keys: Mapping[str, tuple[str, ...]], location: TableLines) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    line = location.at(*detail["loc"])
    if detail["type"] == "extra_forbidden":
        table = next((str(part) for part in reversed(detail["loc"][:-1]) if not isinstance(part, int)), "attention")
        return f"{line}: unknown key {where!r}{nearest(str(detail['loc'][-1]), keys[table])}"
    return f"{line}: {where}: {detail['msg'].lower()}, got {detail['input']!r}"
