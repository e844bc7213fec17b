"""Serves quantised keys and values with a kernel that reads only plain ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import CURED_ON_KEYS, Adapter, Cost, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request


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
        key, value = (array.dequantize(after.dtype) for array in (inputs.key, inputs.value))
        return dataclasses.replace(inputs, key=key, value=value)

    def cost(self, before: Request, after: Request) -> Cost:
        elements = before.batch * before.kv_len * before.kv_heads * (before.head_dim + before.value_dim)
        return Cost(extra_bytes=elements * itemsize(after.dtype), extra_flops=elements)
