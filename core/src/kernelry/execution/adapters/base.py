"""The Adapter protocol."""

from __future__ import annotations

import dataclasses
import enum
import functools
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Protocol, final

import jax.numpy as jnp
import numpy as np

from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.partial import Partial
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom
from kernelry.masks.side import Side
from kernelry.request.request import Request
from kernelry.storage import VALUE_IN_KEY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool


@final
@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Cost:
    """What an adapter adds to a call: bytes of the arrays it makes, and floating-point operations."""

    extra_bytes: int = 0
    extra_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.extra_bytes + other.extra_bytes, self.extra_flops + other.extra_flops)

    def __str__(self) -> str:
        return f"+{self.extra_bytes / 2**20:.1f} MiB, +{self.extra_flops / 1e6:.1f} MFLOP"


@final
class Duty(enum.Enum):
    """What core does for an adapter with a kernel's statistics, inside its one custom_vjp."""

    SINKS = "sinks"
    """Sinks join the denominator after the kernel."""
    EMPTY_ROWS = "empty_rows"
    """Rows whose lse is −inf become 0, with zero gradients."""
    LSE_GRADIENT = "lse_gradient"
    """The cotangent of lse goes through the last column of the values, which is 0."""


class Adapter(Protocol):
    """Rewrites a request that a kernel refuses into one that it may serve.

    The array part (`prepare`, `restore`) changes inputs and outputs as ordinary JAX; the resolved
    program contains the kernel's operations and exactly these. A statistics adapter has a
    `duty`: core works on the kernel's statistics, inside its one custom_vjp.

    Args:
      name: how policies forbid it and explanations show it.
      cures: the refusals for which it is tried.
      settles: refusals that no longer count inside, though the request still shows their cause.
      duty: what core does on its behalf; None where `prepare` and `restore` are all.
      on_keys: whether it rewrites keys and values, which must then be plain arrays.
    """

    name: ClassVar[str]
    cures: ClassVar[frozenset[RefusalCode]]
    settles: ClassVar[frozenset[RefusalCode]] = frozenset()
    duty: ClassVar[Duty | None] = None
    on_keys: ClassVar[bool] = False

    @abstractmethod
    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        """Returns the request for the kernel inside, or None where this adapter cannot help.

        Args:
          request: what the kernel refuses.
          capabilities: the kernel's.
          refusals: all its reasons, of which at least one has a code in `cures`.
        """

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        """Rewrites the arrays of `before` for `after`."""
        return inputs

    def restore(self, partial: Partial, before: Request, after: Request) -> Partial:
        """Rewrites the result for `after` into that for `before`."""
        return partial

    @abstractmethod
    def cost(self, before: Request, after: Request) -> Cost:
        """What it adds."""


CURED_ON_KEYS = frozenset(
    {
        RefusalCode.DTYPE,
        RefusalCode.HEAD_DIM,
        RefusalCode.SPLIT_HEAD_DIM,
        RefusalCode.HEAD_GROUPS,
        RefusalCode.UNEQUAL_LENGTHS,
        RefusalCode.SEQUENCE_LENGTH,
        RefusalCode.EMPTY_ARRAY,
        RefusalCode.HIDDEN_SLOTS,
        RefusalCode.STATISTICS_GRADIENT,
    }
)
"""What the adapters that rewrite keys and values cure: for them, quantised or paged ones are made plain first."""


@functools.lru_cache(maxsize=64)
def itemsize(dtype: str) -> int:
    """The bytes of one element."""
    return int(np.dtype(jnp.dtype(dtype)).itemsize)


def stored_width(request: Request) -> int:
    """The numbers that are stored for a key and its value: H + D, or H where the values are columns of the keys."""
    return request.head_dim + (0 if request.kv_layout == VALUE_IN_KEY else request.value_dim)


def visible_of(masks: Iterable[Mask], request: Request) -> Bool[Array, "#B #N #T #S"]:
    """Evaluates a conjunction, heads as the queries'."""
    query, kv = Side.query(request.q_len, q_heads=request.q_heads), Side.kv(request.kv_len)
    visible = jnp.ones((1, 1, 1, 1), bool)
    for mask in masks:
        visible = visible & mask.evaluate(query, kv)
    return visible


def aligned(pairs: Iterable[tuple[Atom, Mask]]) -> tuple[Mask, ...]:
    """Sorts masks as `form_of` sorts their atoms."""
    return tuple(mask for _, mask in sorted(pairs, key=lambda pair: pair[0].sort_key))
