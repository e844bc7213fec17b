"""Empty storage, and writing tokens into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernelry.errors import ArgumentError, ShapeError, nearest
from kernelry.policy.scope import current_scope
from kernelry.storage import INTERLEAVED, KV_LAYOUTS, VALUE_IN_KEY, Quantization, QuantizedArray
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
    pages: Int[Array, "B T"],
    slots: Int[Array, "B T"],
    kept: Bool[Array, "B T"],
) -> Stored:
    """Writes new[b, t] into stored[pages[b, t], slots[b, t]] where `kept`; nothing else changes."""

    def put(stored: Stored, new: jax.Array, pages: jax.Array, slots: jax.Array, kept: jax.Array) -> Stored:
        slots = jnp.where(kept, slots, stored.shape[1])  # beyond the end, where mode="drop" writes nothing
        written: Stored = jax.tree.map(
            lambda into, what: into.at[pages, slots].set(what, mode="drop"), stored, stored_like(new, stored)
        )
        return written

    return sharded_like(stored, put, stored, new, pages, slots, kept)


def write_rows(
    stored: Stored, new: Float[Array, "B T K H"], slots: Int[Array, "B T"], kept: Bool[Array, "B T"]
) -> Stored:
    """Writes new[b, t] into stored[b, slots[b, t]] where `kept`; nothing else changes.

    Each row is a batch of the scatter, so that XLA cuts it over rows without sending any.
    """

    def put(stored: Stored, new: jax.Array, slots: jax.Array, kept: jax.Array) -> Stored:
        slots = jnp.where(kept, slots, stored.shape[1])[..., None]
        written: Stored = jax.tree.map(
            lambda into, what: jax.lax.scatter(into, slots, what, _ROW_BY_ROW, mode="drop"),
            stored,
            stored_like(new, stored),
        )
        return written

    return sharded_like(stored, put, stored, new, slots, kept)


_ROW_BY_ROW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(1,),
    scatter_dims_to_operand_dims=(1,),
    operand_batching_dims=(0,),
    scatter_indices_batching_dims=(0,),
)


def write_first(stored: Stored, new: Float[Array, "B T K H"]) -> Stored:
    """Writes new[:, t] into stored[:, t]: T tokens at the start of every row, in one copy."""
    copy = _selected if _cuts_slots(stored) else _copied
    return sharded_like(stored, copy, stored, new)


def _copied(stored: Stored, new: jax.Array) -> Stored:
    written: Stored = jax.tree.map(
        lambda into, what: jax.lax.dynamic_update_slice_in_dim(into, what, 0, axis=1), stored, stored_like(new, stored)
    )
    return written


def varying_as(like: Any, tree: Any) -> Any:
    """Makes arrays vary over the manual axes of a `shard_map` as others do; without a mesh returns them as they are.

    What a later call writes makes them vary, and the carry of a `lax.scan` must do so from its start.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    from kernelry.execution import manual_axes

    return manual_axes.varying_as(like, tree)


def _selected(stored: Stored, new: jax.Array) -> Stored:
    """The same slot by slot: to copy a slice over slots of several devices XLA would gather all of them."""
    tokens, slots = new.shape[1], stored.shape[1]
    is_new = (jnp.arange(slots) < tokens)[None, :, None, None]
    padded = stored_like(jnp.pad(new, [(0, 0), (0, slots - tokens), (0, 0), (0, 0)]), stored)
    written: Stored = jax.tree.map(lambda into, what: jnp.where(is_new, what, into), stored, padded)
    return written


def _cuts_slots(stored: Stored) -> bool:
    """Whether slots are on several devices, as far as a scope or explicit mesh axes say so."""
    said = current_scope().sharding
    if said is not None and (said.sequence if said.kv_sequence is None else said.kv_sequence):
        return True
    return any(jax.typeof(array).sharding.spec[1] is not None for array in jax.tree.leaves(stored))


_R = TypeVar("_R")


def sharded_like(like: _R, run: Callable[..., _R], *arrays: Any) -> _R:
    """Returns run(*arrays), whose arrays have the shapes of `like`'s, and where mesh axes are explicit its shardings.

    What runs is left to XLA to partition: JAX does not say how a scatter over a dimension that is cut is sharded.
    """
    shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, like)
    kinds = {kind for sharding in jax.tree.leaves(shardings) for kind in sharding.mesh.axis_types}
    if jax.sharding.AxisType.Explicit not in kinds:
        return run(*arrays)
    found: _R = jax.sharding.auto_axes(run, out_sharding=shardings)(*arrays)
    return found


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


