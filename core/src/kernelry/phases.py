"""Training, prefill and decode of one model, resolved together: what must agree, and what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from kernelry.errors import ArgumentError
from kernelry.kernel import KernelSpec
from kernelry.layer import AttentionConfig, AttentionType, check_config
from kernelry.masks import BlockSelection, Lengths
from kernelry.masks.base import Mask
from kernelry.request import Mode, Request
from kernelry.resolution import Plan, Resolution
from kernelry.resolver import explain
from kernelry.scope import current_scope
from kernelry.target import Target, current_target


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The facts of a model that its config does not hold.

    Args:
      q_len: T, the tokens of a training sequence and of a prompt.
      max_len: S, the slots of the cache that a decode step reads.
      batch: B.
      q_heads, kv_heads: N and K; `kv_heads=None` is N.
      head_dim, value_dim: H and D; `value_dim=None` is H.
      dtype: of query, key and value, and of the cache.
      two_part: whether the cache keeps the prompt apart from what was generated, so that prefill
        and decode return statistics to be merged.

    Raises:
      ArgumentError: the prompt does not fit into the cache.
    """

    q_len: int
    max_len: int
    batch: int = 1
    q_heads: int = 1
    kv_heads: int | None = None
    head_dim: int = 64
    value_dim: int | None = None
    dtype: str = "bfloat16"
    two_part: bool = False

    def __post_init__(self) -> None:
        if self.max_len < self.q_len:
            raise ArgumentError(
                f"max_len={self.max_len} slots cannot hold the prompt of q_len={self.q_len} tokens; raise max_len."
            )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """The resolutions of one model; `disagreements` says what does not fit together.

    Args:
      train: forward and backward over whole sequences.
      prefill: the prompt.
      decode: one token that reads the cache.
      disagreements: one sentence each; empty where all agree.
    """

    train: Resolution
    prefill: Resolution
    decode: Resolution
    disagreements: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Resolution, Resolution, Resolution]:
        """The three resolutions, in order."""
        return self.train, self.prefill, self.decode

    def explain(self) -> str:
        """Returns the three explanations and the disagreements as text."""
        parts = [f"{r.request.mode.value}: {r.explain()}" for r in self.all]
        return "\n".join([*parts, *(f"disagreement: {text}" for text in self.disagreements or ("none",))])

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: train, prefill, decode, disagreements."""
        found = {resolution.request.mode.value: resolution.to_json() for resolution in self.all}
        return {**found, "disagreements": list(self.disagreements)}


def resolve_phases(
    config: AttentionConfig,
    shape: ModelShape,
    *,
    target: Target | str | None = None,
    kernels: tuple[KernelSpec, ...] | None = None,
) -> Phases:
    """Resolves training, prefill and decode of one model, and compares them.

    Compared are the cache's layout as prefill and decode read it (dtype, heads, dimensions), the
    statistics of a cache in two parts, and what the mask means. Nothing is raised where a phase
    has no kernel; that is a disagreement.

    Args:
      config: the layer's options and policy.
      shape: the sizes.
      target: the hardware; None is that of `use`, else the one at hand.
      kernels: the kernels to choose among; None is the installed ones.

    Raises:
      ArgumentError, ConfigError: a size or the target means nothing.
    """
    check_config(config)
    if not isinstance(shape, ModelShape):
        raise ArgumentError(f"shape must be a kernelry.ModelShape, got {type(shape).__name__}.")
    where = _target(target)
    train, prefill, decode = (
        explain(call.request, kernels=kernels, policy=config.policy) for call in calls(config, shape, where)
    )
    found = (
        *_unserved((train, prefill, decode)),
        *_layout(prefill, decode),
        *_statistics(prefill, decode),
        *_meaning(config),
    )
    return Phases(train, prefill, decode, found)


def _target(target: Target | str | None) -> Target:
    if isinstance(target, str):
        return Target.parse(target)
    return target or current_scope().target or current_target()


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One phase's call: the request, and a mask of its form whose arrays have the right shapes and no meaning."""

    request: Request
    mask: Mask


