"""Checks a mask against the call it is for."""

from __future__ import annotations

from kernelry.errors import ShapeError
from kernelry.masks.base import At, Extent, Mask, children


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
        ahead = max(kv_len - q_len, 0) if type(q_len) is type(kv_len) is int else f"{kv_len} - {q_len}"
        raise ShapeError(
            f"mask={mask!r} compares positions, but query has length T={q_len} and key has S={kv_len}: "
            f"say where the queries stand, e.g. mask.at(query_offset={ahead})."
        )
