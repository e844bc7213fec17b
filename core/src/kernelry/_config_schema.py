"""The shape of a config's attention table, for pydantic; imported only when a config is read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kernelry.policy import AUTO


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
RangeText = int | str


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class WhenTable(_Table):
    """Conditions of a rule."""

    platform: Names = ()
    kind: Names = ()
    mode: Names = ()
    q_len: RangeText | None = None
    kv_len: RangeText | None = None
    batch: RangeText | None = None
    head_dim: RangeText | None = None
    dtype: Names = ()
    mask: Names = ()

    def ranges(self) -> dict[str, RangeText]:
        """The conditions on numbers that are given."""
        found = {name: getattr(self, name) for name in ("q_len", "kv_len", "batch", "head_dim")}
        return {name: value for name, value in found.items() if value is not None}


class RuleTable(_Table):
    """One rule."""

    when: WhenTable = WhenTable()
    use: Names
    tiling: dict[str, int] = Field(default_factory=dict)


class AttentionTable(_Table):
    """The whole table."""

    kernel: str = AUTO
    rules: tuple[RuleTable, ...] = ()
    thresholds: dict[str, int] = Field(default_factory=dict)
    forbid_adapters: tuple[str, ...] = ()


KEYS = {
    "attention": tuple(AttentionTable.model_fields),
    "rules": tuple(RuleTable.model_fields),
    "when": tuple(WhenTable.model_fields),
}
