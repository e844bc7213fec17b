"""The config file of a run."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from kernelry.config import AttentionConfig, load_config
from kernelry.errors import ConfigError, nearest

LAYER_KINDS = ("local", "global")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """[model]: the shape of the decoder."""

    layers: tuple[str, ...] = ("local", "global")
    window: int = 64
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 352
    tied: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for kind in self.layers:
            if kind not in LAYER_KINDS:
                raise ConfigError(f"model.layers: unknown kind {kind!r}{nearest(str(kind), LAYER_KINDS)}")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """[training]: how long, on how much, how fast."""

    seq_len: int = 512
    batch: int = 4
    steps: int = 300
    learning_rate: float = 3e-3
    warmup: int = 20
    evaluate_every: int = 20
    evaluation_windows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch", "steps", "evaluate_every", "evaluation_windows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} must be at least 1, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """[generation]: what to continue after training, and how."""

    prompt: str = "The"
    length: int = 256
    temperature: float = 0.6

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("generation.prompt must not be empty: the first byte is predicted from it.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole config file."""

    name: str = "run"
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    generation: GenerationSettings = GenerationSettings()
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a TOML file.

        Raises:
          ConfigError: the file cannot be read, or a key or value is wrong.
        """
        attention = load_config(path)  # validates [attention] and that the file can be read
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(**{**_read(cls, content, str(path)), "attention": attention})


_TABLES = {"model": ModelSettings, "training": TrainingSettings, "generation": GenerationSettings}


def _read(cls: type, content: Any, source: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{source}: expected a table, got {content!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(key, fields)}")
        table = _TABLES.get(key) if cls is Settings else None
        values[key] = value if table is None else table(**_read(table, value, f"{source}: [{key}]"))
        if table is None and key != "attention":
            _check(value, fields[key].default, f"{source}: {key}")
    return values


def _check(value: Any, default: Any, where: str) -> None:
    """A value has the type of its default; a float may be written as an int."""
    wanted = (int, float) if isinstance(default, float) else list if isinstance(default, tuple) else type(default)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ConfigError(f"{where} must be like {default!r}, got {value!r}.")
