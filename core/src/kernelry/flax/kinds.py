"""What a config, or a kind of a model's layers, says of a call: checked against its arrays and its other arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from kernelry.config.layer import AttentionConfig
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks import Mask
from kernelry.masks.form import Atom, AtomKind
from kernelry.models.model import LayerKind, config_of
from kernelry.request.arguments import CallOptions

_POSITIONAL = frozenset(
    {AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.CHUNKED, AtomKind.BLOCK_CAUSAL, AtomKind.PREFIX_LM, AtomKind.ANY_OF}
)
"""The atoms of the masks that configs have, and those that may hide one."""


def check_sizes(config: AttentionConfig, query: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
    """Compares the heads and head dims of a call's arrays with those that the config has.

    Inside a `shard_map` heads may be those of one device, a part of the config's.

    Raises:
      ShapeError: they differ.
    """
    named = [("query", query, ("q_heads", "head_dim"))]
    named += [("key", key, ("kv_heads", "head_dim")) for key in keys]
    named += [("value", value, ("kv_heads", "value_dim")) for value in values]
    is_part = bool(jax.sharding.get_abstract_mesh().manual_axes)
    for array_name, array, names in named:
        shape = getattr(array, "shape", ())
        for name, size in zip(names, shape[2:], strict=False):  # the call refuses other ranks
            said = getattr(config, name)
            fits = said in (None, size) or (is_part and name != "head_dim" and size and said % size == 0)
            if not fits:
                raise ShapeError(
                    f"{array_name} has {name}={size}, and {config.source} has {name}={said}; the layout is "
                    f"[B, length, heads, depth], got shape {tuple(shape)}."
                )


def check_bias(config: AttentionConfig, bias: Any) -> None:
    """Checks that a layer that adds a bias gets one.

    Raises:
      ArgumentError: it does not.
    """
    if config.bias and bias is None:
        raise ArgumentError(
            f"{config.source} adds a bias to the logits, and the call has none: pass bias=, broadcastable to "
            "[B, N, T, S]."
        )


def said_by(
    layer: AttentionConfig | LayerKind,
    mask: Mask | None,
    options: CallOptions,
    *,
    sinks: Any,
    head_dim: int,
    drops: bool,
) -> tuple[AttentionConfig, Mask, CallOptions]:
    """Completes the arguments of `attention_fn` by those that its layer says.

    Args:
      layer: the layer.
      mask: that of the arguments, which may say the positions of the layer's mask, and more; None is the layer's.
      options: those of the arguments; a number that is None is the layer's.
      sinks: those of the arguments.
      head_dim: H.
      drops: whether dropout is on.

    Returns:
      The layer's config, and the mask and the options of the call.

    Raises:
      ArgumentError: an argument contradicts the layer, or the layer needs one that is absent, or is not supported.
    """
    config = config_of(layer)
    options = options.checked()
    for name in ("moba", "record_max_logits"):
        if getattr(config, name):
            raise ArgumentError(f"attention_fn does not support {name} of {config.source}: use AttentionOp.")
    if config.sinks and sinks is None:
        raise ArgumentError(f"{config.source} has sinks, one logit per query head: bind them, sinks=, shape [N].")
    if sinks is not None and not config.sinks:
        raise _contradiction(config, "sinks", "an array", "no sinks")
    default = head_dim**-0.5 if head_dim else 1.0
    own_scale = default if config.scale is None else config.scale
    if not _agree(options.scale, own_scale):
        raise _contradiction(config, "scale", options.scale, own_scale)
    if not _agree(options.soft_cap, config.soft_cap):
        raise _contradiction(config, "soft_cap", options.soft_cap, config.soft_cap)
    if options.bias_after_cap and not config.bias_after_cap:
        raise _contradiction(config, "bias_after_cap", True, False)
    if config.precision is not None and options.precision not in (None, config.precision):
        raise _contradiction(config, "precision", options.precision, config.precision)
    if drops and config.dropout_rate and options.dropout_rate != config.dropout_rate:
        raise _contradiction(config, "dropout_rate", options.dropout_rate, config.dropout_rate)
    completed = dataclasses.replace(
        options,
        scale=config.scale,
        soft_cap=config.soft_cap,
        bias_after_cap=config.bias_after_cap,
        precision=options.precision if config.precision is None else config.precision,
        logits_dtype=config.logits_dtype,
    )
    return config, _mask(config, mask), completed


def _agree(given: float | None, said: float | None) -> bool:
    """Whether a number is the layer's, perhaps in float32, or is not given."""
    return given is None or (said is not None and math.isclose(given, said, rel_tol=2**-23))


def _mask(config: AttentionConfig, given: Mask | None) -> Mask:
    if given is None:
        return config.mask
    if _positional(given) != _positional(config.mask):
        raise ArgumentError(
            f"layer_mask={given!r} contradicts {config.mask!r}, the mask of {config.source}: leave it out; to say the "
            "queries' positions pass layer_mask=config.mask.at(query_offset=…), of the layer's config."
        )
    return given


def _positional(mask: Mask) -> set[tuple[Any, ...]]:
    """What a mask says of positions, wherever its tokens are."""

    def said(atom: Atom) -> tuple[Any, ...]:
        return atom.kind, atom.params

    return {said(atom) for atom in mask.form.atoms if atom.kind in _POSITIONAL}


def _contradiction(config: AttentionConfig, name: str, given: Any, said: Any) -> ArgumentError:
    return ArgumentError(f"{name}={given} contradicts {config.source}, which says {said}; leave {name} out.")
