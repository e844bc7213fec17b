"""tokamax's splash attention: sinks, maximum logits and masks that only the running program knows.

Source: tokamax._src.ops.experimental.tpu.splash_attention, tokamax 0.0.12 … 0.0.17.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernelry.plugin import AtomKind, Gradients, Inputs, Kernel, Partial, Request, Tiling
from kernelry_tpu_splash.blocks import LAYOUTS, checked_sizes, one_of
from kernelry_tpu_splash.computed_masks import ComputedMask, query_positions, segment_rows
from kernelry_tpu_splash.operands import MASK_VALUE, heads_first, largest, scaled, swapped, visible, with_empty_rows
from kernelry_tpu_splash.tokamax_splash import _vendor
from kernelry_tpu_splash.tokamax_splash.mask_info import of_booleans, of_columns, of_rows

_SCOPE = "kernelry.tokamax_splash"
_NAME = "tokamax_splash"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class TokamaxSplashKernel(Kernel):
    """tokamax's splash attention. Without statistics, the vendor's own derivative is kept, of sinks too."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        def one_row(kernel: Any, q: Any, k: Any, v: Any, ids: Any, sinks: Any) -> Any:
            return _vendor.attend(kernel, q, k, v, ids, sinks)

        with jax.named_scope(_SCOPE), _as_the_vendor_broadcasts():
            wanted = statistics or request.max_logits
            sinks = None
            if inputs.sinks is not None:
                sinks = jnp.broadcast_to(inputs.sinks, (request.batch, request.q_heads))
            result = _run(one_row, inputs, request, tiling, wanted, sinks)
            if not wanted:
                return Partial(swapped(result), dtype=request.dtype)
            out, found = result
            max_logits = largest(found["max_logits"]) if request.max_logits else None
            if not statistics:
                return Partial(swapped(out), max_logits=max_logits, dtype=request.dtype)
            return with_empty_rows(swapped(out), found["logsumexp"], request, max_logits)

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
        def one_row(kernel: Any, q: Any, k: Any, v: Any, ids: Any, whole: Any) -> Any:
            o, total, d_o = whole
            residuals = (q, k, v, ids, None, o, total, kernel.dkv_mask_info, *_vendor.MORE_RESIDUALS)
            return _vendor.splash_attention_bwd(**kernel.kwargs, res=residuals, grads=d_o)[2:5]

        with jax.named_scope(_SCOPE), _as_the_vendor_broadcasts():
            whole = swapped(out), lse, swapped(d_out.astype(inputs.query.dtype))
            d_query, d_key, d_value = _run(one_row, inputs, request, tiling, False, whole)
            if d_key.shape[1] != request.kv_heads:
                d_key, d_value = (_summed(share, request) for share in (d_key, d_value))
            return Gradients(scaled(swapped(d_query), request), swapped(d_key), swapped(d_value))


def _as_the_vendor_broadcasts() -> contextlib.AbstractContextManager[None]:
    """Segments of different ranks are compared by tokamax 0.0.17, which a program may have forbidden for itself."""
    allowed: contextlib.AbstractContextManager[None] = jax.numpy_rank_promotion("allow")
    return allowed


def _run(one_row: Any, inputs: Inputs, request: Request, tiling: Tiling, statistics: bool, more: Any) -> Any:
    """Calls `one_row(kernel, q, k, v, ids, more)` with the arrays of each batch row.

    Args:
      one_row: of arrays [heads, length, dim].
      more: a pytree of arrays [B, N, …].

    Returns:
      What it returns, arrays [B, heads, …]. Under a dense mask that differs by head, keys and values are repeated.
    """
    settings = _KernelSettings(request.soft_cap, tiling, statistics, request.is_interpreted)
    query, key, value = heads_first(inputs, request)
    if any(atom.kind is AtomKind.DENSE for atom in request.mask.atoms):
        return _run_dense(
            one_row, settings, visible(inputs, request, q_len=request.q_len), request, (query, key, value), more
        )
    kernel, positions = ComputedMask.of(inputs, request).build(_built, settings), query_positions(inputs, request)
    rows = segment_rows(inputs)

    def placed(q: Any, k: Any, v: Any, ids: Any, where: Any, own: Any) -> Any:
        return one_row(_at(kernel, where), q, k, v, ids, own)

    return jax.vmap(placed)(query, key, value, None if rows is None else _vendor.SegmentIds(*rows), positions, more)


