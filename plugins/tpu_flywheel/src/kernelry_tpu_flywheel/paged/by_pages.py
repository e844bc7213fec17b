"""The same attention in plain JAX, one page of a row after another, for the rows that the vendor cannot express."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32, Int32

from kernelry.plugin import Axis, Inputs, Request, Side
from kernelry_tpu_flywheel.paged.layout import page_size_of
from kernelry_tpu_flywheel.paged.rows import visible


def attend(inputs: Inputs, request: Request) -> tuple[BFloat16[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Any mask over any contents: what a query does not see counts as 0, and a page that does not exist as NaN."""
    page_size, heads = page_size_of(request), request.kv_heads
    shape = (request.batch, heads, request.groups, request.q_len)
    query = inputs.query.reshape(request.batch, request.q_len, heads, request.groups, request.head_dim)
    pages, table = inputs.key.pages, inputs.key.table

    def step(number: Int32[Array, ""], carried: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        out, top, total = carried
        nth = jnp.arange(page_size, dtype=jnp.int32)
        slots = number * page_size + nth
        seen = visible(inputs, request, Side.of_slots(Axis.KV, slots))[:, :, None]  # [B, 1, 1, T, page_size]
        entry = lax.dynamic_index_in_dim(table, number, axis=1, keepdims=False)
        place = jnp.where(entry < 0, pages.shape[0], entry)
        # By slots: of whole pages XLA first copies the pool into another order, where that suits the products.
        page = pages.at[place[:, None], nth[None]].get(mode="fill", fill_value=float("nan"))  # [B, page_size, 2K, H]
        reached = seen.any(axis=(1, 2, 3))[:, :, None, None]
        key, value = (jnp.where(reached, page[:, :, side::2], 0) for side in (0, 1))
        logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32) * request.scale
        if request.soft_cap is not None:
            logits = request.soft_cap * jnp.tanh(logits / request.soft_cap)
        logits = jnp.where(seen, logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(axis=-1))
        base = jnp.where(higher == -jnp.inf, 0, higher)
        weights = jnp.where(seen, jnp.exp(logits - base[..., None]), 0)
        # What one query sees and another does not may be NaN, and 0 · NaN is NaN.
        finite = jnp.isfinite(value)
        added = jnp.einsum(
            "bkgts,bskh->bkgth", weights, jnp.where(finite, value, 0), preferred_element_type=jnp.float32
        )
        spoiled = jnp.einsum("bts,bskh->bkth", seen[:, 0, 0].astype(jnp.float32), (~finite).astype(jnp.float32))
        added = jnp.where(spoiled[:, :, None] > 0, jnp.nan, added)
        shrunk = jnp.exp(top - base)
        return out * shrunk[..., None] + added, higher, total * shrunk + weights.sum(axis=-1)

    begin = (
        jnp.zeros((*shape, request.head_dim), jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    out, top, total = lax.fori_loop(0, table.shape[1], step, begin)
    divided = out / jnp.where(total == 0, 1, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    by_query = divided.transpose(0, 3, 1, 2, 4).reshape(*inputs.query.shape)
    return by_query.astype(inputs.query.dtype), lse.reshape(request.batch, request.q_heads, request.q_len)
