"""Empty storage, and writing tokens into it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernelry.errors import ArgumentError, ShapeError
from kernelry.storage import Quantization, QuantizedArray
from kernelry.storage.quantized import Stored


def empty(shape: tuple[int, ...], dtype: Any, storage: str | Quantization | None) -> Stored:
    """Zeros [..., K, H], quantised where `storage` says how."""
    if storage is None:
        return jnp.zeros(shape, _floating(dtype))
    how = Quantization.parse(storage)
    heads = shape[-2] if how.axis == "head_dim" else 1
    return QuantizedArray(jnp.zeros(shape, how.dtype), jnp.ones((*shape[:-2], heads, 1), jnp.bfloat16))


def _floating(dtype: Any) -> np.dtype:
    try:
        found: np.dtype = jnp.dtype(dtype)
    except TypeError:
        raise ArgumentError(f"dtype must be that of the queries, e.g. bfloat16, got {dtype!r}.") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ArgumentError(
            f"dtype must be floating, as the queries are, got {found}; to quantise keys and values pass storage=."
        )
    return found


def stored_like(array: Float[Array, ...], like: Stored) -> Stored:
    """Converts new tokens to the dtype or quantisation of a cache's."""
    if isinstance(like, QuantizedArray):
        return QuantizedArray.quantize(array, like.quantization, scale_dtype=like.scale.dtype)
    return array.astype(like.dtype)


def write(
    stored: Stored,
    new: Float[Array, "B T K H"],
    rows: Int[Array, "#B #T"],
    slots: Int[Array, "B T"],
    kept: Bool[Array, "B T"],
) -> Stored:
    """Writes new[b, t] into stored[rows[b, t], slots[b, t]] where `kept`; nothing else changes."""
    slots = jnp.where(kept, slots, stored.shape[1])  # beyond the end, where mode="drop" writes nothing

    def put(into: jax.Array, what: jax.Array) -> jax.Array:
        return into.at[rows, slots].set(what, mode="drop")

    written: Stored = jax.tree.map(put, stored, stored_like(new, stored))
    return written


def write_first(stored: Stored, new: Float[Array, "B T K H"]) -> Stored:
    """Writes new[:, t] into stored[:, t]: T tokens at the start of every row, in one copy."""

    def put(into: jax.Array, what: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(into, what, 0, axis=1)

    written: Stored = jax.tree.map(put, stored, stored_like(new, stored))
    return written


def varying_as(like: Any, tree: Any) -> Any:
    """Makes arrays vary over the manual axes of a `shard_map` as others do; without a mesh returns them as they are.

    What a later call writes makes them vary, and the carry of a `lax.scan` must do so from its start.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    from kernelry.execution import manual_axes

    return manual_axes.varying_as(like, tree)


def token_counts(lengths: Any, batch: int, tokens: int) -> Int[Array, " B"]:
    """How many of the T tokens that a call passes for each row count; None means all.

    Raises:
      ShapeError: lengths are not integers [B].
      ArgumentError: outside of jit, one is not in [0, T]; under jit they are clipped.
    """
    if lengths is None:
        return jnp.full(batch, tokens, jnp.int32)
    found = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if found.shape != (batch,) or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ShapeError(f"lengths must be integers [B] = [{batch}], got {found.dtype} of shape {found.shape}.")
    if is_known(found):
        known = np.asarray(found)  # NumPy, because under jit JAX would trace operations on constants, too
        if ((known < 0) | (known > tokens)).any():
            raise ArgumentError(
                f"lengths must lie in [0, {tokens}], the tokens passed for a row, got {known.tolist()}."
            )
    return jnp.clip(jnp.asarray(found, jnp.int32), 0, tokens)


def check_sizes(name: str, **sizes: Any) -> None:
    """Checks the sizes of a new cache.

    Raises:
      ArgumentError: one is not an integer ≥ 1.
    """
    for what, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ArgumentError(f"{name}: {what} must be an integer ≥ 1, got {size!r}.")


def bytes_of(tree: Any) -> int:
    """The bytes of all arrays in a tree, with small integers packed."""
    return sum(-(-leaf.size * _bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(tree))


def _bits(dtype: np.dtype) -> int:
    if not jnp.issubdtype(dtype, jnp.integer):
        return 8 * dtype.itemsize
    return int(jnp.iinfo(dtype).bits)  # type: ignore[no-untyped-call]


def check_tokens(key: Any, value: Any, like: tuple[Stored, Stored], batch: int) -> None:
    """Checks tokens to be written against a cache of [B, S, K, H] and [B, S, K, D].

    Raises:
      ShapeError: they do not fit.
    """
    for name, array, own in (("key", key, like[0]), ("value", value, like[1])):
        if not isinstance(array, jax.Array | np.ndarray) or not jnp.issubdtype(array.dtype, jnp.floating):
            found = getattr(array, "dtype", type(array).__name__)
            raise ShapeError(f"{name} must be a floating array [B, T, …], got {found}.")
        wanted = tuple(own.shape[-2:])
        if array.ndim != 4 or array.shape[0] != batch or tuple(array.shape[2:]) != wanted:
            raise ShapeError(
                f"{name} must be [B, T, {wanted[0]}, {wanted[1]}] with B={batch}, got shape {array.shape}."
            )
    if key.shape[1] != value.shape[1]:
        raise ShapeError(f"key has T={key.shape[1]} tokens and value {value.shape[1]}.")


def is_known(array: jax.Array | np.ndarray) -> bool:
    """Whether the numbers of an array are known: False for arrays traced under jit."""
    return not isinstance(array, jax.core.Tracer)
