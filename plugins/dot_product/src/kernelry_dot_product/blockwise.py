"""Attention one block of queries at a time, in plain XLA.

A rolled loop over blocks of queries; each block sees all keys, or, under a sliding window, only
the slice of keys that its rows can reach. Blocks are rematerialised in the backward pass, so memory
is O(block · S) forward and backward.
"""

from __future__ import annotations

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jax import lax

from kernelry.plugin import Axis, Inputs, Kernel, Partial, PositionForm, PositionKind, Request, Side, Tiling
from kernelry_dot_product.softmax import attend_dense, visible_of


@final
@dataclasses.dataclass(frozen=True, slots=True)
class BlockwiseKernel(Kernel):
    """Attention with memory O(block · S)."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope("kernelry.blockwise"):
            return _forward(inputs, request, min(tiling["block_q"], request.q_len), statistics)


def _forward(inputs: Inputs, request: Request, block_q: int, statistics: bool) -> Partial:
    blocks = -(-request.q_len // block_q)
    reach = _reach(request)
    width = request.kv_len if reach is None else min(request.kv_len, block_q + reach.left + reach.right)

    @jax.checkpoint
    def attend_block(start: jax.Array) -> Partial:
        # The last block is moved back to end with the queries; the overlap is computed twice.
        first = jnp.minimum(start, request.q_len - block_q)
        first_key = (
            jnp.int32(0) if reach is None else jnp.clip(first + reach.shift - reach.left, 0, request.kv_len - width)
        )
        query_side = Side.of_slots(Axis.QUERY, first + jnp.arange(block_q, dtype=jnp.int32))
        kv_side = Side.of_slots(Axis.KV, first_key + jnp.arange(width, dtype=jnp.int32))
        block = dataclasses.replace(
            inputs,
            query=lax.dynamic_slice_in_dim(inputs.query, first, block_q, axis=1),
            key=lax.dynamic_slice_in_dim(inputs.key, first_key, width, axis=1),
            value=lax.dynamic_slice_in_dim(inputs.value, first_key, width, axis=1),
        )
        return attend_dense(block, request, visible_of(inputs.mask, query_side, kv_side), statistics=statistics)

    starts = jnp.arange(blocks, dtype=jnp.int32) * block_q
    return _joined(lax.map(attend_block, starts), request, block_q)


def _joined(blocks: Partial, request: Request, block_q: int) -> Partial:
    """Lays blocks [blocks, …] in a row and drops what the last one repeats."""
    count = blocks.out.shape[0]
    repeated = count * block_q - request.q_len

    def join(stacked: jax.Array, axis: int) -> jax.Array:
        last = lax.slice_in_dim(stacked[-1], repeated, block_q, axis=axis)
        if count == 1:
            return last
        rest = jnp.moveaxis(stacked[:-1], 0, axis)
        shape = (*rest.shape[:axis], (count - 1) * block_q, *rest.shape[axis + 2 :])
        return jnp.concatenate([rest.reshape(shape), last], axis=axis)

    return Partial(
        join(blocks.out, 1),
        lse=None if blocks.lse is None else join(blocks.lse, 2),
        max_logits=None if blocks.max_logits is None else blocks.max_logits.max(axis=0),
        dtype=request.dtype,
    )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Reach:
    """The key slots a query slot t can see: t + shift − left … t + shift + right."""

    left: int
    right: int
    shift: int


def _reach(request: Request) -> _Reach | None:
    """Finds the window among the atoms; None where a row may reach any distance."""
    for atom in request.mask.atoms:
        if atom.is_band and None not in atom.params:
            left, right = atom.params
            return _Reach(left, right, _start(atom.query) - _start(atom.kv))
    return None


def _start(form: PositionForm) -> int:
    return form.value if form.kind is PositionKind.OFFSET and isinstance(form.value, int) else 0
