"""What a call is given: query, key and value, however they are held, and the options besides arrays and mask.

Both are checked here, and make the Request.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernelry._values import size_of, unwrapped
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks.form import MaskForm
from kernelry.request.checks import is_finite, spelled
from kernelry.request.names import dtype_name, precision_name
from kernelry.request.request import Mode, Operand, Request
from kernelry.request.target import Target
from kernelry.storage import PagedArray, QuantizedArray, ValueInKey, kv_layout_of, value_dim_of

Keys: TypeAlias = "jax.Array | QuantizedArray | PagedArray"
"""What key and value may be."""

Values: TypeAlias = "Keys | ValueInKey"
"""What value may be."""

_LAYOUTS = {"query": "[B, T, N, H]", "key": "[B, S, K, H]", "value": "[B, S, K, D]"}


def as_array(name: str, array: Any, rank: int) -> jax.Array:
    """Returns a floating array, unwrapped.

    Raises:
      ShapeError: it is not an array, not floating, or of another rank.
    """
    if not isinstance(array, jax.Array):
        array = unwrapped(array)
    if not isinstance(array, jax.Array | np.ndarray):
        raise ShapeError(f"{name} must be an array, got {type(array).__name__}{_instead(name, array)}.")
    if array.ndim != rank:
        layout = _LAYOUTS.get(name, "[N]")
        raise ShapeError(f"{name} must be {layout}, rank {rank}, got shape {array.shape}{_reshaped(name, array)}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ShapeError(f"{name} must be floating, got {array.dtype}; cast it, e.g. {name}.astype(jnp.bfloat16).")
    return jnp.asarray(array)


def _instead(name: str, value: Any) -> str:
    """What to write in place of a value that is not an array."""
    if isinstance(value, list | tuple):
        return f"; write jnp.asarray({name})"
    if isinstance(value, ValueInKey):
        return "; it says that values are stored with the keys: pass it as value, and the keys as key"
    if isinstance(value, jax.ShapeDtypeStruct):
        return "; shapes without values go through jax.eval_shape(kernelry.attention, …), facts into a kernelry.Request"
    if hasattr(value, "attend"):
        return "; a cache attends by itself: cache.attend(query, …)"
    if hasattr(value, "__dlpack__"):
        return f"; write jnp.from_dlpack({name})"
    return ""


def _reshaped(name: str, array: Any) -> str:
    """How an array of another rank becomes one of four dimensions."""
    if name not in _LAYOUTS:
        return ""
    if array.ndim == 3:
        one_head = "" if name == "query" else f"; one head without an axis is {name}[:, :, None]"
        return f"; without a batch write query[None], key[None], value[None], and take [0] of the result{one_head}"
    if array.ndim == 5 and name == "query":
        return "; heads in groups [B, T, K, G, H] are query.reshape(B, T, K * G, H)"
    return ""


def as_keys(name: str, keys: Any) -> Keys:
    """Returns keys or values as they are held.

    Raises:
      ShapeError: they are none of these, or of another rank.
    """
    if not isinstance(keys, QuantizedArray | PagedArray):
        return as_array(name, keys, 4)
    if keys.ndim != 4:
        raise ShapeError(f"{name} must be {_LAYOUTS[name]}, rank 4, got {keys!r}.")
    return keys


def as_values(values: Any) -> Values:
    """Returns values as they are held, by themselves or with the keys.

    Raises:
      ShapeError: as for `as_keys`.
    """
    return values if isinstance(values, ValueInKey) else as_keys("value", values)


def known_length(name: str, array: Any) -> int:
    """Returns the length of an array [B, L, …] where it must be a number, as for the slots of a cache.

    Raises:
      ShapeError: it is symbolic.
    """
    length = array.shape[1]
    if not isinstance(length, int):
        raise ShapeError(
            f"{name} must have a length that is a number, got shape {tuple(array.shape)}: only its batch may be "
            "symbolic; export the program for a number."
        )
    return length


def cast_finite(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts floats; what is finite stays so: −1e300 becomes float32's least number, for −inf would hide."""
    if jnp.finfo(array.dtype).max <= jnp.finfo(dtype).max:  # type: ignore[no-untyped-call]
        return array.astype(dtype)
    most = jnp.asarray(jnp.finfo(dtype).max, array.dtype)  # type: ignore[no-untyped-call]
    return jnp.where(jnp.isfinite(array), jnp.clip(array, -most, most), array).astype(dtype)


_NARROW = {"int64": jnp.int32, "uint64": jnp.uint32, "float64": jnp.float32}


_IDS = ("query_ids", "kv_ids", "query_spans", "kv_spans")
"""The fields of masks that are compared for equality alone."""


def narrowed(tree: Any) -> Any:
    """Arrays of 64-bit numbers in 32 bits; others as they are.

    Lengths, positions and places of pages beyond 32 bits become the largest or the least number. An id beyond them is
    mixed from its bits: ids that differ stay apart, but for one pair in 2³¹, and a negative one stays negative.
    """
    return jax.tree_util.tree_map_with_path(_narrowed, tree)


