"""Serves masks that may leave rows without a key with a kernel whose output there is undefined."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import Adapter, Cost, Duty
from kernelry.kernel.capabilities import Capabilities, Gradient
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.request.request import Request


@final
@dataclasses.dataclass(frozen=True, slots=True)
class EmptyRowsFromLse(Adapter):
    """Finds the rows that see nothing by their lse, −inf, and gives them output 0 and zero gradients.

    A kernel that is differentiated by JAX cannot be helped: its derivative runs through that output.
    """

    name: ClassVar[str] = "empty_rows_from_lse"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.EMPTY_ROWS})
    settles: ClassVar[frozenset[RefusalCode]] = cures
    duty: ClassVar[Duty | None] = Duty.EMPTY_ROWS

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        derived_by_jax = request.gradients and capabilities.gradient is Gradient.NATIVE
        return None if derived_by_jax or not capabilities.statistics else request

    def cost(self, before: Request, after: Request) -> Cost:
        rows = before.batch * before.q_heads * before.q_len
        return Cost(extra_bytes=4 * rows, extra_flops=rows * before.value_dim)
