"""Serves values that are stored in the keys with a kernel that needs them as an array of their own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

from jax import lax

from kernelry.execution.adapters.base import CURED_ON_KEYS, Adapter, Cost, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Operand, Request
from kernelry.storage import SEPARATE, VALUE_IN_KEY, Quantization, QuantizedArray


@final
@dataclasses.dataclass(frozen=True, slots=True)
class SeparateKV(Adapter):
    """Slices the values from the keys, quantised ones as they are. Pages are gathered first."""

    name: ClassVar[str] = "separate_kv"
    cures: ClassVar[frozenset[RefusalCode]] = CURED_ON_KEYS | {RefusalCode.KV_LAYOUT}

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        is_array = request.kv_layout == VALUE_IN_KEY and request.page_size is None
        if not is_array or SEPARATE not in capabilities.kv_layouts:
            return None
        both = frozenset({Operand.VALUE}) if Operand.KEY in request.gradients else frozenset()
        return request.rewritten(kv_layout=SEPARATE, gradients=request.gradients | both)

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        key, width = inputs.key, after.value_dim
        if isinstance(key, QuantizedArray):
            value = QuantizedArray(lax.slice_in_dim(key.values, 0, width, axis=3), key.scale)
            return dataclasses.replace(inputs, value=value)
        return dataclasses.replace(inputs, value=lax.slice_in_dim(key, 0, width, axis=3))

    def cost(self, before: Request, after: Request) -> Cost:
        quantized = before.kv_quantization
        size = itemsize(Quantization.parse(quantized).dtype if quantized else before.dtype)
        return Cost(extra_bytes=before.batch * before.kv_len * before.kv_heads * before.value_dim * size)