def _narrowed(path: tuple[Any, ...], array: Any) -> Any:
    if not hasattr(array, "dtype") or str(array.dtype) not in _NARROW:
        return array
    narrow = _NARROW[str(array.dtype)]
    if narrow == jnp.float32:
        return cast_finite(array, jnp.float32)
    if getattr(path[-1], "name", None) in _IDS:
        mixed = (array ^ (array >> 31) * 0x9E3779B1) & (2**31 - 1)
        return jnp.where(array < 0, -1, mixed).astype(jnp.int32)
    ends = jnp.iinfo(narrow)  # type: ignore[no-untyped-call]
    return jnp.clip(array, ends.min, ends.max).astype(narrow)


def checked_qkv(query: Any, key: Any, value: Any) -> tuple[jax.Array, Keys, Values]:
    """Returns query, key and value, unwrapped.

    Raises:
      ShapeError: one of them is none of its kind, or they do not go together.
    """
    q, k, v = as_array("query", query, 4), as_keys("key", key), as_values(value)
    if isinstance(v, ValueInKey) or (isinstance(k, PagedArray) and k.interleaved):
        _check_stored_together(k, v)
        _check_together(q, k, k)
    else:
        _check_alike(k, v)
        _check_together(q, k, v)
    return q, k, v


def _check_stored_together(key: Keys, value: Values) -> None:
    head_dim = key.shape[3]
    interleaved = isinstance(key, PagedArray) and key.interleaved
    if not isinstance(value, ValueInKey):
        raise ShapeError(
            f"key is {key!r}, which holds the values, too: pass ValueInKey({head_dim}) as value, got "
            f"{_described(value)}."
        )
    if interleaved and value.width != head_dim:
        raise ShapeError(
            f"key is {key!r}, whose values have its head dim: pass ValueInKey({head_dim}) as value, got {value!r}."
        )
    if type(head_dim) is int and value.width > head_dim:
        raise ShapeError(
            f"value is {value!r}, the first columns of key, which has only head dim H={head_dim}: got key "
            f"{_described(key)}."
        )


def _check_together(query: jax.Array, key: Keys, value: Keys) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if any(type(size) is not int for size in array.shape[2:]):
            raise ShapeError(f"{name} may have a symbolic batch and length, not heads and head dim, got {array.shape}.")
    for name, array in (("key", key), ("value", value)):
        plain = array.pages if isinstance(array, PagedArray) else array
        if not isinstance(plain, QuantizedArray) and plain.dtype != query.dtype:
            raise ShapeError(
                f"{name} must have query's dtype {query.dtype}, got {plain.dtype}; write {name}.astype(query.dtype)."
            )
        if array.shape[0] != query.shape[0]:
            raise ShapeError(f"{name} must have query's batch B={query.shape[0]}, got shape {array.shape}.")
    if key.shape[3] != query.shape[3]:
        raise ShapeError(f"key must have query's head dim H={query.shape[3]}, got shape {key.shape}.")
    if value.shape[1] != key.shape[1]:
        raise ShapeError(f"value must have key's length S={key.shape[1]}, got shape {value.shape}.")
    if value.shape[2] != key.shape[2]:
        raise ShapeError(f"value must have key's K={key.shape[2]} heads, got shape {value.shape}.")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ShapeError(
            f"key's heads K={key.shape[2]} must divide query's heads N={query.shape[2]}{_transposed(query, key)}."
        )


def _transposed(query: jax.Array, key: Keys) -> str:
    """A hint where the heads would fit if they stood before the tokens, in key or in both."""
    heads = key.shape[1]
    if heads == 0 or (query.shape[1] % heads and query.shape[2] % heads):
        return ""
    return (
        f": query has shape {query.shape} and key {tuple(key.shape)}; the layout is [B, T, N, H] and [B, S, K, H], "
        "so arrays [B, heads, tokens, H], as in torch, go through .swapaxes(1, 2)"
    )


def _check_alike(key: Keys, value: Keys) -> None:
    if isinstance(value, PagedArray) and value.interleaved:
        raise ShapeError(f"value is {value!r}, which holds keys, too: pass it as key, and ValueInKey(H) as value.")
    if page_size_of(key) != page_size_of(value) or quantization_of(key) != quantization_of(value):
        raise ShapeError(
            f"key and value must be held alike, got {_described(key)} and {_described(value)}: quantise both in "
            "one way, and page both or neither."
        )
    if isinstance(key, PagedArray) and isinstance(value, PagedArray) and key.table is not value.table:
        raise ShapeError(
            "key and value in pages must share one table: pass the same array to both PagedArrays; of a jitted "
            "function's arguments, let the table be one, and make the PagedArrays inside."
        )


