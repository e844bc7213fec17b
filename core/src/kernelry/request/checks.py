"""Checks the values of a Request's fields, before anything is derived from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Set
from typing import Any

import jax.numpy as jnp

from kernelry._values import SymbolicSize
from kernelry.errors import ArgumentError, nearest
from kernelry.storage import INTERLEAVED, KV_LAYOUTS, SEPARATE, VALUE_IN_KEY

SYMBOLIC = ("batch", "q_len", "kv_len")
"""The sizes that may be symbolic."""

_SIZES = ("batch", "q_len", "kv_len", "q_heads", "kv_heads", "head_dim", "value_dim")
_BEYOND = 2**63
DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Of the arrays that attention is computed in."""

_DTYPES = ("dtype", "logits_dtype")


def check_sizes(request: Any) -> None:
    """Raises ArgumentError where a size is not an integer or negative, or the heads do not fit."""
    for name in _SIZES:
        size = getattr(request, name)
        if type(size) is not int and not (name in SYMBOLIC and isinstance(size, SymbolicSize)):
            raise ArgumentError(f"{name} must be an integer, got {size!r}.")
    if min(request.batch, request.q_len, request.kv_len, request.head_dim, request.value_dim) < 0:
        raise ArgumentError(
            f"batch={request.batch}, q_len={request.q_len}, kv_len={request.kv_len}, head_dim={request.head_dim} and "
            f"value_dim={request.value_dim} must not be negative."
        )
    for name in _SIZES:
        if getattr(request, name) >= _BEYOND:
            raise ArgumentError(f"{name} must be below 2**63, as the dimensions of arrays are.")
    if request.kv_heads < 1 or request.q_heads < 1 or request.q_heads % request.kv_heads:
        raise ArgumentError(f"kv_heads={request.kv_heads} must divide q_heads={request.q_heads}.")


def check_kinds(request: Any, flags: Iterable[str]) -> None:
    """Raises ArgumentError where a name is not a string, a flag not a bool, or a number not a number."""
    if not isinstance(request.normalization, str):
        raise ArgumentError(f"normalization must be a name, got {request.normalization!r}.")
    for name in _DTYPES:
        dtype = getattr(request, name)
        if not isinstance(dtype, str) or not is_dtype(dtype):
            raise ArgumentError(f"{name} must be the name of a dtype, e.g. bfloat16, got {dtype!r}{spelled(dtype)}.")
    for name in flags:
        if type(getattr(request, name)) is not bool:
            raise ArgumentError(f"{name} must be True or False, got {shown(getattr(request, name))}.")
    if request.precision is not None and not isinstance(request.precision, str):
        raise ArgumentError(f"precision must be a name or None, got {request.precision!r}.")
    _check_numbers(request)
    _check_bias(request)


@functools.lru_cache(maxsize=64)
def is_dtype(name: str) -> bool:
    """True for the full names of dtypes: `float32`, not `f4`, by which no kernel would know it."""
    try:
        return bool(jnp.dtype(name).name == name)
    except (TypeError, ValueError):
        return False


_SPELLINGS = {"fp": "float", "bf": "bfloat", "f": "float"}
_WIDTHS = ("16", "32", "64")


def spelled(dtype: Any) -> str:
    """What to write instead of another name of a dtype: `; write 'float32'` for `fp32`; empty where it is none."""
    if not isinstance(dtype, str):
        return ""
    word = dtype.strip().lower()
    short = word.rstrip("0123456789")
    full = _SPELLINGS.get(short, short) + word[len(short) :]
    try:
        name = full if word.endswith(_WIDTHS) and is_dtype(full) else str(jnp.dtype(dtype).name)
    except (TypeError, ValueError):
        return ""
    return "" if name == dtype else f"; write {name!r}"


