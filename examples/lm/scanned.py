"""The decoder as one scan over rematerialised layers: its program does not grow with their number."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from kernelry import Mode
from kernelry.parallel import Sharding
from lm.data import Batch
from lm.mesh import cut
from lm.model import Decoder, Packed

Parameters = Any
"""The arrays of a model: those of its layers, stacked, and the rest."""


class ScannedDecoder:
    """What is static of a model, whose parameters are arguments.

    The kinds of the layers repeat with some period; the scan is over the periods. Each layer keeps only the output of
    its attention, which is named `context`, and computes the rest again in the backward pass.
    """

    def __init__(self, model: Decoder) -> None:
        kinds = model.settings.layers
        period = next(n for n in range(1, len(kinds) + 1) if kinds == kinds[:n] * (len(kinds) // n))
        layers = [[nnx.split(block) for block in model.blocks[place::period]] for place in range(period)]
        self._graphs = tuple(graph for (graph, _), *_ in layers)
        stacked = tuple(jax.tree.map(lambda *arrays: jnp.stack(arrays), *(state for _, state in of)) for of in layers)
        model.blocks = nnx.List([])
        self._rest, rest = nnx.split(model)
        self.parameters: Parameters = {"layers": stacked, "rest": rest}

    def loss(self, parameters: Parameters, batch: Batch, sharding: Sharding) -> jax.Array:
        """Mean cross entropy of the next byte, in nats; attention is cut where a mesh is active."""
        with cut(sharding):
            logits = self._logits(parameters, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()

    def _logits(self, parameters: Parameters, batch: Batch) -> jax.Array:
        model = nnx.merge(self._rest, parameters["rest"])
        packed = Packed(batch.segments, batch.positions)

        def period(x: jax.Array, states: Any) -> tuple[jax.Array, None]:
            for graph, state in zip(self._graphs, states, strict=True):
                x = _layer(graph, state, x, packed)
            return x, None

        x, _ = lax.scan(period, model.embed(batch.inputs), parameters["layers"])
        return model.logits(x)


@functools.partial(jax.checkpoint, static_argnums=0, policy=jax.checkpoint_policies.save_only_these_names("context"))
def _layer(graph: Any, state: Any, x: jax.Array, packed: Packed) -> jax.Array:
    after, _ = nnx.merge(graph, state)(x, Mode.TRAIN, None, packed)
    return after
