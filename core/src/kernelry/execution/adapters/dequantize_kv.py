"""Serves quantised keys and values with a kernel that reads only plain ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import CURED_ON_KEYS, Adapter, Cost, itemsize, stored_width
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request
from kernelry.storage import VALUE_IN_KEY


@final
@dataclasses.dataclass(frozen=True, slots=True)
class DequantizeKV(Adapter):
    """Multiplies values and scale in float32, and rounds to the query's dtype. Pages are gathered first."""

    name: ClassVar[str] = "dequantize_kv"
    cures: ClassVar[frozenset[RefusalCode]] = CURED_ON_KEYS | {RefusalCode.KV_QUANTIZATION}

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        if request.kv_quantization is None or request.page_size is not None:
            return None
        return request.rewritten(kv_quantization=None)

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        value = inputs.value if before.kv_layout == VALUE_IN_KEY else inputs.value.dequantize(after.dtype)
        return dataclasses.replace(inputs, key=inputs.key.dequantize(after.dtype), value=value)

    def cost(self, before: Request, after: Request) -> Cost:
        elements = before.batch * before.kv_len * before.kv_heads * stored_width(before)
        return Cost(extra_bytes=elements * itemsize(after.dtype), extra_flops=elements)
