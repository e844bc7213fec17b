"""Splash attention: block-sparse flash attention for TPUs.

Source: jax.experimental.pallas.ops.tpu.splash_attention, jax 0.10 … 0.12.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernelry.errors import ConfigError
from kernelry.masks import BlockKind, Segments
from kernelry.plugin import Gradients, Inputs, Kernel, Mask, Partial, PositionKind, Request, Side, Tiling
from kernelry_tpu_splash import _vendor
from kernelry_tpu_splash.splash.mask_info import SlotMask, of_columns, of_rows

_SCOPE = "kernelry.splash"
# A row that sees nothing keeps the vendor's mask value, about −2.4e38, as its logits' maximum.
_NOTHING_SEEN = 0.5 * _vendor.DEFAULT_MASK_VALUE


@final
@dataclasses.dataclass(frozen=True, slots=True)
class SplashKernel(Kernel):
    """JAX's splash attention. Without statistics, the vendor's own derivative is kept."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            query, key, value = _heads_first(inputs, request)
            kernel, positions = _kernel_for(inputs, request, tiling, statistics), _positions(inputs, request)

            def one_row(q: Any, k: Any, v: Any, ids: Any, where: Any) -> Any:
                return _at(kernel, where)(q, k, v, ids)

            result: Any = jax.vmap(one_row)(query, key, value, _segments(inputs), positions)
            if not statistics:
                return Partial(_swapped(result), dtype=request.dtype)
            out, (lse,) = result
            return _partial(_swapped(out), lse, request)

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
        kernel, positions = _kernel_for(inputs, request, tiling, False), _positions(inputs, request)

        def one_row(q: Any, k: Any, v: Any, ids: Any, where: Any, o: Any, total: Any, d_o: Any) -> Any:
            placed = _at(kernel, where)
            residuals = (q, k, v, ids, None, o, total, placed.dq_mask_info, placed.dkv_mask_info)
            return _vendor.splash_attention_bwd(**kernel.kwargs, res=residuals, do=d_o)[3:6]

        with jax.named_scope(_SCOPE):
            query, key, value = _heads_first(inputs, request)
            d_query, d_key, d_value = jax.vmap(one_row)(
                query, key, value, _segments(inputs), positions, _swapped(out), lse, _swapped(d_out.astype(query.dtype))
            )
            return Gradients(_scaled(_swapped(d_query), request), _swapped(d_key), _swapped(d_value))


def _at(kernel: _vendor.SplashAttentionKernel, positions: jax.Array | None) -> _vendor.SplashAttentionKernel:
    """The kernel whose queries stand at positions [T]; None leaves them where they are."""
    if positions is None:
        return kernel
    infos: Any = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    placed = (None if info is None else info._replace(q_sequence=positions) for info in infos)
    return _vendor.SplashAttentionKernel(*placed, **kernel.kwargs)  # type: ignore[arg-type]


def _heads_first(inputs: Inputs, request: Request) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The vendor's layout, [B, heads, length, dim], with the scale in the queries: it takes none."""
    return _swapped(_scaled(inputs.query, request)), _swapped(inputs.key), _swapped(inputs.value)


def _segments(inputs: Inputs) -> _vendor.SegmentIds | None:
    """The vendor's ids, [B, T] and [B, S]; it knows no id that sees nothing, so −1 never meets −2."""
    found = next((mask for mask in inputs.mask if isinstance(mask, Segments)), None)
    if found is None:
        return None
    query_ids = jnp.asarray(found.query_ids)
    kv_ids = query_ids if found.kv_ids is None else jnp.asarray(found.kv_ids)
    batch = inputs.query.shape[0]
    rows = (jnp.broadcast_to(ids, (batch, ids.shape[-1])).astype(jnp.int32) for ids in (query_ids, kv_ids))
    query_rows, kv_rows = rows
    return _vendor.SegmentIds(jnp.where(query_rows < 0, -1, query_rows), jnp.where(kv_rows < 0, -2, kv_rows))


def _scaled(query: jax.Array, request: Request) -> jax.Array:
    # In float32: as a bfloat16 number the scale itself would be off by up to 0.4 %.
    return (query.astype(jnp.float32) * request.scale).astype(query.dtype)


def _swapped(array: jax.Array) -> jax.Array:
    return array.swapaxes(1, 2)


def _partial(out: Float[Array, "B T N D"], lse: Float[Array, "B N T"], request: Request) -> Partial:
    """Gives rows that see nothing their meaning, 0 and −inf; the vendor reports NaN or nonsense there."""
    if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        empty = lse < _NOTHING_SEEN
        out = jnp.where(_swapped(empty[..., None]), jnp.zeros((), out.dtype), out)
        lse = jnp.where(empty, -jnp.inf, lse)
    return Partial(out, lse=lse, dtype=request.dtype)