def calls(config: AttentionConfig, shape: ModelShape, target: Target) -> tuple[Call, Call, Call]:
    """What train, prefill and decode ask of attention.

    Prefill attends to the prompt itself; a decode step stands anywhere in a cache filled in part.
    """
    # Sinks join once, after the merge of the parts; Request refuses them in a part.
    sinks = config.sinks and not shape.two_part
    # A JAX array is not static, as the offset is not in a loop over tokens.
    step = _chosen(config, config.mask.at(query_offset=jnp.zeros((), jnp.int32)), 1, shape)
    cached = step & Lengths(np.full(shape.batch, shape.q_len, np.int32))
    prompt = _chosen(config, config.mask, shape.q_len, shape)
    return (
        _call(config, shape, target, Mode.TRAIN, prompt, sinks=config.sinks),
        _call(config, shape, target, Mode.PREFILL, prompt, sinks=sinks, partial=shape.two_part),
        _call(config, shape, target, Mode.DECODE, cached, sinks=sinks, partial=shape.two_part),
    )


def _chosen(config: AttentionConfig, mask: Mask, q_len: int, shape: ModelShape) -> Mask:
    """Adds MoBA's choice of blocks, of which only the form matters here."""
    if config.moba is None:
        return mask
    kv_len = shape.max_len if q_len == 1 else q_len
    blocks = -(-kv_len // config.moba.chunk_size)
    selected = np.zeros((shape.batch, shape.kv_heads or shape.q_heads, q_len, blocks), bool)
    return mask & BlockSelection(selected, config.moba.chunk_size)


def _call(config: AttentionConfig, shape: ModelShape, target: Target, mode: Mode, mask: Mask, **facts: Any) -> Call:
    decode, train = mode is Mode.DECODE, mode is Mode.TRAIN
    request = Request(
        target=target,
        mode=mode,
        batch=shape.batch,
        q_len=1 if decode else shape.q_len,
        kv_len=shape.max_len if decode else shape.q_len,
        q_heads=shape.q_heads,
        kv_heads=shape.q_heads if shape.kv_heads is None else shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.head_dim if shape.value_dim is None else shape.value_dim,
        dtype=shape.dtype,
        scale=config.scale,  # type: ignore[arg-type]
        soft_cap=config.soft_cap,
        dropout_rate=config.dropout_rate if train else 0.0,
        logits_dtype=config.logits_dtype,
        precision=config.precision,
        max_logits=config.record_max_logits and train,
        interpret=current_scope().interpret,
        mask=mask.form,
        **facts,
    )
    return Call(request, mask)


def _unserved(resolutions: tuple[Resolution, ...]) -> Iterator[str]:
    for resolution in resolutions:
        if resolution.plan is None:
            reasons = "; ".join(f"{c.name}: {c.refusals[0]}" for c in resolution.refused) or "no kernels are installed"
            yield f"{resolution.request.mode.value}: no kernel serves it ({reasons})"


_LAYOUT = ("dtype", "kv_heads", "head_dim", "value_dim")


def _layout(prefill: Resolution, decode: Resolution) -> Iterator[str]:
    """A cache is written once: where one phase's kernel reads it otherwise, it is rewritten at every step."""
    if prefill.plan is None or decode.plan is None:
        return
    for name in _LAYOUT:
        first, second = (getattr(plan.inner_request, name) for plan in (prefill.plan, decode.plan))
        if first != second:
            yield (
                f"cache layout: the kernel of prefill reads {name}={first} ({_through(prefill.plan)}), that of decode "
                f"{name}={second} ({_through(decode.plan)}); the adapters copy keys and values on every call"
            )


def _through(plan: Plan) -> str:
    return f"{plan.kernel.name}{''.join(f' through {step.adapter.name}' for step in plan.steps)}"


def _statistics(prefill: Resolution, decode: Resolution) -> Iterator[str]:
    """Parts merge in either form of the statistics, but each must have one."""
    for resolution in (prefill, decode):
        if resolution.plan is None or not resolution.request.partial:
            continue
        if not resolution.plan.kernel.capabilities.statistics:
            mode = resolution.request.mode.value
            yield f"statistics: {resolution.kernel} of {mode} returns none that could be merged"


def _meaning(config: AttentionConfig) -> Iterator[str]:
    """In training a query may see later tokens, which one step of decode does not have yet."""
    if config.type in (AttentionType.FULL, AttentionType.BLOCK_DIFFUSION):
        yield (
            f"mask meaning: with type {config.type.value!r} a query of training sees later tokens, and a decode step "
            "of one token does not; decode whole blocks at a time, or choose a causal type"
        )
