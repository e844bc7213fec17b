"""The kernel `flywheel_paged`: decode, and chunks of a prompt, over pages of interleaved keys and values."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, BFloat16, Float32, Int32

from kernelry.errors import ConfigError
from kernelry.plugin import Inputs, Kernel, Partial, Request, Tiling
from kernelry_tpu_flywheel.lanes import LANES
from kernelry_tpu_flywheel.paged import _vendor, by_pages, decode
from kernelry_tpu_flywheel.paged.layout import has_query_lengths, is_causal, left_of, page_size_of
from kernelry_tpu_flywheel.paged.rows import Rows

_SCOPE = "kernelry.flywheel_paged"

_Result = tuple[BFloat16[Array, "B T N H"], Float32[Array, "B N T"]]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class FlywheelPagedKernel(Kernel):
    """Reads pages where they are; has no derivative.

    Source: flywheel-tpu 0.3, `flash_attn_varlen_func(block_table=)` for several queries a row, and the body of
    `flash_attn_with_kvcache` for one.
    """

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        _check(request, tiling)
        with jax.named_scope(_SCOPE):
            # A batch of calls runs one after another: the kernels have no rule for vmap, and its pools are apart.
            attend = functools.partial(_attend, request=request, tiling=tiling)
            one_by_one: Any = sequential_vmap(attend)  # type: ignore[no-untyped-call]
            out, lse = one_by_one(inputs)
        return Partial(out, lse=lse if statistics else None, dtype=request.dtype)


def _attend(inputs: Inputs, *, request: Request, tiling: Tiling) -> _Result:
    rows = Rows.of(inputs, request, tiling)
    out, lse = jax.lax.cond(
        rows.expressible,
        lambda: _by_vendor(inputs, rows, request, tiling),
        lambda: by_pages.attend(inputs, request),
    )
    nothing = rows.nothing[:, :, None, None]
    out = jnp.where(nothing, 0, jnp.where(rows.absent[:, :, None, None], jnp.nan, out))
    lse = jnp.where(rows.nothing[:, None], -jnp.inf, jnp.where(rows.absent[:, None], jnp.nan, lse))
    return out.astype(inputs.query.dtype), lse


def _by_vendor(inputs: Inputs, rows: Rows, request: Request, tiling: Tiling) -> _Result:
    if request.q_len > 1:
        return _chunk(inputs, rows, request, tiling)
    out, lse = decode.attend(
        inputs.query[:, 0], inputs.key.pages, rows.table, rows.ends, left_of(request), request, tiling
    )
    return out[:, None], lse[:, :, None]


def _chunk(inputs: Inputs, rows: Rows, request: Request, tiling: Tiling) -> _Result:
    """Several queries a row, each row a sequence; what follows the last query of a row is one without keys."""
    batch, q_len, heads, width = inputs.query.shape
    starts = jnp.arange(batch + 1, dtype=jnp.int32) * q_len
    lengths, table = rows.ends, rows.table
    if has_query_lengths(request):
        starts = jnp.append(_by_turns(starts[:-1], starts[:-1] + rows.queries), starts[-1])
        lengths, table = _by_turns(lengths, jnp.zeros_like(lengths)), jnp.repeat(table, 2, axis=0)
    left = left_of(request)
    sizes = (tiling[name] for name in ("block_q", "block_kv", "block_q_compute", "block_kv_compute"))
    with _vendor.answering_for(request.target):
        out, lse = _vendor.flash_attn_varlen_func(
            inputs.query.transpose(2, 0, 1, 3).reshape(heads, batch * q_len, width),
            inputs.key.pages,
            None,
            starts,
            None,
            q_len,
            table.shape[1] * page_size_of(request),
            softmax_scale=request.scale,
            causal=is_causal(request),
            window_size=(-1 if left is None else left, -1),
            softcap=request.soft_cap or 0.0,
            return_softmax_lse=True,
            interpret=request.is_interpreted,
            block_sizes=tuple(sizes),
            block_table=table,
            seqused_k=lengths,
        )
    by_row = out.reshape(heads, batch, q_len, width).transpose(1, 2, 0, 3)
    return by_row, lse.reshape(heads, batch, q_len).swapaxes(0, 1)


def _by_turns(first: Int32[Array, " B"], second: Int32[Array, " B"]) -> Int32[Array, " twice_B"]:
    return jnp.stack([first, second], axis=1).reshape(-1)


def _check(request: Request, tiling: Tiling) -> None:
    """Raises ConfigError where a block is not of whole pages, or not of whole multiplications."""
    page_size = page_size_of(request)
    if tiling["block_kv"] % page_size:
        raise ConfigError(
            f"tiling: block_kv={tiling['block_kv']} of flywheel_paged is not a multiple of page_size={page_size}"
        )
    if tiling["block_kv"] % tiling["block_kv_compute"] or tiling["block_kv_compute"] % LANES:
        raise ConfigError(
            f"tiling: block_kv_compute={tiling['block_kv_compute']} of flywheel_paged must be a multiple of {LANES} "
            f"that divides block_kv={tiling['block_kv']}"
        )
    if request.q_len > 1 and (tiling["block_q"] % LANES or tiling["block_q"] % (2 * tiling["block_q_compute"])):
        raise ConfigError(
            f"tiling: block_q={tiling['block_q']} of flywheel_paged must be a multiple of {LANES} and of twice "
            f"block_q_compute={tiling['block_q_compute']}"
        )
