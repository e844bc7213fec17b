"""A call that is timed: which layer it belongs to, which pass it is, and the arrays that it gets."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterator
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.errors import ArgumentError, ConfigError
from kernelry.masks.base import Mask
from kernelry.models.model import LayerKind, config_of
from kernelry.phases.calls import PhaseCall, calls
from kernelry.phases.model_shape import ModelShape
from kernelry.phases.resolving import naming
from kernelry.policy.policy import Policy
from kernelry.request.request import Mode, Request
from kernelry.request.target import Target
from kernelry.tuning.operands import operands


@final
class Pass(enum.Enum):
    """What of a layer is timed."""

    FORWARD = "forward"
    BOTH = "forward+backward"
    DECODE = "decode"

    @classmethod
    def parse(cls, text: str) -> Pass:
        """Reads a pass.

        Raises:
          ArgumentError: it is unknown.
        """
        try:
            return cls(text)
        except ValueError:
            known = ", ".join(each.value for each in cls)
            raise ArgumentError(f"unknown pass {text!r}; there are {known}.") from None

    @property
    def mode(self) -> Mode:
        """The mode of its calls: a forward pass alone is that of a prompt."""
        return {Pass.FORWARD: Mode.PREFILL, Pass.BOTH: Mode.TRAIN, Pass.DECODE: Mode.DECODE}[self]


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A call that is timed.

    Args:
      name: of the shape, the config or the kind of layers, with the part of the cache where there are several.
      which: the pass.
      call: the call.
      policy: of its config: only kernels that it allows are timed.
      mask_is_given: whether the arrays of the call's mask are those to time with; else its ids are one segment and so
        on, as `kernelry.tuning.operands` says.
    """

    name: str
    which: Pass
    call: PhaseCall
    policy: Policy
    mask_is_given: bool = False

    @property
    def request(self) -> Request:
        """The request of the call."""
        return self.call.request

    @property
    def length(self) -> int:
        """What grows in a picture: T, and of a decode step the slots S."""
        return self.request.kv_len if self.which is Pass.DECODE else self.request.q_len

    @property
    def series(self) -> tuple[Any, ...]:
        """What cases that differ by their length alone have in common."""
        return self.name, self.which, self.request.batch, self.request.dtype

    def __str__(self) -> str:
        letter = "S" if self.which is Pass.DECODE else "T"
        return f"{self.name} {self.which.value} {letter}={self.length} B={self.request.batch}"

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `kernelry.aot.layers.attention_of`, as arrays, and the weights [B, T, N, D] of the loss."""
        *given, leaves = operands(self.call)
        if self.mask_is_given:
            leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(self.call.mask)]
        request = self.request
        size = request.batch, request.q_len, request.q_heads, request.value_dim
        random = np.random.default_rng(1)
        weights = jnp.asarray(random.standard_normal(size, np.float32)).astype(request.dtype)
        return *given, leaves, weights

    def mask_of(self, arguments: tuple[Any, ...]) -> Mask:
        """The mask with the arrays of these arguments."""
        mask: Mask = jax.tree.unflatten(jax.tree.structure(self.call.mask), arguments[5])
        return mask


def cases_of(layer: Any, shape: ModelShape, target: Target, passes: Collection[Pass], name: str = "") -> Iterator[Case]:
    """The calls of a layer's passes.

    Args:
      layer: a config or a kind of layers.
      shape: their sizes.
      target: the device.
      passes: which are wanted; a layer may not have all.
      name: of the layer; empty is the kind's name, or `config`.

    Raises:
      ArgumentError: the shape does not fit the layer.
      ConfigError: the calls are on a mesh.
    """
    named = name or (layer.name if isinstance(layer, LayerKind) else "config")
    with naming(layer):
        asked = calls(layer, shape, target)
    for which in Pass:
        mine = [call for call in asked if call.request.mode is which.mode]
        for call in mine if which in passes else ():
            if call.request.sharding is not None:
                raise ConfigError(
                    f"{named}: {call.name} is on a mesh, and bench times calls on one device: pass --sharding '', with "
                    "the lengths and the heads that one device has."
                )
            part = f" ({call.name})" if len(mine) > 1 else ""
            given = not isinstance(shape.mask, str) and which is not Pass.DECODE
            yield Case(f"{named}{part}", which, call, config_of(layer).policy, given)
