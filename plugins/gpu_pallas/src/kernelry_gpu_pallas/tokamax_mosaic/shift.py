"""A bias shifted by row to where the vendor's arithmetic is exact: it multiplies logits by log2(e), then subtracts.

The product of −1e9 and log2(e) is off by up to 64, that of −3e38 is not finite, and a GPU rounds it in the forward pass
but not in what is subtracted from it. Softmax does not change when a row is shifted, and logsumexps are shifted back.
"""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernelry.plugin import Request, log_sum, pytree
from kernelry_gpu_pallas.tokamax_mosaic.visibility import Visible, is_plainly_causal

_SMALL = 2.0**13
"""Rows whose largest bias is below it stay: 8192 · log2(e) is off by 5e-4, and a bias in bfloat16 would be rounded."""

_LARGE = 1e16
"""Next to it, products of queries and keys vanish, in float64 too; what is less than the largest bias has no weight."""

_FAR, _FARTHER = -(2.0**40), -(2.0**41)
"""The largest bias of a row beyond 1e16, and others: powers of two, times log2(e) without an error of rounding, next to
which products below 2**15 vanish."""

_WEIGHTLESS = -(2.0**28)
"""Below the largest bias by that much, a key has no weight. In blocks without another key its product may still not
overflow exp2."""


@final
@pytree("bias", "shift", "is_far")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Shifted:
    """What the vendor is given for a bias.

    Args:
      bias: [#B, #N, T, S], in its own dtype.
      shift: [#B, #N, T], what was subtracted from a row.
      is_far: [#B, #N, T], whether products of queries and keys vanish next to the row's bias.
    """

    bias: Float[Array, "#B #N T S"] | None
    shift: Float[Array, "#B #N T"] | None = None
    is_far: Bool[Array, "#B #N T"] | None = None

    @classmethod
    def of(cls, bias: Float[Array, "#B #N #T #S"] | None, visible: Visible, request: Request) -> Shifted:
        """That of a call; bias is whole in T and S: with grouped heads, the vendor's backward misreads rows of 1."""
        if bias is None:
            return cls(None)
        whole = jnp.broadcast_to(bias, (*bias.shape[:2], request.q_len, request.kv_len))
        if bias.dtype == jnp.float16:  # ends at 65504
            return cls(whole)
        top = _largest(bias, visible, request)
        is_far = jnp.isfinite(top) & (jnp.abs(top) >= _LARGE)
        shift = jnp.where(jnp.isfinite(top) & (jnp.abs(top) >= _SMALL), top, 0.0)
        wide = whole.astype(jnp.float32)
        near = jnp.maximum(wide - shift[..., None], jnp.where(jnp.isfinite(top), _WEIGHTLESS, -jnp.inf)[..., None])
        far = jnp.where(wide >= top[..., None], _FAR, _FARTHER)
        moved = jnp.where(is_far[..., None], far, near)
        # A hidden NaN stays one: only what the mask hides may hold it, and the vendor's where() comes after the sum.
        return cls(jnp.where(jnp.isnan(wide), wide, moved).astype(bias.dtype), shift, is_far)

    def log_sums(self, tops: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logsumexp of the shifted logits, and what rounding took from it.

        Args:
          tops, sums: [B, N, T], the vendor's; the rounding of a top that is far is undone.
        """
        return log_sum(tops if self.is_far is None else jnp.where(self.is_far, _FAR, tops), sums)

    def shifted_back(self, tops: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The logsumexp of the logits themselves, what rounding took from it, and the largest logit."""
        if self.shift is None or self.is_far is None:
            return *log_sum(tops, sums), tops
        near = jnp.where(self.is_far, 0.0, tops)
        part, rest = log_sum(near, sums)
        lse = self.shift + part
        return lse, lax.stop_gradient(rest + (part - (lse - self.shift))), self.shift + near

    def shifted(self, lse: Float[Array, "B N T"]) -> Float[Array, "B N T"]:
        """The logsumexp of the shifted logits, of that of the logits themselves."""
        if self.shift is None or self.is_far is None:
            return lse
        return jnp.where(self.is_far, lse - self.shift + _FAR, lse - self.shift)


def _largest(bias: Float[Array, "#B #N #T #S"], visible: Visible, request: Request) -> Float[Array, "#B #N T"]:
    """The largest bias that each query sees; −inf where it sees no key."""
    slots = jnp.arange(request.kv_len, dtype=jnp.int32)[None, None, None]
    seen = jnp.ones((1, 1, request.q_len, 1), bool)
    if is_plainly_causal(request):
        seen = seen & (slots <= jnp.arange(request.q_len, dtype=jnp.int32)[None, None, :, None])
    if visible.start is not None:
        seen = seen & (slots >= visible.start[..., None])
    if visible.end is not None:
        seen = seen & (slots < visible.end[..., None])
    if visible.dense is not None:
        seen = seen & visible.dense
    found: jax.Array = jnp.where(seen, bias.astype(jnp.float32), -jnp.inf).max(axis=3)
    return found
