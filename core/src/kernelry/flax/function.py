"""`attention_fn` for Flax's MultiHeadAttention (nnx) and MultiHeadDotProductAttention (linen)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernelry.api import attention_with_options
from kernelry.config.layer import AttentionConfig, check_config
from kernelry.errors import ArgumentError, ShapeError
from kernelry.flax.kinds import check_bias, check_sizes, said_by
from kernelry.flax.sharded import scope_of, sharding_of
from kernelry.kernel.spec import AUTO
from kernelry.masks import BidirectionalSpans, Causal, Dense, Full, Mask
from kernelry.masks.base import is_mask
from kernelry.masks.fit import not_a_mask
from kernelry.models.model import LayerKind, config_of
from kernelry.request.arguments import CallOptions
from kernelry.request.request import Mode

if TYPE_CHECKING:
    from kernelry.request.sharding import Sharding

_FULL = Full()
_SHIPPED = AttentionConfig()


# linen passes only the keywords it finds named in the signature, so each of them is named here.
def attention_fn(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K D"],
    bias: jax.Array | None = None,
    mask: Any = None,
    *,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    input_positions: jax.Array | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    layer: AttentionConfig | LayerKind | None = None,
    bidirectional: Bool[Array, "*#batch S"] | None = None,
    layer_mask: Mask | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    bias_after_cap: bool = False,
    sinks: Float[Array, " N"] | None = None,
    mode: str | Mode = Mode.TRAIN,
    kernel: str = AUTO,
    config: AttentionConfig = _SHIPPED,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    sharding: Sharding | str | None = None,
) -> Float[Array, "*batch T N D"]:
    """Attention with Flax's arguments, for `attention_fn=` of its attention modules.

    Bind the arguments that Flax does not pass (`layer` and those after it) with `functools.partial`:

        nnx.MultiHeadAttention(…, attention_fn=partial(attention_fn, layer_mask=masks.SlidingWindow(127)))
        nnx.MultiHeadAttention(…, attention_fn=partial(attention_fn, layer=model.kind("sliding")))

    A row that sees no key is 0 (in Flax it is the mean of all values), and softmax is always in float32.

    Args:
      query, key, value: with any number of batch dimensions; K divides N.
      bias: floating, broadcastable to [*batch, N, T, S].
      mask: a kernelry mask; or an array broadcastable to [*batch, N, T, S], boolean or 0 and 1.
      dropout_rng, dropout_rate, deterministic: dropout on the probabilities.
      broadcast_dropout: must be False if there is dropout.
      dtype: query, key and value are cast to it; None means the dtype they promote to.
      precision: the precision of the products.
      module: must be None: attention weights are never computed, so a module cannot keep them.
      is_causal: adds `masks.Causal()`; needs T = S.
      input_positions: must be None: apply rotary embedding in the model.
      force_fp32_for_softmax: has no effect: softmax is always in float32.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: must be None.
      layer: a kind of a model's layers, or the config of a layer: says `layer_mask`, `scale`, `soft_cap`,
        `bias_after_cap` and `config`, whether `sinks` and `bias` are needed, and the heads and head dims of the arrays.
        An argument that says otherwise is an error.
      bidirectional: flags of the tokens, e.g. of an image, each run of which sees itself whatever the masks are.
      layer_mask: a mask combined with `mask` by `&`; None means the layer's, and without a layer no other mask. With
        a layer it may say positions of the layer's mask, `layer.config.mask.at(query_offset=…)`.
      scale, soft_cap, bias_after_cap, sinks, mode, kernel: as in `kernelry.attention`.
      config: how kernels are chosen and calls are sharded, unless an enclosing `use` decides. Its options of
        the layer must have their defaults: Flax's module and the arguments above give those.
      mesh, sharding: as in `AttentionOp`; B is *batch taken together.

    Returns:
      [*batch, T, N, D] in the dtype of the computation.

    Raises:
      ArgumentError: an argument of Flax that is not supported, or one that contradicts the layer, or is missing.
      ShapeError: an array does not fit the others, or the layer.
    """
    _check_servable(
        module=module,
        input_positions=input_positions,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    _check_precision(precision)
    _check_config(config)
    if deterministic:
        dropout_rate, dropout_rng = 0.0, None
    if dropout_rate and broadcast_dropout:
        raise ArgumentError(
            f"broadcast_dropout=True with dropout_rate={dropout_rate} drops the same probabilities in every row and "
            "head, which no kernel here does: build the module with broadcast_dropout=False."
        )
    query, key, value = _promoted(dtype, query, key, value)
    batch = _batch(query, key, value)
    arrays = [_folded(array) for array in (query, key, value)]
    options = CallOptions(
        mode=mode,
        scale=scale,
        soft_cap=soft_cap,
        bias_after_cap=bias_after_cap,
        dropout_rate=dropout_rate,
        precision=precision,
    )
    if layer is not None:
        _check_alone(layer, config, is_causal)
        config, layer_mask, options = said_by(
            layer, layer_mask, options, sinks=sinks, head_dim=query.shape[-1], drops=not deterministic
        )
        check_sizes(config, arrays[0], arrays[1:2], arrays[2:])
        check_bias(config, bias)
    visible = _mask(mask, is_causal, batch, query.shape[-3], key.shape[-3])
    visible = visible if layer_mask is None else visible & layer_mask
    if bidirectional is not None:
        visible = visible | _spans(bidirectional, batch, query.shape[-3], key.shape[-3])
    with scope_of(config, sharding_of(config, mesh, sharding), mode, arrays[0], arrays[1:2]):
        out: jax.Array = attention_with_options(
            *arrays,
            mask=visible,
            bias=None if bias is None else _on_logits("bias", bias, batch),
            sinks=sinks,
            dropout_rng=dropout_rng,
            options=options,
            kernel=kernel,
        )
    return out.reshape(*batch, *out.shape[1:])


_WHY_NOT = {
    "module": "sow_weights=True asks for the attention weights, which a fused kernel never computes: leave it False",
    "input_positions": "attention_fn applies no rotary embedding: apply it in the model, or pass "
    "attention_fn=flax.nnx.dot_product_attention_with_rope",
    "einsum_dot_general": "a kernel computes its own products: leave it None, or use precision=",
    "qk_attn_weights_einsum": "a kernel computes its own products: leave qk_attn_weights_einsum_cls None",
    "attn_weights_value_einsum": "a kernel computes its own products: leave attn_weights_value_einsum_cls None",
}


def _check_servable(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ArgumentError(f"attention_fn got {name}=<{type(value).__name__}>: {_WHY_NOT[name]}.")


def _check_precision(precision: Any) -> None:
    if isinstance(precision, tuple):
        raise ArgumentError(f"precision={precision} differs for the two operands: pass one precision for both.")


_CHOOSING = frozenset({"kernel", "rules", "thresholds", "forbid_adapters", "source", "tilings", "sharding"})


def _check_config(config: AttentionConfig) -> None:
    """Refuses options that only AttentionOp reads, so that none is ignored."""
    check_config(config)
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in given.items():
        if name not in _CHOOSING and value != getattr(_SHIPPED, name):
            shown = getattr(value, "value", value)
            raise ArgumentError(
                "attention_fn only reads how kernels are chosen and calls are sharded from a config, and got "
                f"config.{name}={shown!r}: bind the layer's options with functools.partial (layer_mask=config.mask, "
                "scale=, soft_cap=, sinks=) or use "
                "kernelry.flax.AttentionOp."
            )


def _check_alone(layer: AttentionConfig | LayerKind, config: AttentionConfig, is_causal: bool) -> None:
    """Refuses what says the same as the layer, and may say otherwise."""
    if config != _SHIPPED:
        raise ArgumentError(
            "layer= and config= both say how kernels are chosen: leave config= out, and choose them by "
            "model.choosing(config) for all kinds of layers."
        )
    said = config_of(layer)
    if is_causal and said.sees_later_tokens:
        raise ArgumentError(f"is_causal=True contradicts {said.source}, whose mask {said.mask!r} shows later tokens.")


def _spans(flags: Any, batch: tuple[int, ...], q_len: int, kv_len: int) -> Mask:
    """The mask of the runs of flagged tokens."""
    shape = getattr(flags, "shape", None)
    if shape is None or shape[-1:] != (kv_len,) or q_len != kv_len:
        raise ShapeError(
            f"bidirectional must be booleans [*batch, S] with T = S, got shape {shape} with T={q_len} and S={kv_len}; "
            "for fewer queries than keys use AttentionOp, with Tokens(bidirectional=…, query_offset=…)."
        )
    fits = [size in (1, of_batch) for size, of_batch in zip(shape[-2::-1], batch[::-1], strict=False)]
    if len(shape) > len(batch) + 1 or not all(fits):
        raise ShapeError(
            f"bidirectional must be booleans that broadcast to [*batch, S] with *batch = {list(batch)}, got shape "
            f"{tuple(shape)}."
        )
    return BidirectionalSpans.from_flags(jnp.broadcast_to(flags, (*batch, kv_len)).reshape(-1, kv_len))


def _promoted(dtype: Any, *arrays: jax.Array) -> list[jax.Array]:
    common = jnp.result_type(*arrays) if dtype is None else dtype
    return [jnp.asarray(array, common) for array in arrays]


def _batch(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[int, ...]:
    batch = query.shape[:-3]
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim < 3 or array.shape[:-3] != batch:
            raise ShapeError(
                f"query, key and value must be [*batch, length, heads, depth] with one *batch = {list(batch)}, "
                f"got {name} of shape {array.shape}."
            )
    return batch


def _folded(array: jax.Array) -> jax.Array:
    return array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:])


def _on_logits(name: str, array: Any, batch: tuple[int, ...]) -> jax.Array:
    """Reshapes an array that broadcasts to [*batch, N, T, S] to B N T S; a dimension that can be 1 is."""
    missing = len(batch) + 3 - array.ndim
    padded = jnp.asarray(array).reshape((1,) * missing + array.shape) if missing >= 0 else None
    if padded is None or any(have not in (1, want) for have, want in zip(padded.shape[:-3], batch, strict=True)):
        raise ShapeError(f"{name} must broadcast to [*batch, N, T, S] with *batch = {list(batch)}, got {array.shape}.")
    if any(size != 1 for size in padded.shape[:-3]):
        padded = jnp.broadcast_to(padded, (*batch, *padded.shape[-3:]))
    return _folded(padded)


def _mask(mask: Any, is_causal: bool, batch: tuple[int, ...], q_len: int, kv_len: int) -> Mask:
    given: Mask = _FULL
    if is_mask(mask):
        given = mask
    elif mask is not None:
        if not hasattr(mask, "ndim"):
            raise ShapeError(f"mask must be an array or a kernelry mask, got {not_a_mask(mask)}.")
        visible = _on_logits("mask", mask, batch)
        # Flax's functions that make masks return 0 and 1 in float32 by default.
        given = Dense(visible if visible.dtype == jnp.bool_ else visible > 0)
    if not is_causal:
        return given
    if q_len != kv_len:
        raise ShapeError(
            f"is_causal=True with T={q_len} and S={kv_len} does not give the queries' positions (Flax takes the "
            f"first {q_len}, which hides a cache from a decode step): pass is_causal=False and bind "
            f"layer_mask=masks.Causal().at(query_offset={max(kv_len - q_len, 0)}), or their real positions."
        )
    return given & Causal()
