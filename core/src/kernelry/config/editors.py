"""The JSON schema of a config file, by which editors complete and check it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernelry.config.layer import SIZES
from kernelry.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import JsonValue

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(*, table: str = "attention") -> dict[str, JsonValue]:
    """Returns the JSON schema, draft 2020-12, of the files that `load_config` reads.

    `load_config` refuses every file that the schema rejects. The schema cannot say everything: that kv_heads divide
    q_heads, for one, is checked when the file is read. Editors offer the installed kernels; other names are valid.

    Args:
      table: as of `load_config`: the table about attention; other tables are not described, and may be anything.

    Returns:
      Plain data for `json.dump`.

    Raises:
      ConfigError: the name of the table is not text, or is empty in part.
    """
    if not isinstance(table, str) or not all(table.split(".")):
        raise ConfigError(f"table must be a name such as 'attention' or 'model.attention', got {table!r}.")
    from pydantic.json_schema import GenerateJsonSchema  # imported here, as configs made in Python do not need it

    from kernelry.config import schema

    class _Untitled(GenerateJsonSchema):
        """Without the titles that pydantic makes of the names of keys."""

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    attention = schema.AttentionTable.model_json_schema(schema_generator=_Untitled)
    shared = attention.pop("$defs")
    attention["allOf"] = [_only_with(size, type_.value) for size, type_ in SIZES.items()]
    described: dict[str, Any] = {"$ref": "#/$defs/AttentionTable"}
    for name in reversed(table.split(".")):
        described = {"type": "object", "properties": {name: described}}
    return {
        "$schema": _DIALECT,
        "title": "The config of an attention layer",
        "description": "Read by kernelry.config.load_config.",
        **described,
        "$defs": {"AttentionTable": attention, **shared},
    }


def _only_with(size: str, type_: str) -> dict[str, Any]:
    """A size that one type needs, and that no other type takes."""
    return {
        "if": {"properties": {"type": {"const": type_}}, "required": ["type"]},
        "then": {"properties": {size: {"not": {"type": "null"}}}, "required": [size]},
        "else": {"properties": {size: {"type": "null"}}},
    }
