"""Serves keys and values in pages with a kernel that reads only arrays."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import CURED_ON_KEYS, Adapter, Cost, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request
from kernelry.storage import Quantization


@final
@dataclasses.dataclass(frozen=True, slots=True)
class GatherPages(Adapter):
    """Copies the pages of each row into one array, quantised ones as they are."""

    name: ClassVar[str] = "gather_pages"
    cures: ClassVar[frozenset[RefusalCode]] = CURED_ON_KEYS | {RefusalCode.PAGES, RefusalCode.KV_QUANTIZATION}

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        return None if request.page_size is None else request.rewritten(page_size=None)

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        return dataclasses.replace(inputs, key=inputs.key.gather(), value=inputs.value.gather())

    def cost(self, before: Request, after: Request) -> Cost:
        elements = before.batch * before.kv_len * before.kv_heads * (before.head_dim + before.value_dim)
        quantized = before.kv_quantization
        return Cost(extra_bytes=elements * itemsize(Quantization.parse(quantized).dtype if quantized else before.dtype))
