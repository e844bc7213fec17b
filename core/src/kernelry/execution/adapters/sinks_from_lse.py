"""Serves sinks with a kernel that does not take them but returns its statistics."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import Adapter, Cost, Duty
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.request.request import Operand, Request


@final
@dataclasses.dataclass(frozen=True, slots=True)
class SinksFromLse(Adapter):
    """Lets the sinks join the denominator after the kernel: out · sigmoid(lse − sink)."""

    name: ClassVar[str] = "sinks_from_lse"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.SINKS, RefusalCode.GRADIENT})
    duty: ClassVar[Duty | None] = Duty.SINKS

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        if not request.sinks or not capabilities.statistics:
            return None
        return request.rewritten(sinks=False, gradients=request.gradients - {Operand.SINKS})

    def cost(self, before: Request, after: Request) -> Cost:
        rows = before.batch * before.q_heads * before.q_len
        return Cost(extra_bytes=4 * rows, extra_flops=rows * (before.value_dim + 4))
