"""The kernel `paged`: one query a row over pages, by JAX's paged attention or its ragged paged attention.

Source: jax.experimental.pallas.ops.tpu.paged_attention and ragged_paged_attention, jax 0.10 … 0.12. The first needs
pages [K, P, page_size, H], the second keys and values side by side, [P, page_size, 2·K, H]; a PagedCache has
[P, page_size, K, H] each, so that all pages are copied, unless the program keeps them transposed from step to step.
"""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernelry.errors import ConfigError
from kernelry.plugin import Inputs, Kernel, PagedArray, Partial, Request, Tiling
from kernelry_tpu_splash.operands import scaled, visible
from kernelry_tpu_splash.paged import _vendor
from kernelry_tpu_splash.paged.spec import why_not_combined

_SCOPE = "kernelry.paged"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PagedKernel(Kernel):
    """Attends to the first slots of each row; has no derivative and no statistics."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope(_SCOPE):
            seen = visible(inputs, request, batch=request.batch)[:, 0, 0]
            counts = seen.sum(axis=1).astype(jnp.int32)
            some = counts > 0
            # The vendors divide by nothing in a row of no slots.
            lengths, table = jnp.maximum(counts, 1), jnp.maximum(inputs.key.table, 0).astype(jnp.int32)
            query = scaled(inputs.query, request)[:, 0]
            key, value = _finite(inputs.key), _finite(inputs.value)
            out = _attend(query, key, value, lengths, table, request, tiling)
            spoiled = (seen & _not_finite(inputs.key, inputs.value)).any(axis=1)
            out = jnp.where(spoiled[:, None, None], jnp.nan, out)
            out = jnp.where(some[:, None, None], out, 0).astype(inputs.query.dtype)
            return Partial(out[:, None], dtype=request.dtype)


def _attend(
    query: Float[Array, "B N H"],
    key: Float[Array, "P page_size K H"],
    value: Float[Array, "P page_size K H"],
    lengths: Int32[Array, " B"],
    table: Int32[Array, "B M"],
    request: Request,
    tiling: Tiling,
) -> Float[Array, "B N H"]:
    pages = tiling["pages_per_block"]
    if table.shape[1] % pages:
        raise ConfigError(f"tiling: pages_per_block={pages} of paged does not divide the {table.shape[1]} of a row")
    if tiling["combined"] == 1:
        found: jax.Array = _vendor.paged_attention(
            query,
            key.transpose(2, 0, 1, 3),
            value.transpose(2, 0, 1, 3),
            lengths,
            table,
            attn_logits_soft_cap=request.soft_cap,
            pages_per_compute_block=pages,
        )
        return found
    reason = why_not_combined(request)
    if tiling["combined"] != 2 or reason is not None:
        raise ConfigError(
            f"tiling: combined={tiling['combined']} of paged must be 1{f', for {reason}' if reason else ' or 2'}"
        )
    rows = query.shape[0]
    both = jnp.stack([key, value], axis=3).reshape(*key.shape[:2], 2 * key.shape[2], key.shape[3])
    out: jax.Array = _vendor.ragged_paged_attention(
        query,
        both,
        lengths,
        table,
        jnp.arange(rows + 1, dtype=jnp.int32),
        jnp.full(1, rows, jnp.int32),
        soft_cap=request.soft_cap,
        num_kv_pages_per_block=pages,
        num_queries_per_block=min(rows, 32),
    )
    return out


def _finite(keys: PagedArray) -> Float[Array, "P page_size K H"]:
    """The pages without what is not finite: 0 · NaN is NaN, also where it is hidden."""
    assert isinstance(keys.pages, jax.Array)
    return jnp.where(jnp.isfinite(keys.pages), keys.pages, 0)


def _not_finite(key: PagedArray, value: PagedArray) -> Bool[Array, "B S"]:
    """Whether a slot holds a value that is not finite, or is in no page."""
    assert isinstance(key.pages, jax.Array)
    assert isinstance(value.pages, jax.Array)
    fine = jnp.isfinite(key.pages).all(axis=(2, 3)) & jnp.isfinite(value.pages).all(axis=(2, 3))  # [P, page_size]
    found = ~fine[jnp.maximum(key.table, 0)] | (key.table < 0)[..., None]
    return found.reshape(found.shape[0], -1)
