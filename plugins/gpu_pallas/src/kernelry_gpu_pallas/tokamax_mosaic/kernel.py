"""Flash attention written in Pallas for Mosaic GPU: one kernel for Hopper, one for Blackwell.

Source: tokamax._src.ops.attention.pallas_mosaic_gpu_kernel_sm90, …_sm100, and …_vjp_kernel_sm90, …_sm100, tokamax
0.0.12 … 0.0.17.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernelry.errors import PluginError
from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling, named
from kernelry_gpu_pallas.tokamax_mosaic import _vendor
from kernelry_gpu_pallas.tokamax_mosaic.blocks import BLACKWELL, NAME, check
from kernelry_gpu_pallas.tokamax_mosaic.shift import Shifted
from kernelry_gpu_pallas.tokamax_mosaic.visibility import Visible, is_plainly_causal

_SCOPE = "kernelry.tokamax_mosaic"

_NOTHING_SEEN = -1e38
"""A row that sees nothing keeps about −2.4e38 as its largest logit in tokamax 0.0.12, and −inf in 0.0.17."""

_Arrays: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""Query, key, value and bias."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class TokamaxMosaicKernel(Kernel):
    """tokamax's attention for Hopper and Blackwell. Without statistics, the vendor's kernels differentiate it, too."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        check(request, tiling)
        arrays, visible = _arrays(inputs), Visible.of(inputs, request)
        if not statistics:
            out, top = _attended(request, tiling, arrays, visible)
            return Partial(out, max_logits=top, dtype=request.dtype)
        out, tops, sums, sees = _forward(request, tiling, arrays, visible)
        lse, rest, tops = Shifted.of(inputs.bias, visible, request).shifted_back(tops, sums)
        lse = jnp.where(sees, lse, -jnp.inf)
        max_logits = _of_heads(tops, sees) if request.max_logits else None
        return Partial(out, lse=lse, max_logits=max_logits, dtype=request.dtype, lse_rest=rest)

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
        visible = Visible.of(inputs, request)
        lse = Shifted.of(inputs.bias, visible, request).shifted(lse)
        return Gradients(*_backward(request, tiling, _arrays(inputs), visible, out, lse, d_out))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attended(
    request: Request, tiling: Tiling, arrays: _Arrays, visible: Visible
) -> tuple[jax.Array, jax.Array | None]:
    """The output and, where it is asked for, the largest logit of each head."""
    if not request.max_logits:
        return _called(request, tiling, arrays, visible, statistics=False)[0], None
    (out, top), _ = _attended_forward(request, tiling, arrays, visible)
    return out, top


def _attended_forward(request: Request, tiling: Tiling, arrays: _Arrays, visible: Visible) -> Any:
    out, tops, sums, sees = _forward(request, tiling, arrays, visible)
    shifted = Shifted.of(arrays[3], visible, request)
    lse, rest = shifted.log_sums(tops, sums)
    out, lse, rest = named((out, jnp.where(sees, lse, -jnp.inf), rest))
    top = _of_heads(shifted.shifted_back(tops, sums)[2], sees) if request.max_logits else None
    return (out, top), (arrays, visible, out, lse, rest)


def _attended_backward(request: Request, tiling: Tiling, residuals: Any, cotangents: Any) -> Any:
    arrays, visible, out, lse, rest = residuals
    # Probabilities of exp(logits − lse) are too large by exp(rest); the gradients are linear in d_out.
    d_out = cotangents[0].astype(jnp.float32) * jnp.exp(-rest).swapaxes(1, 2)[..., None]
    return _backward(request, tiling, arrays, visible, out, lse, d_out), None


_attended.defvjp(_attended_forward, _attended_backward)


def _arrays(inputs: Inputs) -> _Arrays:
    return inputs.query, inputs.key, inputs.value, inputs.bias


def _forward(
    request: Request, tiling: Tiling, arrays: _Arrays, visible: Visible
) -> tuple[Float[Array, "B T N D"], Float[Array, "B N T"], Float[Array, "B N T"], Bool[Array, "B N T"]]:
    """The output; of each row's shifted logits the largest and Σ exp(logits − largest); whether the row sees a key."""
    out, (tops, sums) = _called(request, tiling, arrays, visible, statistics=True)
    sees = (tops > _NOTHING_SEEN) & (sums > 0)
    return out, jnp.where(sees, tops, 0.0), jnp.where(sees, sums, 1.0), sees


