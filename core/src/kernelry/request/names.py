"""The names by which a Request keeps dtypes and precisions."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kernelry.errors import ArgumentError, nearest


def named_dtype(dtype: Any) -> Any:
    """The name of a dtype that is given as NumPy or JAX have it, e.g. `jnp.bfloat16`; anything else as it is."""
    if not isinstance(dtype, type | np.dtype) or getattr(dtype, "__module__", "") == "builtins":
        return dtype  # Python's float and int say no width
    try:
        return dtype_name(dtype)
    except TypeError:
        return dtype


def dtype_name(dtype: Any) -> str:
    """Returns a dtype's canonical name, e.g. `bfloat16`."""
    return str(np.dtype(dtype).name)


def precision_name(precision: str | jax.lax.Precision | None) -> str | None:
    """Returns the name of a precision, e.g. `highest`; None for JAX's default.

    Raises:
      ArgumentError: it is none.
    """
    try:
        known = jax.lax.Precision(precision)
    except (ValueError, TypeError):
        names = [member.name.lower() for member in jax.lax.Precision]
        raise ArgumentError(f"unknown precision {precision!r}{nearest(str(precision), names)}") from None
    return None if known is jax.lax.Precision.DEFAULT else known.name.lower()
