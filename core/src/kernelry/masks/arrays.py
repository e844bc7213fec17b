"""What masks do with the arrays they carry: checks, and a text that can be pasted back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._values import unwrapped
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks.side import ArrayLike

_SHOWN = 64
"""Elements; larger arrays are shown by dtype and shape."""

_INT32 = np.iinfo(np.int32)


def is_array(value: Any) -> bool:
    """True for arrays of NumPy and JAX."""
    return isinstance(value, jax.Array | np.ndarray)


def as_array(value: Any) -> ArrayLike:
    """NumPy unless it is JAX's already; unwrapped."""
    value = unwrapped(value)
    return value if is_array(value) else np.asarray(value)


def as_integers(name: str, value: Any, ranks: tuple[int, ...]) -> ArrayLike:
    """Checks an integer array, and makes a NumPy one int32, as JAX would silently.

    Raises:
      ShapeError: not integers, or the wrong rank.
      ArgumentError: a number does not fit int32.
    """
    array = as_array(value)
    if isinstance(value, list | tuple) and array.size == 0:
        array = array.astype(np.int32)  # NumPy reads an empty list as floats
    if array.ndim not in ranks or not jnp.issubdtype(array.dtype, jnp.integer):
        wanted = " or ".join(str(rank) for rank in ranks)
        raise ShapeError(f"{name} must be integers of rank {wanted}, got {array.dtype} of shape {array.shape}.")
    if isinstance(array, jax.Array) or array.dtype == np.int32:
        return array
    if array.size and not (array.min() >= _INT32.min and array.max() <= _INT32.max):
        raise ArgumentError(
            f"{name} must fit int32, got {array.min()} … {array.max()}: number them anew, e.g. with numpy.unique."
        )
    return array.astype(np.int32)


def as_limits(name: str, value: Any) -> ArrayLike:
    """Checks an integer or integers [B] that positions are compared with, and clips them to int32.

    Raises:
      ShapeError: not integers, or the wrong rank.
    """
    array = as_array(value)
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.dtype != np.int32:
        array = np.clip(array, _INT32.min, _INT32.max).astype(np.int32)  # no slot and no position is beyond
    elif str(array.dtype) in ("int64", "uint32", "uint64"):
        # Compared with int32, JAX would wrap uint32, and an int64 made of a Python number, which is weakly typed.
        least = 0 if str(array.dtype).startswith("u") else _INT32.min
        array = jnp.clip(array, least, _INT32.max).astype(jnp.int32)
    return as_integers(name, array, (0, 1))


def as_booleans(name: str, value: Any, instead: str) -> ArrayLike:
    """Checks a boolean array of rank 4 at most, and gives it four dimensions.

    Raises:
      ShapeError: not booleans, or more than four dimensions.
    """
    array = as_array(value)
    if array.dtype != np.bool_:
        raise ShapeError(f"{name} must be boolean, got {array.dtype}; {instead}")
    if array.ndim > 4:
        raise ShapeError(f"{name} must have four dimensions at most, got rank {array.ndim}.")
    return with_rank_4(array)


def with_rank_4(array: ArrayLike) -> ArrayLike:
    """Puts dimensions of 1 before the others."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def module_of(*arrays: ArrayLike) -> ModuleType:
    """Numpy where all arrays are NumPy's, else jax.numpy."""
    return np if all(isinstance(array, np.ndarray | np.generic) for array in arrays) else jnp


def missing_axes(name: str, shape: tuple[int, ...], full: tuple[int, ...]) -> str:
    """A hint where an array that should broadcast to B N T S has the batch first and no axis of heads."""
    batch, _, q_len, kv_len = full
    while shape[:1] == (1,):
        shape = shape[1:]
    if shape == (batch, q_len, kv_len):
        return f"; for [B, T, S] write {name}[:, None]"
    if shape == (batch, kv_len):
        return f"; for [B, S] write {name}[:, None, None]"
    return ""


def check_rows(name: str, array: ArrayLike, batch: int, length: int) -> None:
    """Checks per-slot values.

    Raises:
      ShapeError: neither [length] nor [batch, length].
    """
    rows = array.shape[0] if array.ndim == 2 else 1
    if array.shape[-1] != length or rows not in (1, batch):
        raise ShapeError(f"{name} must be [{batch}, {length}] or [{length}], got shape {array.shape}.")


def check_limits(name: str, limits: ArrayLike, batch: int) -> None:
    """Checks one number for all rows, or one for each.

    Raises:
      ShapeError: neither a number nor [batch].
    """
    if limits.shape not in ((), (batch,)):
        raise ShapeError(f"{name} must be a number or [B] = [{batch}], got shape {limits.shape}.")


def described(array: Any) -> str:
    """A small array as nested lists, which constructors read; dtype and shape of any other."""
    if not hasattr(array, "shape"):  # a sentinel inside a pytree
        return repr(array)
    if isinstance(array, jax.core.Tracer) or array.size > _SHOWN:
        return f"<{array.dtype}{list(array.shape)}>"
    return repr(np.asarray(array).tolist())


def filled(value: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array of booleans or int32 that holds one value everywhere, and takes the memory of that one.

    Raises:
      ArgumentError: no array can have this shape.
    """
    one = np.asarray(value, bool if isinstance(value, bool) else np.int32)
    try:
        return np.broadcast_to(one, shape)
    except (ValueError, OverflowError) as error:
        raise ArgumentError(f"no array of a mask can have the shape {shape}; ask for smaller sizes.") from error


def signed(ids: ArrayLike) -> ArrayLike:
    """Ids of a type that has room for −1."""
    return ids.astype(jax.dtypes.canonicalize_dtype(jnp.promote_types(ids.dtype, jnp.int32)))


def padded(array: ArrayLike, axis: int, more: int) -> ArrayLike:
    """Puts `more` zeros behind an axis, unless it is 1 and holds for every slot."""
    if not more or array.shape[axis] == 1:
        return array
    widths = [(0, more if place == axis else 0) for place in range(array.ndim)]
    return module_of(array).pad(array, widths)


def read_booleans(values: Any) -> ArrayLike:
    """Reads the zeros and ones of an expression."""
    array = np.asarray(values)
    if not np.isin(array, (0, 1)).all():
        raise ArgumentError(f"write 1 for visible and 0 for hidden, got {array.tolist()}.")
    return array.astype(bool)


def read_slots(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reads `name(0, 0, 1)` as one array, `name([0, 0], [0, 1])` as two."""
    numbers = [isinstance(value, int) for value in values]
    if not any(numbers):
        return values
    if not all(numbers):
        raise ArgumentError("write either whole numbers or lists: segments(0, 0, 1) or segments([0, 0], [0, 1]).")
    return (np.asarray(values),)
