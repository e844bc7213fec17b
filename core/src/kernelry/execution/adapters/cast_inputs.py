"""Serves a dtype that a kernel does not take in a wider one."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, final

import jax.numpy as jnp

from kernelry.execution.adapters.base import Adapter, Cost, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.partial import Partial
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request

_TARGETS = ("bfloat16", "float16", "float32")
"""What inputs are cast to, the narrowest first; JAX has no float64 unless it is switched on."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CastInputs(Adapter):
    """Casts query, key and value to the narrowest dtype that loses nothing, and the output back."""

    name: ClassVar[str] = "cast_inputs"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.DTYPE})
    on_keys: ClassVar[bool] = True

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        for dtype in _TARGETS:
            if dtype in capabilities.dtypes and _holds(dtype, request.dtype):
                return request.rewritten(dtype=dtype)
        return None

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        query, key, value = (array.astype(after.dtype) for array in (inputs.query, inputs.key, inputs.value))
        return dataclasses.replace(inputs, query=query, key=key, value=value)

    def restore(self, partial: Partial, before: Request, after: Request) -> Partial:
        out = partial.out if before.partial else partial.out.astype(before.dtype)  # statistics go with a wide output
        return dataclasses.replace(partial, out=out, dtype=before.dtype)

    def cost(self, before: Request, after: Request) -> Cost:
        rows, slots = before.q_len * before.q_heads, before.kv_len * before.kv_heads
        elements = before.batch * (rows + slots) * (before.head_dim + before.value_dim)
        return Cost(extra_bytes=elements * itemsize(after.dtype))


@functools.lru_cache(maxsize=64)
def _holds(wide: str, narrow: str) -> bool:
    """Says whether every number of `narrow` is one of `wide`, which is another dtype."""
    if wide == narrow or not _is_floating(narrow):
        return False
    mine, theirs = jnp.finfo(wide), jnp.finfo(narrow)  # type: ignore[no-untyped-call]
    smallest, its_smallest = mine.minexp - mine.nmant, theirs.minexp - theirs.nmant
    return bool(mine.nmant >= theirs.nmant and mine.maxexp >= theirs.maxexp and smallest <= its_smallest)


def _is_floating(dtype: str) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False  # a Request may name any dtype
