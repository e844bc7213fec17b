"""The shape of a config's attention table, for pydantic; imported only when a config is read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kernelry.kernel.spec import AUTO


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Count = Annotated[int, Field(strict=True, ge=1)]
Threshold = Annotated[int, Field(strict=True, ge=0)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class WhenTable(_Table):
    """The conditions of a rule; `AnyRange.parse` reads the numbers."""

    platform: Names = ()
    kind: Names = ()
    mode: Names = ()
    q_len: Any = None
    kv_len: Any = None
    batch: Any = None
    groups: Any = None
    head_dim: Any = None
    dtype: Names = ()
    mask: Names = ()


class RuleTable(_Table):
    """One rule."""

    when: WhenTable = WhenTable()
    use: Names
    tiling: dict[str, Count] = Field(default_factory=dict)


class MoBATable(_Table):
    """Mixture of block attention."""

    chunk_size: Count
    top_k: Count


class AttentionTable(_Table):
    """The whole table; the options of the layer are Any here, as AttentionConfig checks them."""

    kernel: str = AUTO
    rules: tuple[RuleTable, ...] = ()
    thresholds: dict[str, Threshold] = Field(default_factory=dict)
    forbid_adapters: tuple[str, ...] = ()
    type: Any = None
    window: Any = None
    chunk_size: Any = None
    block_size: Any = None
    soft_cap: Any = None
    scale: Any = None
    sinks: Any = None
    bias: Any = None
    bias_after_cap: Any = None
    q_heads: Any = None
    kv_heads: Any = None
    head_dim: Any = None
    value_dim: Any = None
    moba: MoBATable | None = None
    record_max_logits: Any = None
    dropout_rate: Any = None
    logits_dtype: Any = None
    precision: Any = None
    tilings: dict[str, dict[str, Count]] = Field(default_factory=dict)
    sharding: Any = None


KEYS = {
    "attention": tuple(AttentionTable.model_fields),
    "rules": tuple(RuleTable.model_fields),
    "moba": tuple(MoBATable.model_fields),
    "when": tuple(WhenTable.model_fields),
}
