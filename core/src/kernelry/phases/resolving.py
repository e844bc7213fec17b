"""Training, prefill and decode of one model, resolved together, and what does not agree between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, final

from kernelry.config.layer import AttentionConfig, AttentionType, check_config
from kernelry.errors import ArgumentError
from kernelry.execution.plan import Plan
from kernelry.kernel.spec import KernelSpec
from kernelry.phases.calls import calls
from kernelry.phases.model_shape import ModelShape
from kernelry.policy.scope import current_scope
from kernelry.request.request import Mode
from kernelry.request.target import Target, current_target
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.resolver import explain


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """The resolutions of one model; `disagreements` says what does not fit together.

    Args:
      train: forward and backward over whole sequences.
      prefill: the prompt.
      decode: one token that reads the cache, or its first part.
      disagreements: one sentence each; empty where all agree.
      more: the other calls of prefill and decode: other parts of a cache, and a prompt that is read from it.
    """

    train: Resolution
    prefill: Resolution
    decode: Resolution
    disagreements: tuple[str, ...] = ()
    more: tuple[Resolution, ...] = ()

    @property
    def all(self) -> tuple[Resolution, ...]:
        """All resolutions: train, prefill, decode, and then `more`."""
        return self.train, self.prefill, self.decode, *self.more

    def explain(self) -> str:
        """Returns the explanations and the disagreements as text."""
        parts = [f"{r.request.mode.value}: {r.explain()}" for r in self.all]
        return "\n".join([*parts, *(f"disagreement: {text}" for text in self.disagreements or ("none",))])

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: train, prefill, decode, more, disagreements."""
        found = {name: getattr(self, name).to_json() for name in ("train", "prefill", "decode")}
        more = [resolution.to_json() for resolution in self.more]
        return {**found, "more": more, "disagreements": list(self.disagreements)}


def resolve_phases(
    config: AttentionConfig,
    shape: ModelShape,
    *,
    target: Target | str | None = None,
    kernels: tuple[KernelSpec, ...] | None = None,
    changes: bool = True,
) -> Phases:
    """Resolves training, prefill and decode of one model, and compares them.

    It compares the cache's layout as prefill and decode read it (dtype, heads, dimensions), the
    statistics of a cache in two parts, and what the mask means. A phase without a kernel is not an
    error; it is a disagreement.

    Args:
      config: the layer's options and policy.
      shape: the sizes, the cache and the mask.
      target: the hardware; None means that of `use`, else the current device.
      kernels: the kernels to choose from; None means the installed ones.
      changes: as in `kernelry.explain`.

    Raises:
      ArgumentError, ConfigError: a size, the cache, the mask or the target is invalid.
    """
    check_config(config)
    if not isinstance(shape, ModelShape):
        raise ArgumentError(f"shape must be a kernelry.ModelShape, got {type(shape).__name__}.")
    where = current_scope().target or current_target() if target is None else Target.parse(target)
    found = [
        explain(call.request, kernels=kernels, policy=config.policy, changes=changes)
        for call in calls(config, shape, where)
    ]
    train, prefill, decode = (next(r for r in found if r.request.mode is mode) for mode in Mode)
    more = tuple(resolution for resolution in found if not any(resolution is r for r in (train, prefill, decode)))
    disagreements = (*_unserved(found), *_layout(prefill, decode), *_statistics(found), *_meaning(config))
    return Phases(train, prefill, decode, tuple(dict.fromkeys(disagreements)), more)


def _unserved(resolutions: Iterable[Resolution]) -> Iterator[str]:
    for resolution in resolutions:
        if resolution.plan is None:
            yield f"{resolution.request.mode.value}: {resolution.unserved}"


_LAYOUT = ("dtype", "kv_heads", "head_dim", "value_dim")


def _layout(prefill: Resolution, decode: Resolution) -> Iterator[str]:
    """A cache is written once: if the kernel of one phase reads it differently, it is copied at every step."""
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


def _statistics(resolutions: Iterable[Resolution]) -> Iterator[str]:
    """Parts can be merged from either form of the statistics, but each must have one."""
    for resolution in resolutions:
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