def _run_dense(
    one_row: Any,
    settings: _KernelSettings,
    seen: Bool[Array, "#B #N T S"],
    request: Request,
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    more: Any,
) -> Any:
    """The same under a mask of booleans, which is one for all heads of a row; else each head is a row of its own."""
    by_head = seen.shape[1] > 1
    if by_head:
        query, key, value = arrays
        key, value = (jnp.repeat(array, request.groups, axis=1) for array in (key, value))
        seen = jnp.broadcast_to(seen, (request.batch, *seen.shape[1:]))
        seen, arrays, more = jax.tree.map(_rows_of_heads, (seen, (query, key, value), more))

    def masked(own_mask: Any, q: Any, k: Any, v: Any, own: Any) -> Any:
        return one_row(_dense_kernel(own_mask[0], settings), q, k, v, None, own)

    if seen.shape[0] == 1:
        result = jax.vmap(functools.partial(masked, seen[0]))(*arrays, more)
    else:
        # One row after another: what the kernel is told of its mask cannot be batched.
        result = jax.lax.map(lambda row: masked(*row), (seen, *arrays, more))
    if not by_head:
        return result
    return jax.tree.map(lambda array: array.reshape(request.batch, request.q_heads, *array.shape[2:]), result)


def _rows_of_heads(array: jax.Array) -> jax.Array:
    """[B, N, …] → [B · N, 1, …]."""
    return array.reshape(array.shape[0] * array.shape[1], 1, *array.shape[2:])


def _summed(share: Float[Array, "B N S D"], request: Request) -> Float[Array, "B K S D"]:
    """The gradient of keys that were repeated."""
    split = share.astype(jnp.float32).reshape(request.batch, request.kv_heads, request.groups, *share.shape[2:])
    return split.sum(axis=2).astype(share.dtype)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _KernelSettings:
    """What a vendor's kernel is built from besides its mask."""

    soft_cap: float | None
    tiling: Tiling
    statistics: bool
    interpret: bool

    def config(self, lengths: tuple[int, int]) -> _vendor.SplashConfig:
        """The vendor's."""
        known = tuple(int(layout) for layout in _vendor.QKVLayout)
        layouts = {name: _vendor.QKVLayout(one_of(_NAME, self.tiling, name, known)) for name in LAYOUTS}
        steps = one_of(_NAME, self.tiling, "dq_reduction_steps", (1, 3))
        return _vendor.SplashConfig(
            **checked_sizes(_NAME, self.tiling, lengths),
            **layouts,
            # Three parts are added to in place, which the interpreter does not see in what it reads.
            dq_reduction_steps=None if steps == 1 or self.interpret else steps,
            attn_logits_soft_cap=self.soft_cap,
            # With base 2 the queries would be multiplied by log₂ e, and rounded to their dtype once more.
            use_base2_exp=False,
            interpret=self.interpret,
        )

    def kernel(self, forward: Any, backward: Any, config: Any, function: Any) -> _vendor.SplashAttentionKernel:
        """The vendor's."""
        return _vendor.SplashAttentionKernel(
            forward,
            backward,
            config=config,
            is_mqa=False,
            save_residuals=self.statistics,
            mask_value=MASK_VALUE,
            mask_function=function,
            fwd_mask_sparsity=1.0,
            dkv_mask_sparsity=1.0,
        )


@functools.lru_cache(maxsize=256)
def _built(mask: ComputedMask, settings: _KernelSettings) -> _vendor.SplashAttentionKernel:
    """The kernel of a mask without arrays; where queries stand may still be missing."""
    config = settings.config(mask.lengths)
    # The arrays are NumPy's: they belong to no device, no mesh and no trace, so the cache outlives them all.
    forward = of_rows(mask.kinds(config.block_q, config.block_kv), mask.asked)
    kinds = mask.kinds(config.block_q_dkv, config.block_kv_dkv)
    backward = of_columns(kinds, mask.asked, walks=config.dq_reduction_steps is not None)
    return settings.kernel(forward, backward, config, mask.function)


def _dense_kernel(seen: Bool[Array, "T S"], settings: _KernelSettings) -> _vendor.SplashAttentionKernel:
    config = settings.config((seen.shape[0], seen.shape[1]))
    walks = config.dq_reduction_steps is not None
    forward = of_booleans(seen, config.block_q, config.block_kv, of_keys=False, walks=True)
    backward = of_booleans(seen, config.block_q_dkv, config.block_kv_dkv, of_keys=True, walks=walks)
    return settings.kernel(forward, backward, config, None)


def _at(kernel: _vendor.SplashAttentionKernel, positions: jax.Array | None) -> _vendor.SplashAttentionKernel:
    """The kernel whose queries stand at positions [T]; None leaves them where they are."""
    if positions is None:
        return kernel
    infos = (kernel.fwd_mask_info, kernel.dkv_mask_info)
    return _vendor.SplashAttentionKernel(*(info._replace(q_sequence=positions) for info in infos), **kernel.kwargs)
