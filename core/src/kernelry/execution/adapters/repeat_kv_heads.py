"""Serves grouped heads with a kernel that needs as many key/value heads as query heads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp

from kernelry.execution.adapters.base import Adapter, Cost, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request


@final
@dataclasses.dataclass(frozen=True, slots=True)
class RepeatKVHeads(Adapter):
    """Repeats each key/value head for the G query heads that read it."""

    name: ClassVar[str] = "repeat_kv_heads"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.HEAD_GROUPS})
    on_keys: ClassVar[bool] = True

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        return request.rewritten(kv_heads=request.q_heads)

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        key, value = (jnp.repeat(array, before.groups, axis=2) for array in (inputs.key, inputs.value))
        return dataclasses.replace(inputs, key=key, value=value)

    def cost(self, before: Request, after: Request) -> Cost:
        elements = after.kv_heads * before.batch * before.kv_len * (before.head_dim + before.value_dim)
        return Cost(extra_bytes=elements * itemsize(before.dtype))
