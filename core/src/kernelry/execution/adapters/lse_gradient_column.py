"""Gives the lse of a Partial a gradient with a kernel whose backward takes none."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import Duty
from kernelry.execution.adapters.pad_head_dim import WidenHeads
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.request.request import Request


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LseGradientColumn(WidenHeads):
    """Carries the cotangent of lse through a spare column of the values: V | 0, out | −1, d_out | d_lse.

    A backward subtracts delta = Σ out · d_out from the cotangents of the probabilities; with the
    spare column it subtracts delta − d_lse, which is what a gradient through lse asks for.
    """

    name: ClassVar[str] = "lse_gradient_column"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.STATISTICS_GRADIENT})
    settles: ClassVar[frozenset[RefusalCode]] = cures
    duty: ClassVar[Duty | None] = Duty.LSE_GRADIENT

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        dims = capabilities.head_dims
        if dims is None:
            return None
        if capabilities.split_head_dim:
            value_dim = dims.padded(request.value_dim + 1)
            return None if value_dim is None else request.rewritten(value_dim=value_dim)
        dim = dims.padded(max(request.head_dim, request.value_dim + 1))
        return None if dim is None else request.rewritten(head_dim=dim, value_dim=dim)
