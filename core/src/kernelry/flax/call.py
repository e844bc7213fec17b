"""One call of an attention layer: to the keys passed, or to the parts of a cache."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import numpy as np

from kernelry.api import attention
from kernelry.config.loading import AttentionConfig
from kernelry.errors import ArgumentError, ShapeError
from kernelry.execution.normalization import finalize
from kernelry.flax.cached import Cache, attend_to_cache
from kernelry.flax.layout import mask_of
from kernelry.flax.tokens import CachedPart, Tokens
from kernelry.kernel.partial import Partial
from kernelry.masks import Mask
from kernelry.request.request import Mode, Operand


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What an attention layer was asked.

    Args:
      config: the options of the layer.
      mask: its mask, or the call's own; perhaps booleans.
      tokens: what is known of the tokens.
      cached: parts of a key/value cache; empty for none.
      mode, bias, sinks, dropout_rate, dropout_rng, gradients, return_partial: as in
        `kernelry.attention`.
      max_logits: whether the largest visible logits are wanted.
    """

    config: AttentionConfig
    mask: Any
    tokens: Tokens
    cached: tuple[CachedPart, ...]
    mode: str | Mode
    bias: jax.Array | None
    sinks: jax.Array | None
    dropout_rate: float
    dropout_rng: jax.Array | None
    gradients: frozenset[Operand] | None
    return_partial: bool
    max_logits: bool

    def attend(self, query: Any, key: Any, value: Any) -> tuple[Any, jax.Array | None]:
        """Attends; returns an array or a Partial, and the largest visible logits [B, N] where wanted.

        Raises:
          ArgumentError: arguments that do not go together.
          ShapeError: an array does not fit.
        """
        if (key is None) != (value is None):
            raise ArgumentError(f"{'key' if key is None else 'value'} is None: pass key and value, or neither.")
        if self.cached:
            return self._attend_cached(query, None if key is None else CachedPart(key, value))
        if key is None:
            raise ArgumentError("there is nothing to attend to: pass key and value, or cached=, parts of a cache.")
        mask = mask_of(self.mask, self.tokens, query, key, self.config.moba)
        return self._attention(
            query,
            key,
            value,
            mask=mask,
            bias=self.bias,
            sinks=self.sinks,
            dropout_rng=self.dropout_rng,
            gradients=self.gradients,
            return_partial=self.return_partial,
        )

    def _attention(self, query: Any, key: Any, value: Any, **settings: Any) -> tuple[Any, jax.Array | None]:
        """`kernelry.attention` with what the config says."""
        result = attention(
            query,
            key,
            value,
            scale=self.config.scale,
            soft_cap=self.config.soft_cap,
            dropout_rate=self.dropout_rate,
            mode=self.mode,
            logits_dtype=self.config.logits_dtype,
            precision=self.config.precision,
            return_max_logits=self.max_logits,
            **settings,
        )
        return result if self.max_logits else (result, None)

    def _attend_cached(self, query: Any, own: CachedPart | None) -> tuple[Any, jax.Array | None]:
        self._check_cached(query)
        cache = Cache(self.cached, own)
        partial = attend_to_cache(self._attend_part, query, cache, base=self.mask, tokens=self.tokens, bias=self.bias)
        return partial if self.return_partial else finalize(partial, self.sinks), partial.max_logits

    def _attend_part(self, place: int, query: Any, part: CachedPart, *, mask: Mask, bias: Any) -> Partial:
        rng = self.dropout_rng
        partial, _ = self._attention(
            query,
            part.key,
            part.value,
            mask=mask,
            bias=bias,
            # The parts hold different keys, so they must not drop the same slots.
            dropout_rng=None if rng is None else jax.random.fold_in(rng, place),
            gradients=None if self.gradients is None else self.gradients - {Operand.SINKS},
            return_partial=True,
        )
        found: Partial = partial
        return found

    def _check_cached(self, query: Any) -> None:
        """Checks what no part sees: MoBA, and the sinks, which join after the merge."""
        if self.config.moba is not None:
            raise ArgumentError(
                "config.moba with cached= would choose among the blocks of several arrays: concatenate the parts, pass "
                "them as key and value, and Tokens(query_offset=…)."
            )
        if self.sinks is None and self.gradients is not None and Operand.SINKS in self.gradients:
            raise ArgumentError("gradients names sinks, which this call does not pass; leave it out.")
        if self.sinks is None:
            return
        if self.return_partial:
            raise ArgumentError(
                "sinks join the denominator once, at the end: pass them to kernelry.finalize, not to parts."
            )
        if np.shape(self.sinks) != np.shape(query)[2:3]:
            raise ShapeError(
                f"sinks must be [N] = {list(np.shape(query)[2:3])}, one logit per query head, "
                f"got shape {np.shape(self.sinks)}."
            )
