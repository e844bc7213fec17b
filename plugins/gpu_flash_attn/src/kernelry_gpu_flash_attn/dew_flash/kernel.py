"""FlashAttention-2 and -3 as dew-flash-attn calls them.

Source: dew_flash_attn._forward and _backward, dew_flash_attn 0.3.6.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kernelry.errors import KernelRefusedError
from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling
from kernelry_gpu_flash_attn.dew_flash import _vendor
from kernelry_gpu_flash_attn.dew_flash.sequences import Rows, Sequences, rows_of
from kernelry_gpu_flash_attn.dew_flash.settings import MOST_SEQUENCES, Packing, Settings, seen_by_band

_SCOPE = "kernelry.dew_flash"

_Live: TypeAlias = 'np.ndarray | Bool[Array, "#B L"]'
"""Which rows see some key, or which slots some row sees; in NumPy where the mask has no arrays."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class DewFlashKernel(Kernel):
    """FlashAttention; core differentiates it by `backward`."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            call = functools.partial(_forward, request, Settings.of(request, tiling))
            out, lse = _in_one_batch(call)(inputs.query, inputs.key, inputs.value, rows_of(inputs, request))
            return Partial(out, lse=lse if statistics else None, dtype=request.dtype)

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
        with jax.named_scope(_SCOPE):
            call = functools.partial(_backward, request, Settings.of(request, tiling))
            arrays = inputs.query, inputs.key, inputs.value, rows_of(inputs, request)
            whole = out.astype(request.dtype), lse, d_out.astype(request.dtype)
            return Gradients(*_in_one_batch(call)(*arrays, *whole))


def _in_one_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under `jax.vmap`, which XLA's custom calls do not support, the new axis joins the batch."""
    mapped: Any = jax.custom_batching.custom_vmap(function)

    def rule(size: int, is_mapped: Any, *arrays: Any) -> tuple[Any, Any]:
        def joined(has_axis: bool, array: jax.Array) -> jax.Array:
            whole = array if has_axis else jnp.broadcast_to(array, (size, *array.shape))
            return whole.reshape(size * whole.shape[1], *whole.shape[2:])

        found = mapped(*jax.tree.map(joined, tuple(is_mapped), arrays))
        parts = jax.tree.map(lambda array: array.reshape(size, array.shape[0] // size, *array.shape[1:]), found)
        return parts, jax.tree.map(lambda _: True, found)

    mapped.def_vmap(rule)
    return mapped  # type: ignore[no-any-return]


def _forward(
    request: Request, settings: Settings, query: jax.Array, key: jax.Array, value: jax.Array, rows: Rows
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"]]:
    """The output and its logsumexp, −inf in rows that see nothing; of their output nothing is said."""
    if settings.packing is Packing.WHOLE:
        out, lse = _vendor.forward(query, key, value, None, settings)
        live, _ = seen_by_band(request)
        return out, lse if live.all() else jnp.where(live[None, None, :], lse, -jnp.inf)
    sequences = _packed(rows, settings)
    packed, lse = _vendor.forward(_tokens(query), _tokens(key), _tokens(value), sequences.starts, settings)
    lse = jnp.where(sequences.live_rows[:, None, :], sequences.lse_by_row(lse), -jnp.inf)
    # Ids that packed sequences cannot express are known to the running program alone: nothing looks right then.
    return _unless_in_order(sequences, packed.reshape(query.shape)), _unless_in_order(sequences, lse)


def _backward(
    request: Request,
    settings: Settings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Rows,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradients, 0 in rows that see nothing and in slots that no row sees, whatever the vendor leaves there."""
    if settings.packing is Packing.WHOLE:
        found = _vendor.backward(d_out, query, key, value, out, lse, None, settings)
        return _live(found, *(live[None] for live in seen_by_band(request)))
    sequences = _packed(rows, settings)
    found = _vendor.backward(
        _tokens(d_out),
        _tokens(query),
        _tokens(key),
        _tokens(value),
        _tokens(out),
        sequences.lse_by_sequence(lse, hopper=_vendor.is_hopper(settings.target)),
        sequences.starts,
        settings,
    )
    whole = [share.reshape(array.shape) for share, array in zip(found, (query, key, value), strict=True)]
    whole = [_unless_in_order(sequences, share) for share in whole]
    return _live(whole, sequences.live_rows, sequences.live_slots)


def _packed(rows: Rows, settings: Settings) -> Sequences:
    sequences = Sequences.of(rows, settings)
    count = sequences.starts[0].shape[0] - 1
    if count > MOST_SEQUENCES:
        raise KernelRefusedError(
            f"dew_flash: {count} packed sequences > {MOST_SEQUENCES}, CUDA's limit of a grid; lower the tunable "
            "max_segments or the batch, which contains the axes of jax.vmap."
        )
    return sequences


def _tokens(array: Float[Array, "B L heads H"]) -> Float[Array, "B_L heads H"]:
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _live(gradients: Sequence[jax.Array], rows: _Live, slots: _Live) -> tuple[jax.Array, ...]:
    return tuple(
        gradient if isinstance(live, np.ndarray) and live.all() else jnp.where(live[:, :, None, None], gradient, 0)
        for gradient, live in zip(gradients, (rows, slots, slots), strict=True)
    )


def _unless_in_order(sequences: Sequences, array: jax.Array) -> jax.Array:
    """NaN in the batch rows whose ids are not in runs, or in more runs than the tunable says."""
    if sequences.in_order is None:
        return array
    return jnp.where(sequences.in_order.reshape(-1, *(1,) * (array.ndim - 1)), array, jnp.nan)
