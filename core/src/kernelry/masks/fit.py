"""Reads what a call gives as its mask, and checks it against the call."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, cast

import numpy as np

from kernelry._values import unwrapped
from kernelry.errors import ShapeError
from kernelry.masks.arrays import is_array
from kernelry.masks.band import Full
from kernelry.masks.base import Extent, Mask, is_mask
from kernelry.masks.composition import At, canonical_of, children
from kernelry.masks.dense import Dense
from kernelry.masks.form import MaskForm


def as_mask(mask: Any, extent: Extent) -> Mask:
    """Returns the mask that is meant: None is `Full()`, an unmistakable boolean array is `Dense`.

    Raises:
      ShapeError: it is neither, or booleans that could be read in two ways.
    """
    if is_mask(mask):
        return cast(Mask, mask)
    if mask is None:
        return Full()
    array = unwrapped(mask)
    if not is_array(array) or array.dtype != np.bool_:
        raise ShapeError(f"mask must be a kernelry mask, got {not_a_mask(mask)}.")
    full = (extent.batch, extent.q_heads, extent.q_len, extent.kv_len)
    per_row = array.shape == (extent.batch, extent.kv_len) and extent.batch != 1
    if array.ndim != 4 and (array.shape != full[2:] or per_row):
        raise ShapeError(
            f"mask as a boolean array must be [T, S] or broadcast to B N T S = {full}, got shape {array.shape}; for "
            "[B, S] write mask[:, None, None], for [B, T, S] mask[:, None], for [T, S] mask[None, None]."
        )
    return Dense(array)


def not_a_mask(value: Any) -> str:
    """Says what was given in a mask's place, and what to write."""
    if isinstance(value, type) and Mask in value.__mro__:
        return f"the class {value.__name__}; write {_constructed(value)}"
    if isinstance(value, str):
        return f"{value!r}{_by_name(value)}"
    array = unwrapped(value)
    if not is_array(array):
        return _no_array(array)
    if array.dtype == np.bool_:
        return f"booleans of shape {array.shape}; write masks.Dense(array)"
    if array.ndim == 2 and np.issubdtype(array.dtype, np.integer):
        return (
            f"{array.dtype} of shape {array.shape}; for segment ids write masks.Segments(ids), for padding of 0 and 1 "
            "[B, S] array[:, None, None] > 0, for 0 and 1 [T, S] masks.Dense(array > 0)"
        )
    return (
        f"{array.dtype} of shape {array.shape}; for 0 and 1 write masks.Dense(array > 0), numbers to add to the "
        "logits are bias="
    )


def _no_array(value: Any) -> str:
    if isinstance(value, bool):
        return f"{value}; without a mask every key is seen, and masks.Causal() hides those after the query"
    if isinstance(value, list | tuple) and value and all(is_mask(part) for part in value):
        return f"a {type(value).__name__} of masks; compose them with &, e.g. {' & '.join(map(repr, value[:2]))}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}; write jnp.asarray(mask)"
    name = type(value).__name__
    return f"{name}; write masks.Predicate(fn)" if callable(value) else f"{name}; masks are in kernelry.masks"


def _constructed(mask: type) -> str:
    fields = dataclasses.fields(mask) if dataclasses.is_dataclass(mask) else ()
    needs = any(field.init and field.default is dataclasses.MISSING for field in fields)
    return f"masks.{mask.__name__}({'…' if needs else ''})"


def _by_name(text: str) -> str:
    from kernelry import masks  # here, because it imports this package

    known = {name.lower(): getattr(masks, name) for name in masks.__all__ if is_mask_class(getattr(masks, name))}
    close = difflib.get_close_matches(text.lower().replace("_", ""), known, n=1)
    return f"; write {_constructed(known[close[0]])}" if close else "; masks are in kernelry.masks"


def is_mask_class(value: Any) -> bool:
    """True for the classes of masks, without the protocol itself."""
    return isinstance(value, type) and Mask in value.__mro__ and value is not Mask


def canonical_for(mask: Any, extent: Extent) -> tuple[MaskForm, tuple[Mask, ...]]:
    """Reads what a call gives as its mask: its form and, aligned with the form's atoms, the conjunction that it is.

    Raises:
      ShapeError: it is not a mask, an array does not fit, or a positional mask meets T ≠ S without `.at`.
    """
    meant = as_mask(mask, extent)
    check_fits(meant, extent)
    return canonical_of(meant)


def check_fits(mask: Mask, extent: Extent) -> None:
    """Checks a mask and everything inside against the call.

    Raises:
      ShapeError: an array does not fit, or a positional mask meets T ≠ S without `.at`.
    """
    check_located(mask, extent.q_len, extent.kv_len)
    _check_arrays(mask, extent)


def _check_arrays(mask: Mask, extent: Extent) -> None:
    if isinstance(mask, At):
        for name, where, length in (("query", mask.query, extent.q_len), ("kv", mask.kv, extent.kv_len)):
            if where is not None:
                where.check(name, extent.batch, length)
    inside = children(mask)
    for part in inside:
        _check_arrays(part, extent)
    if not inside:
        mask.check(extent)


def check_located(mask: Mask, q_len: int, kv_len: int) -> None:
    """Checks that positional masks say where the queries stand, where that is not plain.

    Raises:
      ShapeError: T ≠ S without `.at`.
    """
    if q_len == kv_len or isinstance(mask, At):
        return
    inside = children(mask)
    for part in inside:
        check_located(part, q_len, kv_len)
    if mask.positional and not inside:
        known = type(q_len) is type(kv_len) is int
        ahead = max(kv_len - q_len, 0) if known else f"{kv_len} - {q_len}"
        in_torchs_order = known and q_len > kv_len
        hint = "; arrays [B, heads, tokens, H], as in torch, go through .swapaxes(1, 2)" if in_torchs_order else ""
        raise ShapeError(
            f"mask={mask!r} compares positions, but query has length T={q_len} and key has S={kv_len}: "
            f"say where the queries stand, e.g. mask.at(query_offset={ahead}){hint}."
        )
