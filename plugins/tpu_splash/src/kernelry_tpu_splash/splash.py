"""Splash attention: block-sparse flash attention for TPUs.

Source: jax.experimental.pallas.ops.tpu.splash_attention, jax 0.10 … 0.12.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernelry.errors import ConfigError
from kernelry.masks import Segments
from kernelry.plugin import Atom, Gradients, Inputs, Kernel, MaskForm, Partial, PositionForm, Request, Tiling
from kernelry_tpu_splash import _vendor

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
            result: Any = jax.vmap(_kernel_for(request, tiling, statistics))(query, key, value, _segments(inputs))
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
        kernel = _kernel_for(request, tiling, False)

        def one_row(q: Any, k: Any, v: Any, ids: Any, o: Any, total: Any, d_o: Any) -> Any:
            residuals = (q, k, v, ids, None, o, total, kernel.dq_mask_info, kernel.dkv_mask_info)
            return _vendor.splash_attention_bwd(**kernel.kwargs, res=residuals, do=d_o)[3:6]

        with jax.named_scope(_SCOPE):
            query, key, value = _heads_first(inputs, request)
            d_query, d_key, d_value = jax.vmap(one_row)(
                query, key, value, _segments(inputs), _swapped(out), lse, _swapped(d_out.astype(query.dtype))
            )
            return Gradients(_scaled(_swapped(d_query), request), _swapped(d_key), _swapped(d_value))


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


def _kernel_for(request: Request, tiling: Tiling, statistics: bool) -> _vendor.SplashAttentionKernel:
    facts = _Facts(
        request.mask,
        (request.q_heads, request.q_len, request.kv_len),
        request.soft_cap,
        request.interpret and request.target.platform == "cpu",
    )
    return _built(facts, tiling, statistics)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """What a vendor kernel is built from; `shape` is (N, T, S)."""

    mask: MaskForm
    shape: tuple[int, int, int]
    soft_cap: float | None
    interpret: bool


@functools.lru_cache(maxsize=256)
def _built(facts: _Facts, tiling: Tiling, statistics: bool) -> _vendor.SplashAttentionKernel:
    heads, q_len, kv_len = facts.shape
    with jax.ensure_compile_time_eval():
        kernel = _vendor.make_splash_mha(
            _vendor.MultiHeadMask([vendor_mask(facts.mask, q_len, kv_len)] * heads),
            block_sizes=_block_sizes(tiling, q_len, kv_len),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=statistics,
            attn_logits_soft_cap=facts.soft_cap,
            interpret=facts.interpret,
        )
        # NumPy arrays belong to no device and no mesh, so the cache outlives both.
        portable: _vendor.SplashAttentionKernel = jax.tree.map(np.asarray, kernel)
        return portable


def _block_sizes(tiling: Tiling, q_len: int, kv_len: int) -> _vendor.BlockSizes:
    sizes: dict[str, Any] = {}
    for name, size in tiling.values:
        side, length = ("q_len", q_len) if name.startswith("block_q") else ("kv_len", kv_len)
        block = sizes[name] = min(size, length)  # one block of 1024 holds a sequence of 512
        if block % _vendor.NUM_LANES or length % block:
            raise ConfigError(
                f"tiling: {name}={block} of splash is not a multiple of {_vendor.NUM_LANES} "
                f"that divides {side}={length}"
            )
    return _vendor.BlockSizes(**sizes)


def vendor_mask(form: MaskForm, q_len: int, kv_len: int) -> _vendor.Mask:
    """Returns the vendor's mask of the static bands of a conjunction; segments are arrays of the call."""
    masks = [_band(atom, (q_len, kv_len)) for atom in form.atoms if atom.is_band]
    return functools.reduce(operator.and_, masks) if masks else _vendor.FullMask((q_len, kv_len))


def _band(atom: Atom, shape: tuple[int, int]) -> _vendor.Mask:
    left, right = atom.params
    offset = _start(atom.query) - _start(atom.kv)
    if (left, right) == (None, 0):
        return _vendor.CausalMask(shape, offset)
    return _vendor.LocalMask(shape, (left, right), offset)


def _start(form: PositionForm) -> int:
    return form.value if isinstance(form.value, int) else 0