def is_finite(value: Any) -> bool:
    """True for Python's finite numbers, of a size that a float has."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _check_numbers(request: Any) -> None:
    for name in ("scale", "dropout_rate", "soft_cap"):
        number = getattr(request, name)
        if name == "soft_cap" and number is None:
            continue
        if not is_finite(number):
            raise ArgumentError(f"{name} must be a finite number, got {number!r}.")
    if not 0 <= request.dropout_rate < 1:
        raise ArgumentError(f"dropout_rate must be in [0, 1), got {request.dropout_rate}.")
    if request.soft_cap is not None and request.soft_cap <= 0:
        raise ArgumentError(f"soft_cap must be positive, got {request.soft_cap}; pass None for no cap.")
    check_sinks(request.sinks, request.partial)


def check_sinks(sinks: bool, partial: bool) -> None:
    """Raises ArgumentError where attention to a part of the keys is given sinks."""
    if sinks and partial:
        raise ArgumentError(
            "sinks join the denominator once, at the end: pass them to kernelry.finalize, not to parts."
        )


def shown(value: Any) -> str:
    """A value as it is written; an array by its shape, since a Request holds none."""
    return f"an array of shape {value.shape}" if hasattr(value, "shape") else repr(value)


def _check_bias(request: Any) -> None:
    if request.bias is None:
        return
    full: Mapping[str, int] = {"B": request.batch, "N": request.q_heads, "T": request.q_len, "S": request.kv_len}
    shape = request.bias
    fits = isinstance(shape, tuple) and len(shape) == len(full)
    if not fits or not all(
        type(have) in (int, SymbolicSize) and have in (1, want) for have, want in zip(shape, full.values(), strict=True)
    ):
        sizes = " ".join(f"{name}={size}" for name, size in full.items())
        raise ArgumentError(f"bias must be its shape, each dimension 1 or that of {sizes}, got {shown(shape)}.")


def check_storage(request: Any, differentiated: Set[Any]) -> None:
    """Raises ArgumentError where pages do not make up S, or stored keys and values should have a gradient."""
    _check_layout(request, frozenset(operand.value for operand in differentiated))
    size = request.page_size
    if size is not None and (type(size) is not int or size < 1 or _leaves_a_rest(request.kv_len, size)):
        raise ArgumentError(f"page_size must be a positive integer that divides kv_len={request.kv_len}, got {size!r}.")
    if differentiated and not request.has_plain_keys:
        names = ", ".join(sorted(operand.value for operand in differentiated))
        how = "quantised" if request.kv_quantization else "in pages"
        raise ArgumentError(f"gradients names {names}, but keys and values are {how} and have none; pass plain arrays.")


def _check_layout(request: Any, differentiated: Set[str]) -> None:
    layout, head_dim, value_dim = request.kv_layout, request.head_dim, request.value_dim
    if not isinstance(layout, str) or layout not in KV_LAYOUTS:
        raise ArgumentError(f"unknown kv_layout {shown(layout)}{nearest(str(layout), KV_LAYOUTS)}")
    if layout == SEPARATE:
        return
    if layout == VALUE_IN_KEY and not 0 < value_dim <= head_dim:
        raise ArgumentError(
            f"kv_layout={layout}: values are the first columns of the keys, so value_dim={value_dim} must be 1 … "
            f"head_dim={head_dim}."
        )
    if layout == INTERLEAVED and (request.page_size is None or request.kv_quantization or value_dim != head_dim):
        raise ArgumentError(
            f"kv_layout={layout} needs page_size, no kv_quantization, and value_dim = head_dim; got page_size="
            f"{request.page_size}, kv_quantization={request.kv_quantization}, head_dim={head_dim}, "
            f"value_dim={value_dim}."
        )
    if "value" in differentiated:
        raise ArgumentError(
            f"gradients names value, and with kv_layout={layout} the values are a part of the keys: name key, whose "
            "gradient has both shares."
        )


def _leaves_a_rest(length: int, size: int) -> bool:
    return not isinstance(length, SymbolicSize) and length % size != 0