def _kernel_for(inputs: Inputs, request: Request, tiling: Tiling, statistics: bool) -> _vendor.SplashAttentionKernel:
    """The vendor's kernel for everything but the arrays; where queries stand may still be missing."""
    facts = _Facts(
        tuple(_without_arrays(mask) for mask in inputs.mask if not isinstance(mask, Segments)),
        any(PositionKind.TRACED in atom.position_kinds for atom in request.mask.atoms),
        (request.q_len, request.kv_len),
        request.soft_cap,
        request.interpret and request.target.platform == "cpu",
    )
    return _built(facts, tiling, statistics)


def _without_arrays(mask: Mask) -> Mask:
    """The mask at its positions; where only the running program knows those of the queries, without them."""
    conjunct = mask.conjuncts()[0]
    if conjunct.atom.query.kind is not PositionKind.TRACED:
        return mask
    return dataclasses.replace(conjunct, query=None).located_mask


def _positions(inputs: Inputs, request: Request) -> jax.Array | None:
    """Where the queries stand, int32 [B, T], if only the running program knows."""
    for mask in inputs.mask:
        conjunct = mask.conjuncts()[0]
        if conjunct.atom.query.kind is PositionKind.TRACED:
            positions = Side.query(request.q_len).at(conjunct.query).positions
            return jnp.broadcast_to(positions.reshape(-1, request.q_len), (request.batch, request.q_len))
    return None


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """What a vendor kernel is built from.

    Args:
      masks: without arrays.
      traced: whether the queries stand where only the running program knows; no block can be skipped then.
      lengths: T and S.
    """

    masks: tuple[Mask, ...]
    traced: bool
    lengths: tuple[int, int]
    soft_cap: float | None
    interpret: bool


@functools.lru_cache(maxsize=256)
def _built(facts: _Facts, tiling: Tiling, statistics: bool) -> _vendor.SplashAttentionKernel:
    blocks = _block_sizes(tiling, *facts.lengths)
    mask = SlotMask(facts.masks) if facts.masks else None
    asked = None if mask is None else facts.lengths[0]

    @functools.cache
    def kinds(block_q: int, block_kv: int) -> np.ndarray:
        if mask is None or facts.traced:
            known = BlockKind.FULL if mask is None else BlockKind.PARTIAL
            return np.full((facts.lengths[0] // block_q, facts.lengths[1] // block_kv), known, np.int8)
        return mask.kinds(*facts.lengths, block_q, block_kv)

    fused = bool(blocks.use_fused_bwd_kernel)
    # The arrays are NumPy's: they belong to no device, no mesh and no trace, so the cache outlives them all.
    return _vendor.SplashAttentionKernel(
        of_rows(kinds(blocks.block_q, blocks.block_kv), asked),
        None if fused else of_rows(kinds(blocks.block_q_dq, blocks.block_kv_dq), asked),
        of_columns(kinds(blocks.block_q_dkv, blocks.block_kv_dkv), asked, shrink=not fused),
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=statistics,
        mask_value=_vendor.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=facts.soft_cap,
        residual_checkpoint_name=None,
        mask_function=mask,
        interpret=facts.interpret,
    )


def _block_sizes(tiling: Tiling, q_len: int, kv_len: int) -> _vendor.BlockSizes:
    sizes: dict[str, Any] = {}
    for name, size in tiling.values:
        if not name.startswith("block_"):
            continue
        side, length = ("q_len", q_len) if name.startswith("block_q") else ("kv_len", kv_len)
        block = sizes[name] = min(size, length)  # one block of 1024 holds a sequence of 512
        if block % _vendor.NUM_LANES or length % block:
            raise ConfigError(
                f"tiling: {name}={block} of splash is not a multiple of {_vendor.NUM_LANES} "
                f"that divides {side}={length}"
            )
    for part, whole in (("block_kv_compute", "block_kv"), ("block_kv_dkv_compute", "block_kv_dkv")):
        if sizes[whole] % sizes[part]:
            raise ConfigError(f"tiling: {part}={sizes[part]} of splash does not divide {whole}={sizes[whole]}")
    layouts = {name: _layout(name, tiling[name]) for name in ("q_layout", "k_layout", "v_layout")}
    fused = _one_of("backward_kernels", tiling["backward_kernels"], (1, 2)) == 1
    if fused:
        sizes["block_q_dq"] = sizes["block_kv_dq"] = None
    return _vendor.BlockSizes(**sizes, **layouts, use_fused_bwd_kernel=fused)


def _layout(name: str, value: int) -> _vendor.QKVLayout:
    return _vendor.QKVLayout(_one_of(name, value, tuple(int(layout) for layout in _vendor.QKVLayout)))


def _one_of(name: str, value: int, allowed: tuple[int, ...]) -> int:
    if value not in allowed:
        raise ConfigError(f"tiling: {name}={value} of splash is not {' or '.join(map(str, allowed))}")
    return value
