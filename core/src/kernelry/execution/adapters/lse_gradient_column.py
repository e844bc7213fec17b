"""Gives the lse of a Partial a gradient with a kernel whose backward takes none."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp
from jax import lax

from kernelry.execution.adapters.base import Adapter, Cost, Duty, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.partial import Partial
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LseGradientColumn(Adapter):
    """Carries the cotangent of lse through a spare column of the values: V | 0, out | −1, d_out | d_lse.

    A backward subtracts delta = Σ out · d_out from the cotangents of the probabilities; with the
    spare column it subtracts delta − d_lse, which is what a gradient through lse asks for.
    """

    name: ClassVar[str] = "lse_gradient_column"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.STATISTICS_GRADIENT})
    on_keys: ClassVar[bool] = True
    settles: ClassVar[frozenset[RefusalCode]] = cures
    duty: ClassVar[Duty | None] = Duty.LSE_GRADIENT

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        dims = capabilities.head_dims
        if dims is None:
            return None
        if capabilities.split_head_dim:
            value_dim = dims.padded(request.value_dim + 1)
            return None if value_dim is None else dataclasses.replace(request, value_dim=value_dim)
        dim = dims.padded(max(request.head_dim, request.value_dim + 1))
        return None if dim is None else dataclasses.replace(request, head_dim=dim, value_dim=dim)

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        def widened(array: jnp.ndarray, columns: int) -> jnp.ndarray:
            return jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, columns))) if columns else array

        more = after.head_dim - before.head_dim
        return dataclasses.replace(
            inputs,
            query=widened(inputs.query, more),
            key=widened(inputs.key, more),
            value=widened(inputs.value, after.value_dim - before.value_dim),
        )

    def restore(self, partial: Partial, before: Request, after: Request) -> Partial:
        return dataclasses.replace(partial, out=lax.slice_in_dim(partial.out, 0, before.value_dim, axis=3))

    def cost(self, before: Request, after: Request) -> Cost:
        more, more_values = after.head_dim - before.head_dim, after.value_dim - before.value_dim
        rows, slots = before.q_len * before.q_heads, before.kv_len * before.kv_heads
        elements = (rows + slots) * (after.head_dim * bool(more) + after.value_dim)
        pairs = before.q_heads * before.q_len * before.kv_len
        return Cost(
            extra_bytes=before.batch * elements * itemsize(before.dtype),
            extra_flops=2 * before.batch * pairs * (more + more_values),
        )
