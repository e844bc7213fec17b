"""Training, prefill and decode of one model, resolved together, and what does not agree between them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final, overload

from kernelry.config.layer import AttentionConfig
from kernelry.errors import ArgumentError
from kernelry.execution.plan import Plan
from kernelry.kernel.spec import AUTO, KernelSpec
from kernelry.models.model import LayerKind, Model, config_of
from kernelry.phases.calls import PhaseCall, calls, decodes, is_cross
from kernelry.phases.model_shape import ModelShape
from kernelry.policy.scope import current_scope
from kernelry.request.request import Mode
from kernelry.request.target import Target, current_target
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.resolver import explain


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """The resolutions of one kind of layers; `disagreements` says what does not fit together.

    Args:
      train: forward and backward over whole sequences.
      prefill: the prompt.
      decode: one token that reads the cache, or its first part; None for a LayerKind that does not decode.
      disagreements: one sentence each; empty where all agree.
      more: the other calls of prefill and decode: other parts of a cache, and a prompt that is read from it.
      remarks: what else is to know of the layers' calls.
    """

    train: Resolution
    prefill: Resolution
    decode: Resolution | None
    disagreements: tuple[str, ...] = ()
    more: tuple[Resolution, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Resolution, ...]:
        """All resolutions: train, prefill, decode where there is one, and then `more`."""
        decode = () if self.decode is None else (self.decode,)
        return self.train, self.prefill, *decode, *self.more

    def explain(self) -> str:
        """Returns the explanations, the disagreements and the remarks as text."""
        parts = [f"{r.request.mode.value}: {r.explain()}" for r in self.all]
        return "\n".join(
            [*parts, *(f"disagreement: {text}" for text in self.disagreements or ("none",)), *self.remarks]
        )

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: train, prefill, decode, more, disagreements, remarks."""
        found = {name: getattr(self, name) for name in ("train", "prefill", "decode")}
        return {
            **{name: None if phase is None else phase.to_json() for name, phase in found.items()},
            "more": [resolution.to_json() for resolution in self.more],
            "disagreements": list(self.disagreements),
            "remarks": list(self.remarks),
        }


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ModelPhases:
    """The phases of every kind of a model's layers, by the kind's name: `phases["sliding"].decode.kernel`.

    Args:
      model: the model.
      found: the phases of its kinds, in their order.
    """

    model: Model
    found: tuple[Phases, ...]

    def __getitem__(self, name: str) -> Phases:
        """Returns the phases of the kind of a name.

        Raises:
          ConfigError: the model has no such kind.
        """
        return self.found[self.model.kinds.index(self.model.kind(name))]

    def __iter__(self) -> Iterator[str]:
        return (kind.name for kind in self.model.kinds)

    def __len__(self) -> int:
        return len(self.found)

    def items(self) -> Iterator[tuple[str, Phases]]:
        """Returns the names of the kinds with their phases."""
        return zip(self, self.found, strict=True)

    @property
    def disagreements(self) -> tuple[str, ...]:
        """What does not fit together in each kind, one sentence each, which names the kind."""
        return tuple(f"{name}: {text}" for name, phases in self.items() for text in phases.disagreements)

    def explain(self) -> str:
        """Returns what the model is, and the explanations, disagreements and remarks of each kind, as text."""
        kinds = zip(self.model.kinds, self.found, strict=True)
        return "\n\n".join([str(self.model), *(f"{kind}\n{phases.explain()}" for kind, phases in kinds)])

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: model, kinds by name, disagreements."""
        kinds = {name: phases.to_json() for name, phases in self.items()}
        return {"model": self.model.to_json(), "kinds": kinds, "disagreements": list(self.disagreements)}


@overload
def resolve_phases(
    config: AttentionConfig | LayerKind,
    shape: ModelShape,
    *,
    target: Target | str | None = None,
    kernels: tuple[KernelSpec, ...] | None = None,
    changes: bool = True,
) -> Phases: ...


@overload
def resolve_phases(
    config: Model,
    shape: ModelShape,
    *,
    target: Target | str | None = None,
    kernels: tuple[KernelSpec, ...] | None = None,
    changes: bool = True,
) -> ModelPhases: ...


def resolve_phases(
    config: AttentionConfig | LayerKind | Model,
    shape: ModelShape,
    *,
    target: Target | str | None = None,
    kernels: tuple[KernelSpec, ...] | None = None,
    changes: bool = True,
) -> Phases | ModelPhases:
    """Resolves training, prefill and decode of one model, and compares them.

    It compares the cache's layout as prefill and decode read it (dtype, heads, dimensions), the
    statistics of a cache in two parts, and what the mask means. A phase without a kernel is not an
    error; it is a disagreement.

    Args:
      config: a layer's options and policy; or a kind of a model's layers; or a model, for all of its kinds.
      shape: the sizes, the cache and the mask; heads and head dims that it leaves out are the config's.
      target: the hardware; None means that of `use`, else the current device.
      kernels: the kernels to choose from; None means the installed ones.
      changes: as in `kernelry.explain`.

    Returns:
      The phases; of a model those of each kind, by its name. A LayerKind whose queries see later tokens, as in
      encoders, does not decode: its `decode` is None.

    Raises:
      ArgumentError, ConfigError: a size, the cache, the mask or the target is invalid, or a size is another one than
        the config's.
    """
    if isinstance(config, Model):
        each = (resolve_phases(kind, shape, target=target, kernels=kernels, changes=changes) for kind in config.kinds)
        return ModelPhases(config, tuple(each))
    asked = resolved_calls(config, shape, target=target, kernels=kernels, changes=changes)
    return compared(config, [resolution for _, resolution in asked])


def compared(layer: AttentionConfig | LayerKind, found: Sequence[Resolution]) -> Phases:
    """Compares the resolutions of the calls of all phases of a layer."""
    first = {mode: next((r for r in found if r.request.mode is mode), None) for mode in Mode}
    train, prefill, decode = first[Mode.TRAIN], first[Mode.PREFILL], first[Mode.DECODE]
    assert train is not None
    assert prefill is not None
    more = tuple(resolution for resolution in found if not any(resolution is r for r in first.values()))
    disagreements = (*_unserved(found), *_layout(prefill, decode), *_statistics(found), *_meaning(layer))
    return Phases(train, prefill, decode, tuple(dict.fromkeys(disagreements)), more, remarks_on(layer))


@contextlib.contextmanager
def naming(layer: AttentionConfig | LayerKind) -> Iterator[None]:
    """Puts the name of a kind of layers before the message of an error about it, unless that names it."""
    try:
        yield
    except ArgumentError as error:
        if not isinstance(layer, LayerKind) or layer.config.source in str(error):
            raise
        raise ArgumentError(f"layers {layer.name!r}: {error}") from error


def resolved_calls(
    layer: AttentionConfig | LayerKind,
    shape: ModelShape,
    *,
    target: Target | str | None = None,
    kernel: str = AUTO,
    kernels: tuple[KernelSpec, ...] | None = None,
    changes: bool = True,
) -> tuple[tuple[PhaseCall, Resolution], ...]:
    """Resolves the calls of all phases of a layer; the arguments are those of `resolve_phases` and `explain`."""
    config = config_of(layer)
    if not isinstance(shape, ModelShape):
        raise ArgumentError(f"shape must be a kernelry.ModelShape, got {type(shape).__name__}.")
    where = current_scope().target or current_target() if target is None else Target.parse(target)
    with naming(layer):
        asked = calls(layer, shape, where)
    return tuple(
        (call, explain(call.request, kernel=kernel, kernels=kernels, policy=config.policy, changes=changes))
        for call in asked
    )


def remarks_on(layer: AttentionConfig | LayerKind) -> tuple[str, ...]:
    """What is to know of the calls of a kind of layers, besides their requests."""
    if not isinstance(layer, LayerKind):
        return ()
    remarks = list(layer.remarks)
    if not decodes(layer):
        remarks.append(
            "no decode phase: queries of these layers see later tokens, as in an encoder, so a sequence is computed at "
            "once, without a cache"
        )
    if layer.bidirectional is not None:
        remarks.append(
            f"{layer.bidirectional} tokens see each other: where a call has such tokens, its mask is 'config | spans'"
        )
    return tuple(remarks)


def _unserved(resolutions: Iterable[Resolution]) -> Iterator[str]:
    for resolution in resolutions:
        if resolution.plan is None:
            yield f"{resolution.request.mode.value}: {resolution.unserved}"


_LAYOUT = ("dtype", "kv_heads", "head_dim", "value_dim")


def _layout(prefill: Resolution, decode: Resolution | None) -> Iterator[str]:
    """A cache is written once: if the kernel of one phase reads it differently, it is copied at every step."""
    if decode is None or prefill.plan is None or decode.plan is None:
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


def _meaning(layer: AttentionConfig | LayerKind) -> Iterator[str]:
    """In training a query may see later tokens, which one step of decode does not have yet."""
    config = config_of(layer)
    if decodes(layer) and config.sees_later_tokens and not is_cross(layer):
        window = "" if config.window is None else f" and window={config.window}"
        yield (
            f"mask meaning: with type {config.type.value!r}{window} a query of training sees later tokens, and a "
            "decode step of one token does not; decode whole blocks at a time, or choose a causal type"
        )
