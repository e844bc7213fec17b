"""Models by name: the numbers of well-known configs that say what attention is."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernelry.errors import ConfigError, followed, nearest
from kernelry.models.model import Model


@functools.cache
def named_configs() -> Mapping[str, Mapping[str, Any]]:
    """The configs by name, with the keys of Hugging Face's config.json that are about attention.

    Source: the published config.json of each model: of `mistral-7b` that of v0.1, whose window later ones leave out.
    """
    file = importlib.resources.files("kernelry.models").joinpath("shapes.json")
    found: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def model_from(source: str) -> Model:
    """Reads the model of a file, a folder or a name.

    Args:
      source: the path of a config.json, or of a folder that has one; or a name of `named_configs`.

    Raises:
      ConfigError: there is neither, or the config cannot be read.
    """
    from kernelry.models import from_huggingface  # imported here, because it imports the tables of all families

    if Path(source).exists():
        return from_huggingface(source)
    if source not in named_configs():
        unknown = f"there is no file {source!r}, and no model of that name{nearest(source, named_configs())}"
        raise ConfigError(followed(unknown, "a file is a config.json, or a folder that has one."))
    model = from_huggingface(named_configs()[source])
    kinds = (
        dataclasses.replace(kind, config=dataclasses.replace(kind.config, source=f"{source}: {kind.name}"))
        for kind in model.kinds
    )
    return dataclasses.replace(model, source=source, kinds=tuple(kinds))
