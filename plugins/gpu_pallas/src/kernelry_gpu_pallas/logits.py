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
    mask makes, would overflow in base 2. Where the scale is all there is between a product and its logit, it joins that
    factor.

    Args:
      scale, soft_cap, bias_after_cap: of the request.
      unit: how many times the logits are what a call returns.
      precision: of products of float32. Triton's default rounds the factors to 10 bits of mantissa; in three parts they
        keep 21.
    """

    scale: float
    soft_cap: float | None
    bias_after_cap: bool
    unit: float
    precision: Any

    @classmethod
    def of(cls, request: Request, *, scaled: bool = False) -> Logits:
        """Those of a request; `scaled` where the logits themselves are needed, not only their differences."""
        plain = request.bias is None and request.soft_cap is None and request.scale > 0
        unit = 1.0 if scaled or not plain else request.scale
        precision = _precision(request) if request.dtype == "float32" else None
        return cls(request.scale, request.soft_cap, request.bias_after_cap, unit, precision)

    def power(self, difference: jax.Array) -> jax.Array:
        """Returns exp(difference) of two logits in this unit."""
        return jnp.exp2(difference * (self.unit * LOG2_E))

    def product(self, one: jax.Array, other: jax.Array, *, turn_one: bool = False, turn_other: bool = False) -> Any:
        """Returns one · other, summed in float32; either may be transposed."""
        return plgpu.dot(one, other, trans_a=turn_one, trans_b=turn_other, precision=self.precision)

    def __call__(
        self, query: jax.Array, key: jax.Array, bias: jax.Array | None, key_scale: jax.Array | None = None
    ) -> tuple[Float[Array, "block_q block_kv"], Float[Array, "block_q block_kv"] | None]:
        """Returns the logits before the mask, in this unit, and the slope of the soft cap.

        Args:
          query, key: tiles. bias: [block_q or 1, block_kv or 1]. key_scale: [block_kv], of quantised keys.
        """
        found = self.product(query, key, turn_other=True)
        if key_scale is not None:
            found = found * key_scale[None, :]
        if self.unit == self.scale and self.soft_cap is None and bias is None:
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


def _precision(request: Request) -> Any:
    """What was asked for; else as exact as float32, in three products of TF32, which a CPU does not have."""
    if request.precision is not None:
        return jax.lax.Precision(request.precision)
    return jax.lax.Precision.HIGHEST if request.is_interpreted else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def cleaned(tile: jax.Array, visible: Bool[Array, "#block_q block_kv"]) -> jax.Array:
    """Zeroes the keys or values [block_kv, H] that no query of the tile sees: 0 · NaN is NaN."""
    seen = visible.astype(jnp.int32).max(axis=0) > 0
    return jnp.where(seen[:, None], tile, jnp.zeros_like(tile))
