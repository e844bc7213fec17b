"""What a model's config says about attention: kinds of layers, and the layers of each."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, final

from kernelry.config.layer import HEADS, AttentionConfig, check_config
from kernelry.errors import ArgumentError, ConfigError, nearest
from kernelry.kernel.spec import AUTO
from kernelry.policy.rules import Condition, Rule

_CHOOSING = ("kernel", "rules", "thresholds", "forbid_adapters", "tilings", "sharding")
"""The options of a config that say how kernels are chosen and calls are sharded, and nothing of the layer."""

MOST_LAYERS = 4096
"""Of a model: no model comes near it."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LayerKind:
    """The layers of a model whose attention is the same.

    Args:
      name: e.g. `full`, `sliding` or `chunked`, and a number where several kinds would have one name; in a model with
        an encoder and a decoder `encoder`, `decoder` or `cross` is its first word.
      layers: their numbers, from 0, in the stack that they are in.
      config: their mask, scale, soft cap, sinks, bias, heads and head dims, and how their kernels are chosen.
      rope: whether the model rotates queries and keys by their positions before the call.
      shared_kv: pairs of a layer and the earlier layer whose keys and values it reads; a layer that is not in them
        has its own.
      bidirectional: the tokens that see each other besides the mask, e.g. `image`, each run of them apart; a call
        says which they are by `kernelry.flax.Tokens(bidirectional=…)` or `kernelry.masks.BidirectionalSpans`. None
        means that there are none.
      remarks: what a call must know that the other fields do not say, e.g. which bias is added.
    """

    name: str
    layers: tuple[int, ...]
    config: AttentionConfig
    rope: bool = True
    shared_kv: tuple[tuple[int, int], ...] = ()
    bidirectional: str | None = None
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: the layers, the mask as text, the options that are set, and the other fields."""
        config = {
            name: getattr(self.config, name) for name in _SHOWN if getattr(self.config, name) not in (None, False)
        }
        return {
            "name": self.name,
            "layers": list(self.layers),
            "mask": str(self.config.mask.form),
            **config,
            "rope": self.rope,
            "shared_kv": [list(pair) for pair in self.shared_kv],
            "bidirectional": self.bidirectional,
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        data = self.to_json()
        facts = [f"mask={data['mask']}", *(f"{name}={_written(data[name])}" for name in _SHOWN if name in data)]
        facts += [] if self.rope else ["without RoPE"]
        facts += [f"keys and values of earlier layers in {len(self.shared_kv)} layers"] if self.shared_kv else []
        facts += [] if self.bidirectional is None else [f"{self.bidirectional} tokens see each other"]
        return f"{self.name}: layers {ranges(self.layers)}: {', '.join([*facts, *self.remarks])}"


_SHOWN = ("scale", "soft_cap", "sinks", "bias", "bias_after_cap", *HEADS)


def _written(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class OtherLayers:
    """Layers that do not attend, or whose attention cannot be described by a config.

    Args:
      name: e.g. `linear_attention`.
      layers: their numbers, from 0.
      why: one sentence.
    """

    name: str
    layers: tuple[int, ...]
    why: str

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    def __str__(self) -> str:
        return f"{self.name}: layers {ranges(self.layers)}: {self.why}"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What a model's config says about attention.

    Args:
      model_type: as its config names it, e.g. `gemma3_text`.
      kinds: the kinds of its layers, in the order of their first layers.
      others: layers that do not attend, or whose attention is not described.
      source: where the config was read.
      facts: the release of the library whose code says what the config leaves open, e.g. `transformers 5.24.0`.
      remarks: what is true of the whole model.
    """

    model_type: str
    kinds: tuple[LayerKind, ...]
    others: tuple[OtherLayers, ...] = ()
    source: str = "config"
    facts: str = ""
    remarks: tuple[str, ...] = ()

    def kind(self, name: str) -> LayerKind:
        """Returns the kind of a name.

        Raises:
          ConfigError: the model has no such kind.
        """
        for kind in self.kinds:
            if kind.name == name:
                return kind
        for other in self.others:
            if other.name == name:
                raise ConfigError(f"{self.source}: layers {name!r} have no config: {other.why}")
        known = [kind.name for kind in self.kinds]
        raise ConfigError(f"{self.source}: unknown kind of layers {name!r}{nearest(str(name), known)}")

    def of_layer(self, layer: int, stack: str = "") -> LayerKind:
        """Returns the kind of a layer.

        Args:
          layer: its number, from 0.
          stack: `encoder`, `decoder` or `cross` in a model that has them; cross attention is only found by its name.

        Raises:
          ConfigError: there is no such layer, it has no attention that is described, or layers of several stacks have
            its number and the stack is not said.
        """
        found = [kind for kind in self.kinds if layer in kind.layers and kind.name.startswith(stack)]
        if not stack:
            found = [kind for kind in found if not kind.name.startswith("cross")] or found
        if len(found) > 1:
            names = " and ".join(kind.name for kind in found)
            raise ConfigError(
                f"{self.source}: {names} have a layer {layer}; say which, e.g. stack={found[0].name.split()[0]!r}."
            )
        if found:
            return found[0]
        if stack and not any(kind.name.startswith(stack) for kind in self.kinds):
            raise ConfigError(f"{self.source}: there is no stack {stack!r}; the kinds of layers are {self._kinds}.")
        for other in self.others:
            if layer in other.layers:
                raise ConfigError(f"{self.source}: layer {layer} has no config: {other.why}")
        raise ConfigError(f"{self.source}: there is no layer {layer!r}; the model has {self.layer_count} layers.")

    @property
    def _kinds(self) -> str:
        return ", ".join(kind.name for kind in self.kinds)

    @property
    def layer_count(self) -> int:
        """How many layers the model has; of an encoder and a decoder, the longer one's."""
        layers = [*(kind.layers for kind in self.kinds), *(other.layers for other in self.others)]
        return 1 + max(max(numbers) for numbers in layers)

    def choosing(self, config: AttentionConfig) -> Model:
        """Returns this model with kernels chosen, and calls sharded, as a config says.

        Args:
          config: its kernel, rules, thresholds, forbidden adapters, tilings and sharding are taken, and nothing else.
        """
        check_config(config)
        chosen: dict[str, Any] = {name: getattr(config, name) for name in _CHOOSING}
        if config.kernel != AUTO:  # as a rule, so that explanations name the config that decides
            named = Rule(Condition(), (config.kernel,), source=f"{config.source}: kernel = {config.kernel!r}")
            chosen |= {"kernel": AUTO, "rules": (named, *config.rules)}
        kinds = (dataclasses.replace(kind, config=dataclasses.replace(kind.config, **chosen)) for kind in self.kinds)
        return dataclasses.replace(self, kinds=tuple(kinds))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "model_type": self.model_type,
            "source": self.source,
            "facts": self.facts,
            "kinds": [kind.to_json() for kind in self.kinds],
            "others": [other.to_json() for other in self.others],
            "remarks": list(self.remarks),
        }

    @property
    def headline(self) -> str:
        """The config's source, the type of the model, its number of layers, and whose facts are added, on one line."""
        return f"{self.source}: {self.model_type}, {self.layer_count} layers; facts of {self.facts or 'the config'}"

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {each}" for each in (*self.kinds, *self.others, *self.remarks))])


def config_of(layer: AttentionConfig | LayerKind) -> AttentionConfig:
    """Returns a config, or that of a kind of layers.

    Raises:
      ArgumentError: it is neither.
    """
    if isinstance(layer, Model):
        raise ArgumentError(
            f"{layer.source} is a whole model, with layers of these kinds: {layer._kinds}; pass one of them, "
            f"model.kind({layer.kinds[0].name!r}), or that of a layer, model.of_layer(0)."
        )
    config = layer.config if isinstance(layer, LayerKind) else layer
    check_config(config)
    return config


def ranges(numbers: tuple[int, ...]) -> str:
    """Writes numbers compactly: `0-4, 6-10`, or `0, 2, …, 30` where the distance is always the same."""
    if len(numbers) > 3 and len({after - before for before, after in itertools.pairwise(numbers)}) == 1:
        step = numbers[1] - numbers[0]
        return f"{numbers[0]}-{numbers[-1]}" if step == 1 else f"{numbers[0]}, {numbers[1]}, …, {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
