"""The Adapter protocol."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar, Protocol, final

from kernelry.capabilities import Capabilities
from kernelry.kernel import Inputs
from kernelry.partial import Partial
from kernelry.refusal import RefusalCode
from kernelry.request import Request


@final
@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Cost:
    """What an adapter adds to a call, in bytes moved or held and in floating-point operations."""

    extra_bytes: int = 0
    extra_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.extra_bytes + other.extra_bytes, self.extra_flops + other.extra_flops)

    def __str__(self) -> str:
        return f"+{self.extra_bytes / 2**20:.1f} MiB, +{self.extra_flops / 1e6:.1f} MFLOP"


class Adapter(Protocol):
    """Rewrites a request that a kernel refuses into one that it may serve.

    An array adapter changes inputs and outputs as ordinary JAX; the resolved program contains
    exactly these operations besides the kernel's. A statistics adapter (`on_statistics`) changes
    nothing here: core works on the kernel's statistics, inside its one custom_vjp.
    """

    name: ClassVar[str]
    cures: ClassVar[frozenset[RefusalCode]]
    on_statistics: ClassVar[bool] = False

    @abstractmethod
    def rewrite(self, request: Request, capabilities: Capabilities) -> Request | None:
        """Returns the request for the kernel inside, or None where this adapter cannot help."""

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        """Rewrites the arrays of `before` for `after`."""
        return inputs

    def restore(self, partial: Partial, before: Request, after: Request) -> Partial:
        """Rewrites the result for `after` into that for `before`."""
        return partial

    @abstractmethod
    def cost(self, before: Request, after: Request) -> Cost:
        """What it adds."""
