"""The logits of one tile: a block of queries against a block of keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from kernelry.plugin import Request

LOG2_E = math.log2(math.e)

LOWEST = float(jnp.finfo(jnp.float32).min)  # type: ignore[no-untyped-call]
"""Where a running maximum begins: finite, so that the difference to the −inf of a hidden key is −inf, not NaN."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Logits:
    """Scale · ⟨query, key⟩, with the bias, under the soft cap or after it.

    The device has exp2; the factor log2(e) is applied to differences of logits, for a logit of −3e38, which an additive
    mask makes, would overflow in base 2. Where a positive scale is all there is between a product and its logit, it
    joins that factor: the maximum of the products is that of the logits.

    Args:
      scale, soft_cap, bias_after_cap: of the request.
      plain: whether a positive scale is all there is.
      precision: of products of float32. Triton's default rounds the factors to 10 bits of mantissa; in three parts they
        keep 21.
      is_interpreted: whether kernels run in interpret mode, which does not have the instructions of a GPU.
    """

    scale: float
    soft_cap: float | None
    bias_after_cap: bool
    plain: bool
    precision: Any
    is_interpreted: bool

    @classmethod
    def of(cls, request: Request) -> Logits:
        """Those of a request."""
        plain = request.bias is None and request.soft_cap is None and request.scale > 0
        precision = _precision(request) if request.dtype == "float32" else None
        return cls(request.scale, request.soft_cap, request.bias_after_cap, plain, precision, request.is_interpreted)

    @property
    def unit(self) -> float:
        """How many times the logits are what a call returns."""
        return self.scale if self.plain else 1.0

    def power(self, difference: jax.Array) -> jax.Array:
        """Returns exp(difference) of two logits in this unit, outside of a kernel."""
        return jnp.exp2(difference * (self.unit * LOG2_E))

    def power_in_kernel(self, difference: jax.Array) -> jax.Array:
        """Returns exp(difference) of two logits in this unit, inside a kernel."""
        exponent = difference * (self.unit * LOG2_E)
        return jnp.exp2(exponent) if self.is_interpreted else _exp2_on_gpu(exponent)

    def product(self, one: jax.Array, other: jax.Array, *, turn_other: bool = False) -> Any:
        """Returns one · other, summed in float32; `other` may be transposed."""
        return plgpu.dot(one, other, trans_b=turn_other, precision=self.precision)

    def __call__(
        self, one: jax.Array, other: jax.Array, bias: jax.Array | None, key_scale: jax.Array | None = None
    ) -> tuple[Float[Array, "one other"], Float[Array, "one other"] | None]:
        """Returns the logits before the mask, in this unit, and the slope of the soft cap.

        Args:
          one, other: tiles of queries and keys [one, H] and [other, H], or of keys and queries.
          bias: [one or 1, other or 1]. key_scale: [other], of quantised keys.
        """
        return self.of_products(self.product(one, other, turn_other=True), bias, key_scale)

    def of_products(
        self, found: jax.Array, bias: jax.Array | None, key_scale: jax.Array | None
    ) -> tuple[Float[Array, "one other"], Float[Array, "one other"] | None]:
        """The same, of the products of one · otherᵀ."""
        if key_scale is not None:
            found = found * key_scale[None, :]
        if self.plain:
            return found, None
        found = found * self.scale
        if bias is not None and not self.bias_after_cap:
            found = found + bias.astype(jnp.float32)
        if self.soft_cap is None:
            return found, None
        share = jnp.tanh(found * (1.0 / self.soft_cap))
        capped = share * self.soft_cap
        if bias is not None and self.bias_after_cap:
            capped = capped + bias.astype(jnp.float32)
        return capped, 1.0 - share * share


def _exp2_on_gpu(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent by PTX's `ex2.approx.ftz.f32`: off by 2 ulp at most; 0 where it is below 2^−126, and of −inf.

    What the compiler makes of `exp2` scales subnormal numbers up and down again, in three instructions more.
    """
    (found,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=(exponent,),
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=(jax.ShapeDtypeStruct(exponent.shape, jnp.float32),),  # type: ignore[no-untyped-call]
    )
    return found


def _precision(request: Request) -> Any:
    """What was asked for; else as exact as float32, in three products of TF32, which a CPU does not have."""
    if request.precision is not None:
        return jax.lax.Precision(request.precision)
    return jax.lax.Precision.HIGHEST if request.is_interpreted else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def cleaned(tile: jax.Array, visible: Bool[Array, "#block_q block_kv"]) -> jax.Array:
    """Zeroes the keys or values [block_kv, H] that no query of the tile sees: 0 · NaN is NaN."""
    seen = visible.astype(jnp.int32).max(axis=0) > 0
    return jnp.where(seen[:, None], tile, jnp.zeros_like(tile))
