"""cuDNN's fused attention as transformer-engine calls it.

Source: transformer_engine.jax.attention.fused_attn, transformer_engine 2.11 and 2.14 … 2.20.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling
from kernelry_cudnn_te.arrays import rounded
from kernelry_cudnn_te.cudnn_te import _vendor
from kernelry_cudnn_te.cudnn_te.across_devices import Shared
from kernelry_cudnn_te.cudnn_te.largest import apart, folded, joined
from kernelry_cudnn_te.cudnn_te.mesh import alike, resources, with_sequences
from kernelry_cudnn_te.cudnn_te.sequences import Sequences
from kernelry_cudnn_te.cudnn_te.settings import TeSettings
from kernelry_cudnn_te.cudnn_te.vmapped import computed_alone, together

_SCOPE = "kernelry.cudnn_te"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CudnnTeKernel(Kernel):
    """transformer-engine's fused attention. Without statistics, its own derivative is kept, of bias and sinks too."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            inputs = with_sequences(inputs, Shared.of(request))
            if not request.max_logits:
                return _forward(inputs, request, tiling, statistics)
            inputs, inner = folded(inputs, request)
            return apart(_forward(inputs, inner, tiling, statistics), request)

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
            call = _FusedAttnCall.of(with_sequences(inputs, Shared.of(request)), request, tiling, statistics=True)
            auxiliary = lse.swapaxes(1, 2) if call.settings.packed else lse
            arrays = call.arrays | {
                "softmax_aux": auxiliary[..., None],
                "rng_state": jnp.zeros((_vendor.num_of_devices(), 4), jnp.uint32),  # read for dropout alone
                "output": out.astype(request.dtype),
                "doutput": alike(d_out, out).astype(request.dtype),
            }
            arrays = together(arrays, call.alone)
            (d_query, d_key, d_value), d_bias = _vendor.backward(arrays, call.told, call.resource)
            return Gradients(d_query, d_key, d_value, None if request.bias is None else joined(d_bias, request.bias))


def _forward(inputs: Inputs, request: Request, tiling: Tiling, statistics: bool) -> Partial:
    call = _FusedAttnCall.of(inputs, request, tiling, statistics)
    lse = largest = None
    if statistics:
        out, lse, largest = _vendor.forward_with_statistics(call.arrays, call.told, call.resource)
        lse = (lse.swapaxes(1, 2) if call.settings.packed else lse)[..., 0]
    else:
        out = _vendor.forward(call.arrays, call.told, call.resource, functools.partial(_receive, call.alone))
        if request.max_logits:
            out, largest = out
    live, in_order = call.sequences.live, call.sequences.in_order
    if live is not None:
        out = jnp.where(live[:, :, None, None], out, 0)
        lse = None if lse is None else jnp.where(live[:, None, :], lse, -jnp.inf)
        largest = None if largest is None else jnp.where(live.any(), largest, -jnp.inf)
    if in_order is not None:
        # Ids that a packed row cannot hold are known to the running program alone: nothing it returns looks right then,
        # nor do gradients, for which it is a factor.
        out = out * jnp.where(in_order, 1, jnp.nan).astype(out.dtype)[:, None, None, None]
        lse = None if lse is None else jnp.where(in_order[:, None, None], lse, jnp.nan)
        largest = None if largest is None else jnp.where(in_order.all(), largest, jnp.nan)
    if not request.max_logits:
        return Partial(out, lse=lse, dtype=request.dtype)
    return Partial(out, lse=lse, max_logits=jax.lax.stop_gradient(largest), dtype=request.dtype)


def _receive(alone: str, result: Any, pull: Any, cotangent: Any) -> tuple[Any, Any]:
    """Residuals and cotangent mapped together; releases before 2.20 take the latter to be cut as the output is."""
    result, pull, cotangent = together((result, pull, cotangent), alone)
    return pull, jax.tree.map(alike, cotangent, result)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _FusedAttnCall:
    """transformer-engine's arguments: arrays, other arguments, and what the axes of the mesh mean."""

    settings: TeSettings
    sequences: Sequences
    arrays: dict[str, Any]
    told: dict[str, Any]
    resource: Any
    alone: str

    @classmethod
    def of(cls, inputs: Inputs, request: Request, tiling: Tiling, statistics: bool) -> _FusedAttnCall:
        settings = TeSettings.of(request)
        segments = min(tiling["max_segments"], request.q_len) if settings.packed else 1
        sequences, alone = Sequences.of(inputs, request, settings, segments), computed_alone(request, settings)
        # Where the compiler partitions a call, transformer-engine takes them to be cut as the queries are.
        lengths = [alike(array, inputs.query) for array in (sequences.queries, sequences.keys)]
        arrays = {
            "qkv": (inputs.query, inputs.key, inputs.value),
            "bias": None if inputs.bias is None else _whole(inputs.bias, request),
            "sequence_descriptor": _vendor.described(settings.packed, *lengths),
            "seed": _seed(inputs, request),
            "softmax_offset": None if inputs.sinks is None else _offset(inputs.sinks),
        }
        told = _vendor.static_arguments(settings, request, segments)
        resource = resources(request, settings.shared)
        told = {**told, "is_training": True} if statistics else told
        return cls(settings, sequences, together(arrays, alone), told, resource, alone)


def _whole(bias: Float[Array, "#B #N #T #S"], request: Request) -> Float[Array, "#B #N T S"]:
    """The bias as cuDNN reads it."""
    return rounded(jnp.broadcast_to(bias, (*bias.shape[:2], request.q_len, request.kv_len)), request.dtype)


def _offset(sinks: Float[Array, " N"]) -> Float[Array, "1 N 1 1"]:
    return sinks.astype(jnp.float32)[None, :, None, None]


def _seed(inputs: Inputs, request: Request) -> Array | None:
    """64 bits for each device, as transformer-engine shards them."""
    if not request.dropout_rate:
        return None
    assert inputs.dropout_rng is not None
    return jax.random.bits(inputs.dropout_rng, (_vendor.num_of_devices(), 2), jnp.uint32)