def _described(keys: Keys) -> str:
    return f"{keys.dtype}{list(keys.shape)}" if isinstance(keys, jax.Array) else repr(keys)


def quantization_of(keys: Keys) -> str | None:
    """How keys or values are quantised, e.g. `int8:head_dim`; None where they are not."""
    found = getattr(keys, "quantization", None)
    return None if found is None else str(found)


def page_size_of(keys: Keys) -> int | None:
    """The slots of a page; None without pages."""
    return keys.page_size if isinstance(keys, PagedArray) else None


_NUMBERS = ("scale", "soft_cap", "dropout_rate")


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """The options that `kernelry.attention`, caches and layers share, each a field of a Request of the same name.

    Args:
      mode, scale, soft_cap, bias_after_cap, dropout_rate, gradients, normalization, logits_dtype, precision: as in
        `kernelry.attention`.
      partial: its `return_partial`.
      max_logits: its `return_max_logits`.
    """

    mode: str | Mode = Mode.TRAIN
    scale: float | None = None
    soft_cap: float | None = None
    bias_after_cap: bool = False
    dropout_rate: float = 0.0
    gradients: Iterable[str | Operand] | None = None
    normalization: str = "softmax"
    logits_dtype: Any = "float32"
    precision: str | jax.lax.Precision | None = None
    partial: bool = False
    max_logits: bool = False

    def checked(self) -> CallOptions:
        """Returns these options as a Request holds them: numbers are Python's floats, dtypes and precisions names.

        Raises:
          ArgumentError: a value is invalid.
        """
        numbers = {name: _unwrapped(getattr(self, name)) for name in _NUMBERS}
        for name, number in numbers.items():
            _check_static(name, number)
        for name, number in numbers.items():
            if number is not None and not _is_finite(number):
                raise ArgumentError(f"{name} must be a finite number, got {number!r}.")
        floats: dict[str, Any] = {name: None if number is None else float(number) for name, number in numbers.items()}
        return dataclasses.replace(
            self,
            mode=Mode.parse(self.mode),
            logits_dtype=_logits_dtype(self.logits_dtype),
            precision=precision_name(self.precision),
            **floats,
        )

    def fields(self) -> dict[str, Any]:
        """Returns them as fields of a Request."""
        return {name: getattr(self, name) for name in _FIELDS}

    def request(
        self,
        query: jax.Array | jax.ShapeDtypeStruct,
        key: Keys,
        value: Values,
        *,
        mask: MaskForm,
        target: Target,
        sinks: bool,
        bias: tuple[int, ...] | None = None,
        interpret: bool = False,
        context_parallel: str | None = None,
        sharding: str | None = None,
        partitioned: bool = False,
    ) -> Request:
        """Returns the request of a call with these options.

        Args:
          query, key, value: its arrays, or their shapes.
          mask, target, sinks, bias, interpret, context_parallel, sharding, partitioned: as in Request.

        Raises:
          ArgumentError: they do not make a valid request.
        """
        batch, q_len, q_heads, head_dim = query.shape
        _, kv_len, kv_heads, _ = key.shape
        batch, q_len, kv_len = (size if type(size) is int else size_of(size) for size in (batch, q_len, kv_len))
        return Request(
            target=target,
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim_of(value),
            dtype=dtype_name(query.dtype),
            mask=mask,
            bias=bias,
            sinks=sinks,
            interpret=interpret,
            kv_quantization=quantization_of(key),
            page_size=page_size_of(key),
            kv_layout=kv_layout_of(key, value),
            context_parallel=context_parallel,
            sharding=sharding,
            partitioned=partitioned,
            **self.fields(),
        )


_FIELDS = tuple(field.name for field in dataclasses.fields(CallOptions))


def _unwrapped(number: Any) -> Any:
    return number if number is None or type(number) in (float, int) else unwrapped(number)


def _check_static(name: str, number: Any) -> None:
    if isinstance(number, jax.core.Tracer):
        instead = "multiply query by it and pass scale=1.0, or " if name == "scale" else ""
        raise ArgumentError(
            f"{name} must be a Python number, got a traced array: {instead}make it static, as in "
            f"jax.jit(f, static_argnames={name!r})."
        )


def _is_finite(number: Any) -> bool:
    if isinstance(number, jax.Array | np.ndarray) and number.ndim == 0:
        return math.isfinite(number)  # 1 / jnp.sqrt(64) is a number, too
    return is_finite(number) or (isinstance(number, Real) and not isinstance(number, int) and math.isfinite(number))


def _logits_dtype(dtype: Any) -> str:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise ArgumentError(f"logits_dtype={dtype!r} is not a dtype{spelled(dtype)}.") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ArgumentError(f"logits_dtype must be floating, got {found}.")
    if found == jnp.float64 and jax.dtypes.canonicalize_dtype(found) != found:
        raise ArgumentError("logits_dtype=float64 needs 64-bit types, which are off: set JAX_ENABLE_X64=1.")
    return dtype_name(found)