def counts_like(rows: Int[Array, " B"], lengths: Any, tokens: int) -> Int[Array, " B"]:
    """The `token_counts` of rows, sharded as they are."""
    counts = token_counts(lengths, rows.shape[0], tokens)
    return sharded_like(rows, lambda array: array, counts)


def check_sizes(name: str, **sizes: Any) -> None:
    """Checks the sizes of a new cache.

    Raises:
      ArgumentError: one is not an integer ≥ 1.
    """
    for what, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ArgumentError(f"{name}: {what} must be an integer ≥ 1, got {size!r}.")


def check_layout(name: str, layout: Any, head_dim: int, value_dim: int, storage: Any) -> None:
    """Checks how a new cache is to store keys and values relative to each other.

    Raises:
      ArgumentError: the layout is unknown, or does not go with the sizes or the storage.
    """
    if not isinstance(layout, str) or layout not in KV_LAYOUTS:
        raise ArgumentError(f"{name}: unknown layout {layout!r}{nearest(str(layout), KV_LAYOUTS)}")
    if layout == VALUE_IN_KEY and value_dim > head_dim:
        raise ArgumentError(
            f"{name}: with layout={layout!r} values are the first columns of the keys, so value_dim={value_dim} must "
            f"not be larger than head_dim={head_dim}."
        )
    if layout == INTERLEAVED and value_dim != head_dim:
        raise ArgumentError(
            f"{name}: layout={layout!r} needs value_dim = head_dim={head_dim}, got {value_dim}; use 'separate'."
        )
    if layout == INTERLEAVED and storage is not None:
        raise ArgumentError(
            f"{name}: with layout={layout!r} pages are not quantised, got storage={str(storage)!r}; use 'separate'."
        )


def interleaved(key: jax.Array, value: jax.Array) -> jax.Array:
    """Keys and values [B, T, K, H] as interleaved pages hold them, [B, T, 2·K, H]."""
    pairs = jnp.stack([key, value], axis=3)
    return pairs.reshape(*key.shape[:2], -1, key.shape[3])


def bytes_of(tree: Any) -> int:
    """The bytes of all arrays in a tree, with small integers packed."""
    return sum(-(-leaf.size * _bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(tree))


def _bits(dtype: np.dtype) -> int:
    if not jnp.issubdtype(dtype, jnp.integer):
        return 8 * dtype.itemsize
    return int(jnp.iinfo(dtype).bits)  # type: ignore[no-untyped-call]


def check_tokens(key: Any, value: Any, wanted: tuple[Sequence[int], Sequence[int]], batch: int) -> None:
    """Checks tokens to be written into a cache; `wanted` are (K, H) and (K, D).

    Raises:
      ShapeError: they do not fit.
    """
    for name, array, own in (("key", key, wanted[0]), ("value", value, wanted[1])):
        _check_token_array(name, array, own, batch)
    if key.shape[1] != value.shape[1]:
        raise ShapeError(f"key has T={key.shape[1]} tokens and value {value.shape[1]}.")


def check_keys_alone(key: Any, value: Any, wanted: Sequence[int], batch: int) -> None:
    """Checks tokens to be written into a cache whose values are in the keys; `wanted` is (K, H).

    Raises:
      ShapeError: they do not fit, or there is a value.
    """
    _check_token_array("key", key, wanted, batch)
    if value is not None:
        found = getattr(value, "shape", type(value).__name__)
        raise ShapeError(
            f"value must be None: the cache has layout={VALUE_IN_KEY!r}, so values are the first columns of the keys, "
            f"got {found}."
        )


def _check_token_array(name: str, array: Any, wanted: Sequence[int], batch: int) -> None:
    if not isinstance(array, jax.Array | np.ndarray) or not jnp.issubdtype(array.dtype, jnp.floating):
        found = getattr(array, "dtype", type(array).__name__)
        raise ShapeError(f"{name} must be a floating array [B, T, …], got {found}.")
    if array.ndim != 4 or array.shape[0] != batch or tuple(array.shape[2:]) != tuple(wanted):
        raise ShapeError(f"{name} must be [B, T, {wanted[0]}, {wanted[1]}] with B={batch}, got shape {array.shape}.")


def is_known(array: jax.Array | np.ndarray) -> bool:
    """Whether the numbers of an array are known: False for arrays traced under jit."""
    return not isinstance(array, jax.core.Tracer)
