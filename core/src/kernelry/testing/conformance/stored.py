"""How the kit stores keys and values: quantised, in shuffled pages, and with NaN in slots that no row may see.

Written in NumPy from the definition of the storage types: neither their quantisation nor their gathering is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.storage import PagedArray, Quantization, QuantizedArray, ValueInKey
from kernelry.testing.reference import reference_mask

TABLE = "table"
"""The name of the table among the arrays of a call with paged keys and values."""

_Stored: TypeAlias = "np.ndarray | QuantizedArray | ValueInKey"

_LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
_SCALE_DTYPES = {"head_dim": "bfloat16", "heads_and_head_dim": "float32"}
"""Both dtypes of scales are supported, so both are tried."""

_SEED = 3


@final
@dataclasses.dataclass(frozen=True, slots=True)
class MaskedOut:
    """What the mask of a call hides altogether.

    Args:
      queries: [B, T, N, 1], those that see nothing.
      slots: [B, S, K, 1], those that no query sees.
    """

    queries: np.ndarray
    slots: np.ndarray

    @classmethod
    def of(cls, call: Any) -> MaskedOut:
        """Evaluates the mask of a call."""
        visible = reference_mask(call.mask, call.batch, call.q_heads, call.q_len, call.kv_len)
        groups = (call.batch, call.kv_heads, call.q_heads // call.kv_heads, call.q_len, call.kv_len)
        slots = ~np.swapaxes(np.any(visible.reshape(groups), axis=(2, 3)), 1, 2)[..., None]
        return cls(~np.swapaxes(np.any(visible, axis=3), 1, 2)[..., None], slots)


def quantized(array: np.ndarray, how: str) -> QuantizedArray:
    """Rounds [..., K, H] to values · scale, without qwix."""
    kind = Quantization.parse(how)
    axes = (-1,) if kind.axis == "head_dim" else (-2, -1)
    largest = _LARGEST[kind.dtype]
    scale = (np.abs(array).max(axis=axes, keepdims=True, initial=0) / largest).astype(_SCALE_DTYPES[kind.axis])
    values = np.clip(array / np.where(scale == 0, 1, scale.astype(np.float64)), -largest, largest)
    whole = np.rint(values) if kind.dtype.startswith("int") else values
    return QuantizedArray(whole.astype(kind.dtype), scale)  # type: ignore[arg-type]  # NumPy until `AttentionCall.arrays` converts it


def numbers(stored: _Stored) -> np.ndarray:
    """The numbers that are stored, float64."""
    if isinstance(stored, QuantizedArray):
        return np.asarray(stored.values, np.float64) * np.asarray(stored.scale, np.float64)
    return np.asarray(stored, np.float64)


def poisoned(stored: _Stored, hidden: np.ndarray) -> _Stored:
    """Puts NaN and inf into hidden slots, but not into a scale that a visible head needs."""
    if isinstance(stored, ValueInKey):
        return stored
    if not isinstance(stored, QuantizedArray):
        return np.asarray(_where_hidden(hidden, stored))
    shared = stored.scale.shape[-2] != stored.values.shape[-2]
    unseen = hidden.all(axis=-2, keepdims=True) if shared else hidden
    return QuantizedArray(_where_hidden(hidden, stored.values), _where_hidden(unseen, stored.scale))


def _where_hidden(hidden: Any, array: Any) -> Any:
    odd = np.arange(array.shape[1]).reshape(1, -1, 1, 1) % 2 == 1
    infinite = np.where(odd, np.inf, np.nan) if _has_infinity(array.dtype) else _nan_or_largest(array.dtype)
    return np.where(hidden, np.asarray(infinite).astype(array.dtype), array)


def _has_infinity(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and bool(np.isinf(np.asarray(np.inf).astype(dtype)))


def _nan_or_largest(dtype: Any) -> float:
    return float("nan") if jnp.issubdtype(dtype, jnp.floating) else float(jnp.iinfo(dtype).max)  # type: ignore[no-untyped-call]


def in_pages(key: _Stored, value: _Stored, page_size: int, hidden: np.ndarray) -> dict[str, Any]:
    """Cuts keys and values into pages: returns those pages, shuffled, and their table.

    The first and the last page are in no row and contain NaN, so that clamped and wrapped indices show. Every other
    page that no row sees is absent.
    """
    batch, kv_len = hidden.shape[:2]
    rng = np.random.default_rng(_SEED)
    table = 1 + rng.permutation(batch * kv_len // page_size).reshape(batch, -1)
    stored = {"key": key, "value": value}
    pages = {name: jax.tree.map(lambda leaf: _cut(leaf, table, page_size), whole) for name, whole in stored.items()}
    unseen = hidden.all(axis=(2, 3)).reshape(*table.shape, page_size).all(axis=2)
    alternate = np.add.outer(*map(np.arange, table.shape)) % 2 == 0
    return {**pages, TABLE: np.where(unseen & alternate, -1, table).astype(np.int32)}


def together_in_pages(key: np.ndarray, value: np.ndarray, page_size: int, hidden: np.ndarray) -> dict[str, Any]:
    """The same in interleaved pages: row 2k of a slot is the key of head k, row 2k + 1 its value."""
    alternating = np.empty((*key.shape[:2], 2 * key.shape[2], key.shape[3]), key.dtype)
    alternating[:, :, 0::2], alternating[:, :, 1::2] = key, value
    found = in_pages(alternating, ValueInKey(key.shape[3]), page_size, hidden)
    return {"key": PagedArray(found["key"], found.pop(TABLE), interleaved=True), "value": found["value"]}


def _cut(whole: np.ndarray, table: np.ndarray, page_size: int) -> np.ndarray:
    nothing = np.asarray(_nan_or_largest(whole.dtype)).astype(whole.dtype)
    pages = np.full((table.size + 2, page_size, *whole.shape[2:]), nothing)
    pages[table] = whole.reshape(*table.shape, page_size, *whole.shape[2:])
    return pages


def as_given(arrays: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Query, key and value as `kernelry.attention` takes them."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    if TABLE not in arrays:
        return query, key, value
    paged = value if isinstance(value, ValueInKey) else PagedArray(value, arrays[TABLE])
    return query, PagedArray(key, arrays[TABLE]), paged
