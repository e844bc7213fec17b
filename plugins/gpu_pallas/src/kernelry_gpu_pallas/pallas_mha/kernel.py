"""Flash attention written in Pallas for Triton.

Source: jax.experimental.pallas.ops.gpu.attention.mha, jax 0.10 … 0.12 (deprecated in 0.12).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernelry.errors import ConfigError
from kernelry.masks import Segments
from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling, named
from kernelry_gpu_pallas.pallas_mha import _vendor

_SCOPE = "kernelry.pallas_mha"
_LN_2 = math.log(2.0)
"""The vendor's logsumexp is to base 2."""

_Arrays: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, Int[Array, "B T"] | None]
"""Query, key, value and segment ids."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PallasMhaKernel(Kernel):
    """JAX's Pallas Triton `mha`. Without statistics, the vendor's own derivative is kept."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        ids, dead = _segments(inputs)
        arrays = inputs.query, inputs.key, inputs.value, ids
        if not statistics:
            return Partial(_attended(request, tiling, arrays), dtype=request.dtype)
        out, lse = _called(request, tiling, arrays, statistics=True)
        lse = lse * _LN_2
        if dead is not None:
            out = jnp.where(dead[:, :, None, None], 0, out)
            lse = jnp.where(dead[:, None, :], -jnp.inf, lse)
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
        arrays = inputs.query, inputs.key, inputs.value, _segments(inputs)[0]
        d_query, d_key, d_value, _ = _differentiated(request, tiling, arrays, out, lse / _LN_2, d_out)
        return Gradients(d_query, d_key, d_value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attended(request: Request, tiling: Tiling, arrays: _Arrays) -> Float[Array, "B T N D"]:
    """The vendor's output and derivative, but for names: the vendor gives none to what it keeps."""
    out: jax.Array = _called(request, tiling, arrays, statistics=False)
    return out


def _attended_forward(request: Request, tiling: Tiling, arrays: _Arrays) -> Any:
    out, lse = named(_called(request, tiling, arrays, statistics=True))
    return out, (arrays, out, lse)


def _attended_backward(request: Request, tiling: Tiling, residuals: Any, d_out: jax.Array) -> Any:
    arrays, out, lse = residuals
    return (_differentiated(request, tiling, arrays, out, lse, d_out),)


_attended.defvjp(_attended_forward, _attended_backward)


def _called(request: Request, tiling: Tiling, arrays: _Arrays, *, statistics: bool) -> Any:
    *qkv, ids = arrays
    # Not around the custom_vjp: its inside is lowered without the names that are around it.
    with jax.named_scope(_SCOPE):
        return _vendor.mha(*qkv, segment_ids=ids, return_residuals=statistics, **_options(request, tiling))


def _differentiated(
    request: Request, tiling: Tiling, arrays: _Arrays, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> Any:
    """The gradients of the arrays; lse is to base 2."""
    with jax.named_scope(_SCOPE):
        return _vendor.mha_backward(
            backward_pass_impl="triton",
            num_warps=None,
            num_stages=2,
            grid=None,
            debug=False,
            return_residuals=False,
            res=(*arrays, out, lse),
            do=d_out.astype(arrays[0].dtype),
            **_options(request, tiling),
        )


def _segments(inputs: Inputs) -> tuple[Int[Array, "B T"] | None, Bool[Array, "B T"] | None]:
    """The vendor's ids, and which slots see nothing.

    The vendor lets every id see its like, so a negative one becomes an id of its slot alone. That
    row then sees itself, and `forward` undoes it.
    """
    found = next((mask for mask in inputs.mask if isinstance(mask, Segments)), None)
    if found is None:
        return None, None
    batch, q_len = inputs.query.shape[:2]
    ids = jnp.broadcast_to(jnp.asarray(found.query_ids), (batch, q_len)).astype(jnp.int32)
    dead = ids < 0
    return jnp.where(dead, -1 - jnp.arange(q_len, dtype=jnp.int32), ids), dead


def _options(request: Request, tiling: Tiling) -> dict[str, Any]:
    return {
        "sm_scale": request.scale,
        "causal": any(atom.is_band for atom in request.mask.atoms),
        "block_sizes": _block_sizes(request, tiling),
        "interpret": request.is_interpreted,
    }


def _block_sizes(request: Request, tiling: Tiling) -> _vendor.BlockSizes:
    """Checks what the vendor does not: its backward leaves out the rest of an uneven division."""
    for name, block in tiling.values:
        if request.q_len % block:
            raise ConfigError(f"tiling: {name}={block} of pallas_mha does not divide q_len={request.q_len}")
    if tiling["block_q_dq"] != tiling["block_kv_dkv"]:
        raise ConfigError(
            f"tiling: block_q_dq={tiling['block_q_dq']} of pallas_mha must equal block_kv_dkv={tiling['block_kv_dkv']}"
        )
    return _vendor.BlockSizes(**dict(tiling.values))
