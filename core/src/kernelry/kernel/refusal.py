"""A coded reason why a kernel cannot serve a request, or is not chosen for it unless it is named."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, final


@final
class RefusalCode(enum.Enum):
    """Why a kernel says no. Adapters are found by these codes; none cures EXPERIMENTAL, which is a reservation."""

    __hash__ = object.__hash__  # by identity, as members compare

    PLATFORM = "platform"
    GENERATION = "generation"
    MODE = "mode"
    DTYPE = "dtype"
    HEAD_DIM = "head_dim"
    SPLIT_HEAD_DIM = "split_head_dim"
    HEAD_GROUPS = "head_groups"
    UNEQUAL_LENGTHS = "unequal_lengths"
    SEQUENCE_LENGTH = "sequence_length"
    EMPTY_ARRAY = "empty_array"
    SYMBOLIC_SIZE = "symbolic_size"
    MASK_ATOM = "mask_atom"
    POSITIONS = "positions"
    EMPTY_ROWS = "empty_rows"
    HIDDEN_SLOTS = "hidden_slots"
    SCALE = "scale"
    BIAS = "bias"
    SOFT_CAP = "soft_cap"
    BIAS_AFTER_CAP = "bias_after_cap"
    SINKS = "sinks"
    DROPOUT = "dropout"
    GRADIENT = "gradient"
    STATISTICS_GRADIENT = "statistics_gradient"
    NORMALIZATION = "normalization"
    LOGITS_DTYPE = "logits_dtype"
    PRECISION = "precision"
    STATISTICS = "statistics"
    MAX_LOGITS = "max_logits"
    KV_QUANTIZATION = "kv_quantization"
    PAGES = "pages"
    KV_LAYOUT = "kv_layout"
    CONTEXT_PARALLEL = "context_parallel"
    SHARDING = "sharding"
    EXPERIMENTAL = "experimental"
    VENDOR_MISSING = "vendor_missing"
    VENDOR_VERSION = "vendor_version"
    VENDOR_DECLINES = "vendor_declines"
    DRIVER = "driver"
    NOT_INSTALLED = "not_installed"
    TILING = "tiling"
    FAULT = "fault"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why a kernel cannot serve a request, or, as a reservation, why `auto` does not choose it.

    Args:
      code: the kind of reason.
      detail: the reason with its values, e.g. `head_dim=192 > 128`.
      remedy: what the user can do about it, e.g. a pip command; None when nothing.
      pad_to: the nearest larger sizes that the kernel takes, by request field, e.g.
        `(("q_len", 256),)`; from these the padding adapters know how far to pad.
    """

    code: RefusalCode
    detail: str
    remedy: str | None = None
    pad_to: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.detail}; {self.remedy}" if self.remedy else self.detail

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        plain = {"code": self.code.value, "detail": self.detail, "remedy": self.remedy}
        return {**plain, "pad_to": dict(self.pad_to)}
