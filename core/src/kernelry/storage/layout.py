"""How keys and values are stored relative to each other."""

from __future__ import annotations

import dataclasses
from typing import Any, final

from kernelry._pytree import pytree
from kernelry.errors import ShapeError
from kernelry.storage.paged import PagedArray

SEPARATE = "separate"
VALUE_IN_KEY = "value_in_key"
INTERLEAVED = "interleaved"
KV_LAYOUTS = (SEPARATE, VALUE_IN_KEY, INTERLEAVED)
"""Every layout there is, as requests and kernels name them."""


@final
@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class ValueInKey:
    """Given in place of values that are stored with the keys.

    With keys [B, S, K, H], value[b, s, k] is key[b, s, k, :width]: absorbed multi-head latent attention (DeepSeek's
    MLA), where H = 576 and width = 512. Of a key that is quantised, the value has the scale. With a PagedArray that is
    `interleaved`, which holds a value for each key, width is H.

    Args:
      width: D, the head dim of the values.

    Raises:
      ShapeError: the width is not a positive integer.
    """

    width: int

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise ShapeError(f"ValueInKey: width must be a positive integer, got {self.width!r}.")


def kv_layout_of(key: Any, value: Any) -> str:
    """How keys and values are stored relative to each other; of them only the kinds are looked at."""
    if not isinstance(value, ValueInKey):
        return SEPARATE
    return INTERLEAVED if isinstance(key, PagedArray) and key.interleaved else VALUE_IN_KEY


def value_dim_of(value: Any) -> int:
    """D."""
    return value.width if isinstance(value, ValueInKey) else value.shape[3]
