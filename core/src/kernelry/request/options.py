"""The options of a call besides its arrays and its mask, and the Request that they all make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._values import size_of, unwrapped
from kernelry.errors import ArgumentError
from kernelry.masks.form import MaskForm
from kernelry.request.checks import is_finite
from kernelry.request.operands import Keys, page_size_of, quantization_of
from kernelry.request.request import Mode, Operand, Request, dtype_name, precision_name
from kernelry.request.target import Target

_NUMBERS = ("scale", "soft_cap", "dropout_rate")


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """The options that `kernelry.attention`, caches and layers share, each a field of a Request of the same name.

    Args:
      mode, scale, soft_cap, dropout_rate, gradients, normalization, logits_dtype, precision: as in
        `kernelry.attention`.
      partial: its `return_partial`.
      max_logits: its `return_max_logits`.
    """

    mode: str | Mode = Mode.TRAIN
    scale: float | None = None
    soft_cap: float | None = None
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
        value: Keys,
        *,
        mask: MaskForm,
        target: Target,
        sinks: bool,
        bias: tuple[int, ...] | None = None,
        interpret: bool = False,
        context_parallel: str | None = None,
    ) -> Request:
        """Returns the request of a call with these options.

        Args:
          query, key, value: its arrays, or their shapes.
          mask, target, sinks, bias, interpret, context_parallel: as in Request.

        Raises:
          ArgumentError: they do not make a valid request.
        """
        batch, q_len, q_heads, head_dim = query.shape
        _, kv_len, kv_heads, value_dim = value.shape
        batch, q_len, kv_len = (size if type(size) is int else size_of(size) for size in (batch, q_len, kv_len))
        return Request(
            target=target,
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype_name(query.dtype),
            mask=mask,
            bias=bias,
            sinks=sinks,
            interpret=interpret,
            kv_quantization=quantization_of(key),
            page_size=page_size_of(key),
            context_parallel=context_parallel,
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
        raise ArgumentError(f"logits_dtype={dtype!r} is not a dtype.") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ArgumentError(f"logits_dtype must be floating, got {found}.")
    if found == jnp.float64 and jax.dtypes.canonicalize_dtype(found) != found:
        raise ArgumentError("logits_dtype=float64 needs 64-bit types, which are off: set JAX_ENABLE_X64=1.")
    return dtype_name(found)
