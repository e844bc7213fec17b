"""Attention as a Flax module, nnx and linen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernelry.api import attention
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError
from kernelry.masks import Causal, Mask
from kernelry.policy import AUTO
from kernelry.request import Mode, Operand
from kernelry.scope import current_scope, use

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("kernelry.flax needs flax 0.12 or newer: pip install 'kernelry[flax]'.") from error


@final
class AttentionOp(nnx.Module):
    """Attention whose kernel a config chooses; `kernelry.attention` as an nnx module.

    A policy given by an enclosing `kernelry.use(policy=…)` goes before the config's.

    Args:
      config: how kernels are chosen.
      mask: which keys each query sees, unless a call brings its own.
      scale: the factor on the logits; None is H ** -0.5.
      soft_cap: the logits' cap; None is no cap.
      sink_heads: N for a learned sink logit per query head, which starts at 0 in the parameter
        `sinks`; None for no sinks.
      dropout_rate: on the probabilities, in [0, 1).
      deterministic: no dropout; `model.train()` and `model.eval()` set it.
      kernel: a kernel's name, absolutely, or `auto`: what the config says.
      rngs: where dropout draws from (stream `dropout`), unless a call brings its own.
    """

    def __init__(
        self,
        config: AttentionConfig = AttentionConfig(),  # noqa: B008  # frozen
        *,
        mask: Mask = Causal(),  # noqa: B008  # frozen
        scale: float | None = None,
        soft_cap: float | None = None,
        sink_heads: int | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        kernel: str = AUTO,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.config = config
        self.mask = nnx.data(mask)  # it may carry arrays
        self.scale = scale
        self.soft_cap = soft_cap
        self.sinks = nnx.data(None if sink_heads is None else nnx.Param(jnp.zeros(sink_heads)))
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.kernel = kernel
        self.rngs = nnx.data(rngs.dropout.fork() if rngs is not None and dropout_rate else None)

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K D"],
        *,
        mask: Mask | None = None,
        mode: str | Mode = Mode.TRAIN,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        gradients: Iterable[str | Operand] | None = None,
        return_partial: bool = False,
        return_max_logits: bool = False,
    ) -> Any:
        """Attends; see `kernelry.attention` for what is not described here.

        Args:
          query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, D].
          mask: takes the place of the module's own; for a cache, `op.mask.at(query_offset=…)`.
          mode: `train`, `prefill` or `decode`.
          bias: broadcastable to B N T S.
          deterministic: no dropout; None is what the module says.
          rngs: a key, or where to draw one; None is the module's own stream.
          gradients, return_partial, return_max_logits: as in `kernelry.attention`.

        Raises:
          ArgumentError: there is dropout and nothing to draw from.
        """
        rate, dropout_rng = self._dropout(deterministic, rngs)
        with policy_of(self.config):
            return attention(
                query,
                key,
                value,
                mask=self.mask if mask is None else mask,
                scale=self.scale,
                bias=bias,
                soft_cap=self.soft_cap,
                sinks=None if self.sinks is None else self.sinks[...],
                dropout_rate=rate,
                dropout_rng=dropout_rng,
                mode=mode,
                kernel=self.kernel,
                gradients=gradients,
                return_partial=return_partial,
                return_max_logits=return_max_logits,
            )

    def _dropout(self, deterministic: bool | None, rngs: Any) -> tuple[float, jax.Array | None]:
        if not self.dropout_rate or (self.deterministic if deterministic is None else deterministic):
            return 0.0, None
        source = self.rngs if rngs is None else rngs
        if source is None:
            raise ArgumentError(
                f"dropout_rate={self.dropout_rate} has nothing to draw from: pass rngs= to AttentionOp or to the "
                "call, or deterministic=True."
            )
        if isinstance(source, nnx.Rngs):
            source = source.dropout
        return self.dropout_rate, source() if isinstance(source, nnx.RngStream) else source


def attention_op_as_linen(
    config: AttentionConfig = AttentionConfig(),  # noqa: B008  # frozen
    *,
    mask: Mask = Causal(),  # noqa: B008  # frozen
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_heads: int | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    kernel: str = AUTO,
    name: str | None = None,
) -> nnx.bridge.ToLinen:
    """Returns an `AttentionOp` as a linen module; it draws dropout from the collection `dropout`.

    Args:
      config, mask, scale, soft_cap, sink_heads, dropout_rate, deterministic, kernel: as in
        `AttentionOp`; calls take the same arguments, too.
      name: the linen module's.
    """
    module: nnx.bridge.ToLinen = nnx.bridge.to_linen(
        AttentionOp,
        config,
        mask=mask,
        scale=scale,
        soft_cap=soft_cap,
        sink_heads=sink_heads,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        kernel=kernel,
        name=name,
    )
    return module


@contextlib.contextmanager
def policy_of(config: AttentionConfig) -> Iterator[None]:
    """Puts the config's policy in force, unless an enclosing `use` has given one."""
    if current_scope().policy is not None:
        yield
        return
    with use(policy=config.policy):
        yield
