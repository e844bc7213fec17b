"""Attention over a part of the keys, and the two forms of its softmax statistics."""

from __future__ import annotations

import dataclasses
from typing import final

import jax
from jaxtyping import Array, Float

from kernelry._pytree import pytree


@final
@pytree("out", "lse", "max", "sum", "max_logits", "lse_rest")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Attention over a part of the keys with the statistics asked for.

    Args:
      out: [B, T, N, D]; normalised, unless `max` and `sum` are given.
      lse: [B, N, T], log Σ exp(logits), natural logarithm; −inf for a row that sees nothing.
      max, sum: [B, N, T], the running maximum and Σ exp(logits − max) of an unnormalised `out`;
        −inf and 0 for a row that sees nothing.
      max_logits: [B, N], the largest visible logit; −inf where nothing is visible. No gradient.
      dtype: the dtype that `finalize` returns, the query's.
      lse_rest: [B, N, T], what rounding to float32 took from `lse`: log Σ exp(logits) = lse + lse_rest. It matters
        where logits are so large that a logarithm vanishes beside them, beyond ±1e7. Kernels may return it with
        `lse`, for the backward pass; the Partials that `attention` returns have None. No gradient.
    """

    out: Float[Array, "B T N D"]
    lse: Float[Array, "B N T"] | None = None
    max: Float[Array, "B N T"] | None = None
    sum: Float[Array, "B N T"] | None = None
    max_logits: Float[Array, "B N"] | None = None
    dtype: str = "float32"
    lse_rest: Float[Array, "B N T"] | None = None

    __hash__ = None  # type: ignore[assignment]

    @property
    def has_statistics(self) -> bool:
        """True where this Partial can be merged with others."""
        return self.lse is not None or self.max is not None


def heads_last(statistic: jax.Array) -> jax.Array:
    """Lays a statistic [B, N, T] beside an output: [B, T, N, 1]."""
    return statistic.swapaxes(1, 2)[..., None]
