"""The kernel `fa4`.

Source: `fa4_jax.flash_attn` and the primitive behind its derivative, fa4-jax 0.1.0; see `_vendor`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling
from kernelry_gpu_flash_attn.fa4 import _vendor
from kernelry_gpu_flash_attn.fa4._vendor import Settings
from kernelry_gpu_flash_attn.fa4.masks import VendorMask

_SCOPE = "kernelry.fa4"

_Arrays: TypeAlias = tuple[jax.Array, ...]
_Call: TypeAlias = Callable[[Settings, _Arrays, _Arrays], Any]
"""Of the static side, operands with the batch first, and the arrays of the mask."""

_WEIGHTLESS = 1e30
"""An lse next to which no logit has a weight, and which is still finite times log2(e)."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Fa4Kernel(Kernel):
    """FlashAttention-4; core differentiates it by `backward`.

    Args:
      backend: the vendor's name of what computes; None is its kernels, for the target of the request.
    """

    backend: str | None = None

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        settings, arrays = self._asked(inputs, request)
        operands = (inputs.query, inputs.key, inputs.value)
        with jax.named_scope(_SCOPE):
            if not statistics:
                return Partial(_folding(_output, settings, operands, arrays), dtype=request.dtype)
            out, lse = _folding(_output_and_lse, settings, operands, arrays)
            return Partial(out, lse=lse, dtype=request.dtype)

    def backward(
        self,
        inputs: Inputs,
        request: Request,
        tiling: Tiling,
        out: Float[Array, "B T N D"],
        lse: Float[Array, "B N T"],
        d_out: Float[Array, "B T N D"],
        d_lse: Float[Array, "B N T"] | None,
    ) -> Gradients:
        settings, arrays = self._asked(inputs, request)
        dtype = inputs.query.dtype
        rest = (out.astype(dtype), jnp.minimum(lse, _WEIGHTLESS), d_out.astype(dtype))
        with jax.named_scope(_SCOPE):
            operands = (inputs.query, inputs.key, inputs.value, *rest)
            return Gradients(*_folding(_gradients, settings, operands, arrays))

    def _asked(self, inputs: Inputs, request: Request) -> tuple[Settings, _Arrays]:
        mask, backend = VendorMask.of(inputs, request), self.backend
        if backend is None:
            assert request.target.generation is not None, "refused"
            backend = _vendor.backend_for(request.target.generation)
        return Settings(request.scale, mask.window, mask.rule, mask.axes, backend), mask.arrays


def _output(settings: Settings, operands: _Arrays, arrays: _Arrays) -> jax.Array:
    query, key, value = operands
    return _vendor.attend(settings, query, key, value, arrays)


def _output_and_lse(settings: Settings, operands: _Arrays, arrays: _Arrays) -> tuple[jax.Array, jax.Array]:
    query, key, value = operands
    return _vendor.attend_with_statistics(settings, query, key, value, arrays)


def _gradients(settings: Settings, operands: _Arrays, arrays: _Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, out, lse, d_out = operands
    return _vendor.differentiate(settings, (query, key, value), out, lse, d_out, arrays)


def _folding(call: _Call, settings: Settings, operands: _Arrays, arrays: _Arrays) -> Any:
    """Calls the vendor; an axis of `jax.vmap` is folded into the batch, which the vendor does without a mask only."""
    run = custom_vmap(functools.partial(call, settings))
    run.def_vmap(functools.partial(_folded, call, settings))
    return run(operands, arrays)


def _folded(
    call: _Call, settings: Settings, size: int, mapped: Sequence[Any], operands: _Arrays, arrays: _Arrays
) -> tuple[Any, Any]:
    batch = next(array.shape[1 if has else 0] for array, has in zip(operands, mapped[0], strict=True))
    axes = tuple(
        dataclasses.replace(each, row=each.row or has) for each, has in zip(settings.axes, mapped[1], strict=True)
    )
    settings = dataclasses.replace(settings, axes=axes)
    wide = tuple(_wide(array, has, size) for array, has in zip(operands, mapped[0], strict=True))
    by_row = tuple(
        _wide(array, has, size, batch) if each.row else array
        for array, has, each in zip(arrays, mapped[1], axes, strict=True)
    )
    found = _folding(call, settings, wide, by_row)
    unfolded = jax.tree.map(lambda array: array.reshape(size, batch, *array.shape[1:]), found)
    return unfolded, jax.tree.map(lambda _: True, unfolded)


def _wide(array: jax.Array, mapped: bool, size: int, batch: int | None = None) -> jax.Array:
    """The array with the axis in front of the batch, folded into it; `batch` rows are made of one."""
    array = array if mapped else jnp.broadcast_to(array, (size, *array.shape))
    if batch is not None:
        array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
    return array.reshape(-1, *array.shape[2:])
