"""Arrays of few bits with a scale."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError, ConfigError, ShapeError, nearest

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_DTYPES = ("int8", "int4", "float8_e4m3fn")
_AXES = {"head_dim": (-1,), "heads_and_head_dim": (-2, -1)}
"""Over which axes of [..., K, H] one scale reaches."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """How an array [..., K, H] is quantised, written `int8:head_dim`.

    Args:
      dtype: of the values: int8, int4 or float8_e4m3fn.
      axis: `head_dim`, a scale for every token and head, or `heads_and_head_dim`, one for every token.

    Raises:
      ArgumentError: a dtype or an axis is unknown.
    """

    dtype: str = "int8"
    axis: str = "head_dim"

    def __post_init__(self) -> None:
        for name, known in (("dtype", _DTYPES), ("axis", tuple(_AXES))):
            value = getattr(self, name)
            if value not in known:
                raise ArgumentError(f"quantization: unknown {name} {value!r}{nearest(str(value), known)}")

    @classmethod
    def parse(cls, text: str | Quantization) -> Quantization:
        """Reads `int8`, whose axis is head_dim, or `int8:heads_and_head_dim`.

        Raises:
          ArgumentError: it is neither.
        """
        if isinstance(text, Quantization):
            return text
        if not isinstance(text, str):
            raise ArgumentError(f"a quantization is written like 'int8' or 'int8:head_dim', got {text!r}.")
        dtype, _, axis = text.partition(":")
        return cls(dtype, axis) if axis else cls(dtype)

    def of_heads(self, kv_heads: int) -> Quantization:
        """The same for K heads: with one head both axes are one, called head_dim."""
        return Quantization(self.dtype) if kv_heads == 1 else self

    def __str__(self) -> str:
        return f"{self.dtype}:{self.axis}"


QUANTIZATIONS = frozenset(str(Quantization(dtype, axis)) for dtype in _DTYPES for axis in _AXES)
"""Every quantization there is, as kernels declare them."""


@final
@pytree("values", "scale")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantizedArray:
    """An array [..., K, H] held as values · scale.

    `QuantizedArray.quantize(array, "int8")` makes one. The largest magnitude that a scale reaches becomes the largest
    value of the dtype (127.5 for int8, 7.5 for int4, 448 for float8_e4m3fn), as in MaxText's caches, and the scale is
    rounded to `scale_dtype`. NaN and inf come back as NaN.

    Limits: a channel, which is what one scale reaches, comes back with the format's relative error of its largest
    magnitude (1 % for int8, 8 % for int4, 7 % for float8_e4m3fn) wherever its scale is a normal number: from
    1.5e-36 on (5.3e-36 for float8_e4m3fn), up to the largest float32. Below, it comes back as zeros,
    as channels of zeros do. A `scale_dtype` of float16 narrows that to what float16 holds.

    Args:
      values: [..., K, H] of int8, int4 or float8_e4m3fn.
      scale: [..., K, 1] or [..., 1, 1], floating.

    Raises:
      ShapeError: a dtype or a shape is another one.
    """

    values: Array
    scale: Float[Array, "*rows heads 1"]

    def __post_init__(self) -> None:
        if not is_array(self.values) or str(self.values.dtype) not in _DTYPES or self.values.ndim < 2:
            known = f"{', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}"
            raise ShapeError(f"QuantizedArray: values must be {known} [..., K, H], got {described(self.values)}.")
        *rows, heads, _ = shape = self.values.shape
        allowed = {(*rows, heads, 1), (*rows, 1, 1)}
        if not _is_floating(self.scale) or tuple(self.scale.shape) not in allowed:
            raise ShapeError(
                f"QuantizedArray: scale of values {list(shape)} must be floating {[*rows, heads, 1]} or "
                f"{[*rows, 1, 1]}, got {described(self.scale)}."
            )

    @classmethod
    def quantize(
        cls,
        array: Float[Array, "*rows K H"],
        how: str | Quantization = "int8",
        *,
        scale_dtype: DTypeLike = jnp.bfloat16,
    ) -> QuantizedArray:
        """Quantises with qwix, the scale taken from the largest magnitude it reaches.

        Args:
          array: [..., K, H], floating.
          how: `int8`, `int4` or `float8_e4m3fn`, with `:heads_and_head_dim` for one scale a token.
          scale_dtype: of the scale.

        Raises:
          ConfigError: qwix is not installed; the message says how to.
          ArgumentError, ShapeError: an argument means nothing.
        """
        kind = Quantization.parse(how)
        if not _is_floating(array) or array.ndim < 2 or 0 in array.shape[-2:]:
            raise ShapeError(f"quantize takes a floating array [..., K, H], K and H not 0, got {described(array)}.")
        shared = {axis % array.ndim for axis in _AXES[kind.axis]}
        near_one, exponent = _near_one(array.astype(jnp.float32), _AXES[kind.axis], kind.dtype, jnp.dtype(scale_dtype))
        found = _qwix().quantize(
            near_one,
            jnp.dtype(kind.dtype),
            channelwise_axes=tuple(axis for axis in range(array.ndim) if axis not in shared),
            scale_dtype=jnp.dtype(scale_dtype),
        )
        scale = _times_power(found.scale.astype(jnp.float32), exponent)
        return cls(found.qvalue, scale.astype(found.scale.dtype))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*rows K H"]:
        """Returns values · scale, multiplied in float32; what rounding takes beyond a dtype's range is its largest.

        Where a scale is not finite the result is not, either.
        """
        scale = self.scale.astype(jnp.float32)
        product = self.values.astype(jnp.float32) * scale
        most = float(jnp.finfo(dtype).max)  # type: ignore[no-untyped-call]
        within = jnp.clip(product, -min(most, _LARGEST), min(most, _LARGEST))
        return jnp.where(jnp.isfinite(scale), within, product).astype(dtype)

    @property
    def quantization(self) -> Quantization:
        """How it is quantised."""
        axis = "heads_and_head_dim" if self.scale.shape[-2] == 1 else "head_dim"
        return Quantization(str(self.values.dtype), axis).of_heads(self.values.shape[-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it represents."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.values.shape)

    def __repr__(self) -> str:
        if not is_array(self.values) or not is_array(self.scale):  # what jax.tree.map put there
            return f"QuantizedArray({self.values!r}, {self.scale!r})"
        return f"QuantizedArray({self.quantization}, shape={list(self.shape)}, scale={self.scale.dtype})"


_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_VALUE = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448.0}


def _near_one(
    array: jax.Array, shared: tuple[int, ...], dtype: str, scale_dtype: np.dtype
) -> tuple[Float[Array, "*rows K H"], Int[Array, "*rows heads 1"]]:
    """Multiplies each channel by a power of two that brings its largest magnitude near 1; returns the exponent left.

    qwix keeps a scale away from zero by adding to it, and divides by it; both are sound near 1 alone.
    """
    top = jnp.abs(array).max(axis=shared, keepdims=True)
    limits = jnp.finfo(scale_dtype)  # type: ignore[no-untyped-call]
    least = limits.smallest_subnormal if scale_dtype == jnp.float16 else limits.tiny
    is_zero = top < max(_LARGEST_VALUE[dtype], 127.5) * float(least)
    exponent = jnp.where(is_zero | ~jnp.isfinite(top), 0, jnp.frexp(top)[1]).astype(jnp.int32)
    return _times_power(jnp.where(is_zero, 0.0, array), -exponent), exponent


def _times_power(array: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns array · 2 ** exponent, in two steps, because neither half is beyond float32."""
    half = exponent // 2
    return array * jnp.ldexp(jnp.float32(1.0), half) * jnp.ldexp(jnp.float32(1.0), exponent - half)


Stored: TypeAlias = "jax.Array | QuantizedArray"
"""Numbers as they are kept."""


def described(array: Any) -> str:
    """An array's dtype and shape, or what else it is, for a message."""
    return f"{array.dtype}{list(array.shape)}" if is_array(array) else type(array).__name__


def is_array(array: Any) -> bool:
    """Whether it has a dtype and a shape, as jax.ShapeDtypeStruct does, too."""
    return hasattr(array, "dtype") and hasattr(array, "shape")


def _is_floating(array: Any) -> bool:
    return is_array(array) and bool(jnp.issubdtype(array.dtype, jnp.floating))


def _qwix() -> Any:
    # Imported here because it is an extra, and only writing a cache needs it.
    try:
        import qwix
    except ImportError as error:
        raise ConfigError("quantising needs qwix, which is not installed: pip install 'kernelry[quant]'.") from error
    return qwix
