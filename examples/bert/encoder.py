"""The encoder in Flax: a padded batch of tokens to one vector for each sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bert.checkpoint import Checkpoint
from kernelry import Mode, masks
from kernelry.flax import AttentionOp
from kernelry.models import LayerKind, Model

Tensors = Mapping[str, np.ndarray]


class Attention(nnx.Module):
    """Multi-head attention with biases, which sees the whole sentence."""

    def __init__(self, checkpoint: Checkpoint, name: str, kind: LayerKind) -> None:
        width, tensors = checkpoint.config["hidden_size"], checkpoint.tensors
        heads = (kind.config.q_heads, kind.config.head_dim)
        self.query = _linear(tensors, f"{name}.self.query", width, heads)
        self.key = _linear(tensors, f"{name}.self.key", width, heads)
        self.value = _linear(tensors, f"{name}.self.value", width, heads)
        self.out = _linear(tensors, f"{name}.output.dense", heads, width)
        self.attend = AttentionOp(kind)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        # Padding follows the tokens, so one length per row says it all: the layer's own mask and no key past it.
        # Queries past it see the same keys; nothing reads their rows, and pooling leaves them out.
        mask = self.attend.mask & masks.Lengths(lengths)
        return self.out(self.attend(self.query(x), self.key(x), self.value(x), mask=mask, mode=Mode.PREFILL))


class Layer(nnx.Module):
    """Attention and a feed-forward, each around a residual and before a norm."""

    def __init__(self, checkpoint: Checkpoint, name: str, kind: LayerKind) -> None:
        config, tensors = checkpoint.config, checkpoint.tensors
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.attention = Attention(checkpoint, f"{name}.attention", kind)
        self.attention_norm = _norm(checkpoint, f"{name}.attention.output.LayerNorm")
        self.up = _linear(tensors, f"{name}.intermediate.dense", width, hidden)
        self.down = _linear(tensors, f"{name}.output.dense", hidden, width)
        self.norm = _norm(checkpoint, f"{name}.output.LayerNorm")

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, lengths))
        return self.norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """Tokens to sentence vectors of length 1: embeddings, layers, and the mean over a sentence's tokens.

    Args:
      checkpoint: the files.
      model: what its config says about the attention of each layer.
    """

    def __init__(self, checkpoint: Checkpoint, model: Model) -> None:
        config, tensors = checkpoint.config, checkpoint.tensors
        width = config["hidden_size"]
        self.words = _embed(tensors, "word_embeddings", config["vocab_size"], width)
        self.positions = _embed(tensors, "position_embeddings", config["max_position_embeddings"], width)
        self.types = _embed(tensors, "token_type_embeddings", config["type_vocab_size"], width)
        self.norm = _norm(checkpoint, "embeddings.LayerNorm")
        numbers = range(config["num_hidden_layers"])
        self.layers = nnx.List(
            [Layer(checkpoint, f"encoder.layer.{number}", model.of_layer(number)) for number in numbers]
        )

    def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns vectors [B, F].

        Args:
          ids: [B, T], of which the first lengths[b] of row b are tokens.
          lengths: [B].
        """
        slots = jnp.arange(ids.shape[1])[None]
        # A sentence is of type 0; the second of a pair would be of type 1.
        x = self.norm(self.words(ids) + self.positions(slots) + self.types(jnp.zeros_like(slots)))
        for layer in self.layers:
            x = layer(x, lengths)
        tokens = (slots < lengths[:, None])[..., None]
        mean = jnp.where(tokens, x, 0).sum(axis=1) / lengths[:, None]
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@nnx.jit
def encode(model: Encoder, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Calls the encoder, compiled once for each shape of `ids`."""
    return model(ids, lengths)


def _linear(tensors: Tensors, name: str, inner: Any, outer: Any) -> nnx.LinearGeneral:
    """A linear layer from or to heads, too; PyTorch keeps [out, in], Flax [in, out]."""
    return nnx.LinearGeneral(
        inner,
        outer,
        axis=(-2, -1) if isinstance(inner, tuple) else -1,
        kernel_init=_given(tensors[f"{name}.weight"].T),
        bias_init=_given(tensors[f"{name}.bias"]),
        rngs=nnx.Rngs(0),
    )


def _norm(checkpoint: Checkpoint, name: str) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        checkpoint.config["hidden_size"],
        epsilon=checkpoint.config["layer_norm_eps"],
        scale_init=_given(checkpoint.tensors[f"{name}.weight"]),
        bias_init=_given(checkpoint.tensors[f"{name}.bias"]),
        use_fast_variance=False,  # E[x²] − E[x]² would cancel
        rngs=nnx.Rngs(0),
    )


def _embed(tensors: Tensors, name: str, number: int, width: int) -> nnx.Embed:
    return nnx.Embed(number, width, embedding_init=_given(tensors[f"embeddings.{name}.weight"]), rngs=nnx.Rngs(0))


def _given(values: np.ndarray) -> Callable[..., jax.Array]:
    """An initialiser that draws nothing: it gives these values, cut into heads where the shape says so."""
    return lambda _, shape, dtype: jnp.asarray(values, dtype).reshape(shape)
