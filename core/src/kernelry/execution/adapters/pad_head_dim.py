"""Serves any head dim with a kernel that takes only certain ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol, final

import jax
import jax.numpy as jnp
from jax import lax

from kernelry.execution.adapters.base import Adapter, Cost, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.partial import Partial
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request


class WidenHeads(Adapter, Protocol):
    """The array part of adapters that widen heads: columns of zeros behind those of queries and keys, and of values.

    Zeros add nothing to a product; the scale stays what it was. The output is cut back.
    """

    on_keys: ClassVar[bool] = True

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        more = after.head_dim - before.head_dim
        return dataclasses.replace(
            inputs,
            query=_widened(inputs.query, more),
            key=_widened(inputs.key, more),
            value=_widened(inputs.value, after.value_dim - before.value_dim),
        )

    def restore(self, partial: Partial, before: Request, after: Request) -> Partial:
        return dataclasses.replace(partial, out=lax.slice_in_dim(partial.out, 0, before.value_dim, axis=3))

    def cost(self, before: Request, after: Request) -> Cost:
        more, more_values = after.head_dim - before.head_dim, after.value_dim - before.value_dim
        rows, slots = before.q_len * before.q_heads, before.kv_len * before.kv_heads
        elements = (rows + slots) * after.head_dim * bool(more) + (rows + slots) * after.value_dim * bool(more_values)
        pairs = before.q_heads * before.q_len * before.kv_len
        return Cost(
            extra_bytes=before.batch * elements * itemsize(before.dtype),
            extra_flops=2 * before.batch * pairs * (more + more_values),
        )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PadHeadDim(WidenHeads):
    """Widens heads to the nearest dims that the kernel takes."""

    name: ClassVar[str] = "pad_head_dim"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.HEAD_DIM, RefusalCode.SPLIT_HEAD_DIM})

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        dims = capabilities.head_dims
        if dims is None:
            return None
        asked = [size for refusal in refusals if refusal.code in self.cures for size in refusal.pad_to]
        head_dim = max([request.head_dim, *(size for name, size in asked if name == "head_dim")])
        value_dim = max([request.value_dim, *(size for name, size in asked if name == "value_dim")])
        if not capabilities.split_head_dim:
            head_dim = value_dim = max(head_dim, value_dim)
        wide, wide_value = dims.padded(head_dim), dims.padded(value_dim)
        if wide is None or wide_value is None or (wide, wide_value) == (request.head_dim, request.value_dim):
            return None
        return request.rewritten(head_dim=wide, value_dim=wide_value)


def _widened(array: jax.Array, columns: int) -> jax.Array:
    return jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, columns))) if columns else array
