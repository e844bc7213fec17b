"""Serves keys and values in pages with a kernel that reads only arrays, or pages of another layout."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from kernelry.execution.adapters.base import CURED_ON_KEYS, Adapter, Cost, itemsize, stored_width
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request
from kernelry.storage import INTERLEAVED, SEPARATE, VALUE_IN_KEY, Quantization


@final
@dataclasses.dataclass(frozen=True, slots=True)
class GatherPages(Adapter):
    """Copies the pages of each row into one array, quantised ones as they are; interleaved ones into two."""

    name: ClassVar[str] = "gather_pages"
    cures: ClassVar[frozenset[RefusalCode]] = CURED_ON_KEYS | {
        RefusalCode.PAGES,
        RefusalCode.KV_QUANTIZATION,
        RefusalCode.KV_LAYOUT,
    }

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        is_interleaved = request.kv_layout == INTERLEAVED
        if request.page_size is None or (is_interleaved and SEPARATE not in capabilities.kv_layouts):
            return None
        layout = SEPARATE if is_interleaved else request.kv_layout
        return request.rewritten(page_size=None, kv_layout=layout)

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        if before.kv_layout == INTERLEAVED:
            key, value = inputs.key.gather_pair()
            return dataclasses.replace(inputs, key=key, value=value)
        value = inputs.value if before.kv_layout == VALUE_IN_KEY else inputs.value.gather()
        return dataclasses.replace(inputs, key=inputs.key.gather(), value=value)

    def cost(self, before: Request, after: Request) -> Cost:
        elements = before.batch * before.kv_len * before.kv_heads * stored_width(before)
        quantized = before.kv_quantization
        return Cost(extra_bytes=elements * itemsize(Quantization.parse(quantized).dtype if quantized else before.dtype))
