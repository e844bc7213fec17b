"""How the kit holds keys and values: quantised, in shuffled pages, with nonsense where no row may look.

Written in NumPy from what the storage types mean, and with nothing that they do: neither their quantisation nor their
gathering is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.storage import PagedArray, Quantization, QuantizedArray
from kernelry.testing.reference import reference_mask

TABLE = "table"
"""The name of the table among the arrays of a call whose keys and values stand in pages."""

_Held: TypeAlias = "np.ndarray | QuantizedArray"

_LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
_SCALE_DTYPES = {"head_dim": "bfloat16", "heads_and_head_dim": "float32"}
"""Both are served, so both are tried."""

_SEED = 3


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Sight:
    """What the rows of a call see.

    Args:
      dead: [B, T, N, 1], queries that see nothing.
      hidden: [B, S, K, 1], slots that no row sees.
    """

    dead: np.ndarray
    hidden: np.ndarray

    @classmethod
    def of(cls, call: Any) -> Sight:
        """Looks through the mask of a call."""
        visible = reference_mask(call.mask, call.batch, call.q_heads, call.q_len, call.kv_len)
        groups = (call.batch, call.kv_heads, call.q_heads // call.kv_heads, call.q_len, call.kv_len)
        hidden = ~np.swapaxes(np.any(visible.reshape(groups), axis=(2, 3)), 1, 2)[..., None]
        return cls(~np.swapaxes(np.any(visible, axis=3), 1, 2)[..., None], hidden)


def quantized(array: np.ndarray, how: str) -> QuantizedArray:
    """Rounds [..., K, H] to values · scale; qwix need not be there."""
    kind = Quantization.parse(how)
    axes = (-1,) if kind.axis == "head_dim" else (-2, -1)
    largest = _LARGEST[kind.dtype]
    scale = (np.abs(array).max(axis=axes, keepdims=True, initial=0) / largest).astype(_SCALE_DTYPES[kind.axis])
    values = np.clip(array / np.where(scale == 0, 1, scale.astype(np.float64)), -largest, largest)
    whole = np.rint(values) if kind.dtype.startswith("int") else values
    return QuantizedArray(whole.astype(kind.dtype), scale)  # type: ignore[arg-type]  # NumPy until it is given


def numbers(held: _Held) -> np.ndarray:
    """What is held, float64."""
    if isinstance(held, QuantizedArray):
        return np.asarray(held.values, np.float64) * np.asarray(held.scale, np.float64)
    return np.asarray(held, np.float64)


def poisoned(held: _Held, hidden: np.ndarray) -> _Held:
    """Puts NaN and inf into hidden slots; a scale that a visible head needs stays."""
    if not isinstance(held, QuantizedArray):
        return np.asarray(_where_hidden(hidden, held))
    shared = held.scale.shape[-2] != held.values.shape[-2]
    unseen = hidden.all(axis=-2, keepdims=True) if shared else hidden
    return QuantizedArray(_where_hidden(hidden, held.values), _where_hidden(unseen, held.scale))


def _where_hidden(hidden: Any, array: Any) -> Any:
    odd = np.arange(array.shape[1]).reshape(1, -1, 1, 1) % 2 == 1
    infinite = np.where(odd, np.inf, np.nan) if _has_infinity(array.dtype) else _nonsense(array.dtype)
    return np.where(hidden, np.asarray(infinite).astype(array.dtype), array)


def _has_infinity(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and bool(np.isinf(np.asarray(np.inf).astype(dtype)))


def _nonsense(dtype: Any) -> float:
    return float("nan") if jnp.issubdtype(dtype, jnp.floating) else float(jnp.iinfo(dtype).max)  # type: ignore[no-untyped-call]


def in_pages(key: _Held, value: _Held, page_size: int, hidden: np.ndarray) -> dict[str, Any]:
    """Cuts keys and values into pages: those pages in no order, and their table.

    The first and the last page belong to nobody and hold NaN, so that an index clamped or wrapped shows. Every other
    page that no row sees is absent.
    """
    batch, kv_len = hidden.shape[:2]
    rng = np.random.default_rng(_SEED)
    table = 1 + rng.permutation(batch * kv_len // page_size).reshape(batch, -1)
    held = {"key": key, "value": value}
    pages = {name: jax.tree.map(lambda leaf: _cut(leaf, table, page_size), whole) for name, whole in held.items()}
    unseen = hidden.all(axis=(2, 3)).reshape(*table.shape, page_size).all(axis=2)
    alternate = np.add.outer(*map(np.arange, table.shape)) % 2 == 0
    return {**pages, TABLE: np.where(unseen & alternate, -1, table).astype(np.int32)}


def _cut(whole: np.ndarray, table: np.ndarray, page_size: int) -> np.ndarray:
    nothing = np.asarray(_nonsense(whole.dtype)).astype(whole.dtype)
    pages = np.full((table.size + 2, page_size, *whole.shape[2:]), nothing)
    pages[table] = whole.reshape(*table.shape, page_size, *whole.shape[2:])
    return pages


def as_given(arrays: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Query, key and value as `kernelry.attention` takes them."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    if TABLE not in arrays:
        return query, key, value
    return query, PagedArray(key, arrays[TABLE]), PagedArray(value, arrays[TABLE])
