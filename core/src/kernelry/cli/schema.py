"""The verb `schema`: prints the JSON schema of config files."""

from __future__ import annotations

from typing import Annotated

import typer

from kernelry.cli.output import print_json
from kernelry.config import json_schema


def schema(
    table: Annotated[str, typer.Option(help="The table about attention, e.g. model.attention.")] = "attention",
) -> None:
    """The JSON schema of TOML and YAML configs, by which editors complete and check them."""
    print_json(json_schema(table=table))
