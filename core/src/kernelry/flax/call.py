"""One call of an attention layer: to the keys passed, or to the parts of a cache."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax

from kernelry.api import attention_with_options
from kernelry.cache.parts import finished, partials_of
from kernelry.config.layer import MoBA
from kernelry.errors import ArgumentError
from kernelry.flax.cached import masked_parts
from kernelry.flax.layout import mask_of
from kernelry.flax.tokens import CachedPart, Tokens
from kernelry.request.arguments import CallOptions
from kernelry.request.checks import check_sinks
from kernelry.request.request import Operand


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """The arguments of a call of an attention layer.

    Args:
      mask: the mask of the layer or of the call; may be booleans.
      tokens: what is known of the tokens.
      cached: parts of a key/value cache; empty for none.
      moba: how blocks of keys are chosen, or None.
      bias, sinks, dropout_rng: as in `kernelry.attention`.
      options: its other options.
    """

    mask: Any
    tokens: Tokens
    cached: tuple[CachedPart, ...]
    moba: MoBA | None
    bias: jax.Array | None
    sinks: jax.Array | None
    dropout_rng: jax.Array | None
    options: CallOptions

    def attend(self, query: Any, key: Any, value: Any) -> tuple[Any, jax.Array | None]:
        """Attends; returns an array or a Partial, and the largest visible logits [B, N] where requested.

        Raises:
          ArgumentError: arguments that do not go together.
          ShapeError: an array does not fit.
        """
        if (key is None) != (value is None):
            raise ArgumentError(f"{'key' if key is None else 'value'} is None: pass key and value, or neither.")
        if self.cached:
            result = self._attend_cached(query, None if key is None else CachedPart(key, value))
        elif key is None:
            raise ArgumentError("there is nothing to attend to: pass key and value, or cached=, parts of a cache.")
        else:
            result = attention_with_options(
                query,
                key,
                value,
                mask=mask_of(self.mask, self.tokens, query, key, self.moba),
                bias=self.bias,
                sinks=self.sinks,
                dropout_rng=self.dropout_rng,
                options=self.options,
            )
        return result if self.options.max_logits else (result, None)

    def _attend_cached(self, query: Any, own: CachedPart | None) -> Any:
        self._check_cached()
        parts = masked_parts(query, self.cached, own, base=self.mask, tokens=self.tokens, bias=self.bias)
        return finished(partials_of(query, parts, self.options, dropout_rng=self.dropout_rng), self.sinks, self.options)

    def _check_cached(self) -> None:
        """Checks what the calls for the parts do not: MoBA, and the sinks, which join after the merge."""
        if self.moba is not None:
            raise ArgumentError(
                "config.moba with cached= would choose among the blocks of several arrays: concatenate the parts, pass "
                "them as key and value, and Tokens(query_offset=…)."
            )
        gradients = self.options.gradients
        if self.sinks is None and gradients is not None and Operand.SINKS in gradients:
            raise ArgumentError("gradients names sinks, which this call does not pass; leave it out.")
        check_sinks(self.sinks is not None, self.options.partial)
