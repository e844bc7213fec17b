"""Attention as a Flax module, nnx and linen."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernelry.config.layer import AttentionConfig, options_of
from kernelry.errors import ArgumentError
from kernelry.flax.call import LayerCall
from kernelry.flax.kinds import check_bias, check_sizes
from kernelry.flax.sharded import check_order, scope_of, sharding_of
from kernelry.flax.tokens import CachedPart, Tokens
from kernelry.masks import Mask
from kernelry.models.model import LayerKind, config_of
from kernelry.request.request import Mode, Operand, operands_of

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("kernelry.flax needs flax 0.12 or newer: pip install 'kernelry[flax]'.") from error

if TYPE_CHECKING:
    from kernelry.request.sharding import Sharding

_NO_TOKENS = Tokens()


@final
class AttentionOp(nnx.Module):
    """Attention as a config describes it; `kernelry.attention` as an nnx module.

    A policy or a sharding that an enclosing `kernelry.use` gives has priority over the layer's. The output
    and its logsumexp are named `context` for `jax.checkpoint` policies, as in `kernelry.attention`.
    With `config.record_max_logits` each call appends its largest visible logits [B, N] to the
    nnx.Intermediate `max_logits`, as `sow` does: read them once per step with `nnx.capture` or
    `nnx.pop(model, nnx.Intermediate)`; in linen they are in the collection `intermediates`.

    Args:
      config: the options of the layer, and how kernels are chosen; or a kind of a model's layers, whose config is
        taken. Heads and head dims that it has are those of the arrays.
      mask: which keys each query sees, in place of `config.mask`.
      sink_heads: N, for a learned sink logit per query head, which starts at 0 in the parameter
        `sinks`, whatever `config.sinks` is; None for no such parameter. `config.sinks` requires
        sinks: the parameter, or those of the call.
      deterministic: no dropout; `model.train()` and `model.eval()` set it.
      rngs: where dropout draws from (stream `dropout`), unless a call passes its own.
      mesh: a mesh whose axes cut the calls; None is the one that is active, or that of the arrays.
      sharding: which of its axes cut what, in place of `config.sharding`: a `kernelry.parallel.Sharding` or its text.
        In decode, where a query is one token, axes of `sequence` cut the keys alone, or nothing where a part of the
        keys does not divide. A load-balanced order is that of the tokens of query, key and value, and gives masks
        their positions.

    Raises:
      ArgumentError: the mesh lacks an axis of the sharding, or nothing says what its axes cut.
    """

    def __init__(
        self,
        config: AttentionConfig | LayerKind = AttentionConfig(),  # noqa: B008  # frozen
        *,
        mask: Mask | Bool[Array, ...] | None = None,
        sink_heads: int | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs | None = None,
        mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
        sharding: Sharding | str | None = None,
    ) -> None:
        self.config = config = config_of(config)
        self.mask = nnx.data(config.mask if mask is None else mask)  # it may carry arrays
        self.sinks = nnx.data(None if sink_heads is None else nnx.Param(jnp.zeros(sink_heads)))
        self.deterministic = deterministic
        self.sharding = sharding_of(config, mesh, sharding)
        self.rngs = nnx.data(rngs.dropout.fork() if rngs is not None and config.dropout_rate else None)

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"] | None = None,
        value: Float[Array, "B S K D"] | None = None,
        *,
        tokens: Tokens = _NO_TOKENS,
        cached: Sequence[CachedPart] = (),
        mask: Mask | Bool[Array, ...] | None = None,
        mode: str | Mode = Mode.TRAIN,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        sinks: Float[Array, " N"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        gradients: Iterable[str | Operand] | None = None,
        return_partial: bool = False,
        return_max_logits: bool = False,
    ) -> Any:
        """Attends; see `kernelry.attention` for what is not described here.

        A query sees ((mask & segments) | bidirectional spans) & indexer & MoBA's blocks.

        Args:
          query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, D]. With `cached`, key and value
            are those of the query's own tokens, or None if these are cached already.
          tokens: segments, positions and what else is known of the tokens.
          cached: parts of a key/value cache; the query sees those slots of each that have tokens.
          mask: replaces the module's own; without `cached` also booleans, as in `kernelry.attention`. It gets the
            positions of the tokens unless it has positions of its own.
          mode: `train`, `prefill` or `decode` (alias `autoregressive`).
          bias: broadcastable to B N T S; needed where `config.bias` is True. With `cached`, S counts the slots of all
            parts, key's last.
          sinks: [N], if the module has none of its own.
          deterministic: no dropout; None means the module's setting.
          rngs: a key, or where to draw one; None means the module's own stream.
          gradients, return_partial, return_max_logits: as in `kernelry.attention`.

        Raises:
          ArgumentError: arguments that do not go together, with what to pass instead.
          ShapeError: an array does not fit the others or the config, or T ≠ S and the queries' positions are unknown.
        """
        if not isinstance(tokens, Tokens):
            raise ArgumentError(f"tokens must be kernelry.flax.Tokens, got {type(tokens).__name__}.")
        rate, dropout_rng = self._dropout(deterministic, rngs)
        options = dataclasses.replace(
            options_of(self.config),
            mode=mode,
            dropout_rate=rate,
            gradients=None if gradients is None else operands_of(gradients),
            partial=return_partial,
            max_logits=return_max_logits or self.config.record_max_logits,
        )
        call = LayerCall(
            mask=self.mask if mask is None else mask,
            tokens=tokens,
            cached=(cached,) if isinstance(cached, CachedPart) else tuple(cached),
            moba=self.config.moba,
            bias=bias,
            sinks=self._sinks(sinks, return_partial),
            dropout_rng=dropout_rng,
            options=options,
        )
        check_bias(self.config, bias)
        parts = [part for part in call.cached if isinstance(part, CachedPart)]
        keys = [part.key for part in parts] + ([] if key is None else [key])
        check_sizes(self.config, query, keys, [*(part.value for part in parts), value])
        with scope_of(self.config, self.sharding, mode, query, keys):
            check_order(query, key, tokens, moba=self.config.moba is not None)
            result, max_logits = call.attend(query, key, value)
        if self.config.record_max_logits:
            self._record(max_logits)
        return (result, max_logits) if return_max_logits else result

    def _sinks(self, given: Any, return_partial: bool) -> Any:
        if self.sinks is not None and given is not None:
            raise ArgumentError("sinks= and the module's own, from sink_heads=, are both given: leave one of them out.")
        sinks = given if self.sinks is None else self.sinks[...]
        if sinks is None and self.config.sinks and not return_partial:
            raise ArgumentError(
                "config.sinks is True and there are no sinks: build AttentionOp with sink_heads=, the number of query "
                "heads, for a parameter, or pass sinks= to the call."
            )
        return sinks

    def _record(self, max_logits: jax.Array | None) -> None:
        with warnings.catch_warnings():
            # Flax warns of sow outside nnx.capture, which linen and most training loops do not use.
            warnings.filterwarnings("ignore", "Using 'Module.sow", DeprecationWarning)
            self.sow(nnx.Intermediate, "max_logits", max_logits)

    def _dropout(self, deterministic: bool | None, rngs: Any) -> tuple[float, jax.Array | None]:
        rate = self.config.dropout_rate
        if not rate or (self.deterministic if deterministic is None else deterministic):
            return 0.0, None
        source = self.rngs if rngs is None else rngs
        if source is None:
            raise ArgumentError(
                f"dropout_rate={rate} has nothing to draw from: pass rngs= to AttentionOp or to the call, or "
                "deterministic=True."
            )
        if isinstance(source, nnx.Rngs):
            source = source.dropout
        return rate, source() if isinstance(source, nnx.RngStream) else source


def attention_op_as_linen(
    config: AttentionConfig | LayerKind = AttentionConfig(),  # noqa: B008  # frozen
    *,
    mask: Mask | None = None,
    sink_heads: int | None = None,
    deterministic: bool = False,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    sharding: Sharding | str | None = None,
    name: str | None = None,
) -> nnx.bridge.ToLinen:
    """Returns an `AttentionOp` as a linen module; it draws dropout from the collection `dropout`.

    Args:
      config, mask, sink_heads, deterministic, mesh, sharding: as in `AttentionOp`, whose arguments calls take, too.
      name: the name of the linen module.
    """
    module: nnx.bridge.ToLinen = nnx.bridge.to_linen(
        AttentionOp,
        config_of(config),
        mask=mask,
        sink_heads=sink_heads,
        deterministic=deterministic,
        mesh=mesh,
        sharding=sharding,
        name=name,
    )
    return module