def _of_heads(tops: Float[Array, "B N T"], sees: Bool[Array, "B N T"]) -> Float[Array, "B N"]:
    """The largest logit of each head; −inf where no row sees anything."""
    found: jax.Array = jnp.where(sees, tops, -jnp.inf).max(axis=2)
    return found


def _called(request: Request, tiling: Tiling, arrays: _Arrays, visible: Visible, *, statistics: bool) -> Any:
    vendor, config = _forward_of(request, tiling)

    def one_row(*arrays: Any) -> Any:
        return vendor.flash_attention_kernel(
            *arrays,
            is_causal=is_plainly_causal(request),
            logits_soft_cap=None,
            logits_scale=request.scale,
            out_dtype=jnp.dtype(request.dtype),
            normalize_output=True,
            return_residuals=statistics,
            use_stable_softmax=True,
            rescale_threshold=1.0,
            config=config,
        )

    *qkv, bias = arrays
    given = Shifted.of(bias, visible, request).bias
    return _of_each_row(one_row, *qkv, given, visible.dense, visible.start, visible.end)


def _backward(
    request: Request,
    tiling: Tiling,
    arrays: _Arrays,
    visible: Visible,
    out: Float[Array, "B T N D"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N D"],
) -> _Arrays:
    """The gradients; `lse` is that of the shifted logits."""
    vendor, config = _backward_of(request, tiling)
    *qkv, bias = arrays
    reduced = None if bias is None or bias.shape == (*lse.shape, request.kv_len) else jnp.float32

    def one_row(
        q: Any, k: Any, v: Any, o: Any, d_o: Any, top: Any, row_bias: Any, dense: Any, start: Any, end: Any
    ) -> Any:
        return vendor.flash_attention_vjp_kernel(
            q,
            k,
            v,
            (top, jnp.ones_like(top)),  # exp(logits − lse) / 1
            o,
            d_o,
            row_bias,
            dense,
            start,
            end,
            is_causal=is_plainly_causal(request),
            logits_soft_cap=None,
            logits_scale=request.scale,
            ds_dtype=None if bias is None else reduced or bias.dtype,
            config=config,
        )

    of_whole = out, d_out.astype(qkv[0].dtype), lse
    hidden = Shifted.of(bias, visible, request).bias, visible.dense, visible.start, visible.end
    d_query, d_key, d_value, d_logits = _of_each_row(one_row, *qkv, *of_whole, *hidden)
    if bias is None:
        return d_query, d_key, d_value, None
    alike = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
    return d_query, d_key, d_value, d_logits.sum(axis=alike, keepdims=True).astype(bias.dtype)


def _of_each_row(one_row: Callable[..., Any], *arrays: jax.Array | None) -> Any:
    """Maps over the batch, under the kernel's name; arrays that are the same for all of its rows are not repeated."""
    size = max(array.shape[0] for array in arrays if array is not None)
    alike = [array is None or array.shape[0] != size for array in arrays]
    given = [array[0] if same and array is not None else array for array, same in zip(arrays, alike, strict=True)]
    # Not around the custom_vjp: its inside is lowered without the names that are around it.
    with jax.named_scope(_SCOPE), _vendor.quietly():
        return jax.vmap(one_row, in_axes=tuple(None if same else 0 for same in alike))(*given)


def _forward_of(request: Request, tiling: Tiling) -> tuple[Any, Any]:
    _check_vendor(request)
    stages = min(tiling["num_stages"], request.kv_len // tiling["block_kv"])
    blocks = {"block_q": tiling["block_q"], "block_kv": tiling["block_kv"], "num_stages": stages}
    if request.target.generation == BLACKWELL:
        return _vendor.forward_sm100, _vendor.forward_sm100.Config(**blocks, collective=False)
    return _vendor.forward_sm90, _vendor.forward_sm90.Config(**blocks)


def _backward_of(request: Request, tiling: Tiling) -> tuple[Any, Any]:
    vendor = _vendor.backward_sm100 if request.target.generation == BLACKWELL else _vendor.backward_sm90
    names = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return vendor, vendor.Config(**{name: tiling[name] for name in names}, num_stages=tiling["num_stages_backward"])


def _check_vendor(request: Request) -> None:
    """For another machine, what is installed here is not asked beforehand."""
    if request.target.generation == BLACKWELL and not _vendor.HAS_BLACKWELL:
        raise PluginError(
            f"{NAME}: the tokamax installed here has no kernels for {request.target} that are served; "
            "pip install 'tokamax>=0.0.17' (Python 3.12 or later)"
        )
