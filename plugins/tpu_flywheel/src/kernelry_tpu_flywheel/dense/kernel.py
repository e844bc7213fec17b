"""flywheel: flash attention for TPUs with large unrolled blocks.

Source: flywheel_tpu.pallas.flash_fwd and flash_bwd, flywheel-tpu 0.3.0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernelry.masks import Segments
from kernelry.plugin import Gradients, Inputs, Kernel, Partial, Request, Tiling, round_up
from kernelry_tpu_flywheel.dense import _vendor
from kernelry_tpu_flywheel.dense.blocks import backward_blocks, forward_blocks
from kernelry_tpu_flywheel.dense.geometry import Geometry
from kernelry_tpu_flywheel.dense.packed import Sequences, as_rows, most_runs, with_segments_together
from kernelry_tpu_flywheel.dense.vmapped import batched

_SCOPE = "kernelry.flywheel"

_NO_WEIGHT = 1e30
"""A logsumexp under which no logit has a weight: −inf and +inf make NaN in the vendor's backward pass."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class FlywheelKernel(Kernel):
    """flywheel's attention over arrays; core differentiates every call by `backward`."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        call = _Call(request, tiling, statistics)
        arrays = inputs.query, inputs.key, inputs.value
        segments = next((mask for mask in inputs.mask if isinstance(mask, Segments)), None)
        if segments is None:
            found = batched(call.dense)(*arrays)
        else:
            movable = Geometry.of(request).is_movable
            most = most_runs(segments.query_ids, tiling["max_segments"], movable=movable)
            call = dataclasses.replace(call, most=most)
            found = batched(call.packed)(*arrays, as_rows(segments.query_ids, inputs.query.shape[0]))
        return Partial(found[0], lse=found[1] if statistics else None, dtype=request.dtype)

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
        call = _Call(request, tiling)
        out, d_out = (array.astype(inputs.query.dtype) for array in (out, d_out))
        return Gradients(*batched(call.gradients)(inputs.query, inputs.key, inputs.value, out, lse, d_out))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """What is done to the arrays of a call, for any batch.

    Args:
      request, tiling, statistics: of the call.
      most: runs of equal ids in a packed row.
    """

    request: Request
    tiling: Tiling
    statistics: bool = False
    most: int = 1

    def dense(self, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
        """The output [B, T, N, D], and the logsumexp [B, N, T] where it is asked for."""
        geometry, batch = Geometry.of(self.request), query.shape[0]
        with jax.named_scope(_SCOPE):
            found = self._attend(
                _heads(query, geometry.rows),
                _heads(key, geometry.keys),
                _heads(value, geometry.keys),
                offset=geometry.offset,
                window=geometry.window,
            )
            out, *lse = (_parted(array, batch)[:, :, : geometry.q_len] for array in found)
            empty = geometry.empty_rows
            if empty.any():
                out = jnp.where(empty[:, None], 0, out)
                lse = [jnp.where(empty, -jnp.inf, one) for one in lse]
            return out.swapaxes(1, 2), *lse

    def packed(self, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        """The same where ids [B, T] say which tokens belong together."""
        arrays = query, key, value, ids
        with jax.named_scope(_SCOPE):
            if Geometry.of(self.request).is_movable:
                out, *lse = with_segments_together(self._in_runs, self.most, *arrays)
            else:
                out, *lse = self._in_runs(*arrays)
            return out, *(found.swapaxes(1, 2) for found in lse)

    def _in_runs(self, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        """The output [B, T, N, D], and the logsumexp [B, T, N] where it is asked for."""
        geometry, (batch, length) = Geometry.of(self.request), ids.shape
        block_q, block_kv, _, _ = forward_blocks(self.request, self.tiling)
        sequences = Sequences.of(ids, self.most)
        found = self._attend(
            _joined(query, block_q),
            _joined(key, block_kv),
            _joined(value, block_kv),
            sequences.starts,
            offset=0,
            window=(None if geometry.low is None else -geometry.low, geometry.high),
        )
        rows = (array[:, : batch * length].swapaxes(0, 1) for array in found)
        out, *lse = (array.reshape(batch, length, *array.shape[1:]) for array in rows)
        out = jnp.where(sequences.live[..., None, None], out, 0)
        lse = [jnp.where(sequences.live[..., None], one, -jnp.inf) for one in lse]
        # What the ids hold is known to the running program alone: where no packed row may hold them, nothing that is
        # returned looks right.
        wrong = ~sequences.in_order[:, None, None]
        return jnp.where(wrong[..., None], jnp.nan, out), *(jnp.where(wrong, jnp.nan, one) for one in lse)

    def gradients(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Those of query, key and value, of which and of out, lse and d_out the arrays are."""
        query, key, value, out, lse, d_out = arrays
        geometry, batch = Geometry.of(self.request), query.shape[0]
        with jax.named_scope(_SCOPE):
            rows = lse.reshape(-1, lse.shape[2])
            rows = jnp.where(jnp.isinf(rows), _NO_WEIGHT, rows)
            rows = jnp.pad(rows, ((0, 0), (0, geometry.rows - geometry.q_len)), constant_values=_NO_WEIGHT)
            found = _vendor.backward(
                (
                    _heads(query, geometry.rows),
                    _heads(key, geometry.keys),
                    _heads(value, geometry.keys),
                    _heads(out, geometry.rows),
                    rows,
                    _heads(d_out, geometry.rows),
                ),
                target=self.request.target,
                scale=self.request.scale,
                offset=geometry.high,
                blocks=backward_blocks(self.request, self.tiling),
                interpret=self.request.is_interpreted,
            )
            whole = (query, key, value)
            return tuple(_whole(_parted(one, batch), like) for one, like in zip(found, whole, strict=True))

    def _attend(self, *arrays: jax.Array, **band: Any) -> tuple[jax.Array, ...]:
        return _vendor.forward(
            *arrays,
            target=self.request.target,
            scale=self.request.scale,
            soft_cap=self.request.soft_cap,
            blocks=forward_blocks(self.request, self.tiling),
            statistics=self.statistics,
            interpret=self.request.is_interpreted,
            **band,
        )


def _heads(array: jax.Array, length: int) -> jax.Array:
    """[B, L, N, H] as [B · N, length, H], cut or with zeros put behind."""
    kept = array[:, :length].swapaxes(1, 2)
    kept = kept.reshape(-1, *kept.shape[2:])
    return jnp.pad(kept, ((0, 0), (0, length - kept.shape[1]), (0, 0)))


def _parted(array: jax.Array, batch: int) -> jax.Array:
    """[B · N, …] as [B, N, …]."""
    return array.reshape(batch, -1, *array.shape[1:])


def _joined(array: jax.Array, block: int) -> jax.Array:
    """[B, L, N, H] as [N, B · L, H], with zeros put behind until a block divides it."""
    heads = array.reshape(-1, *array.shape[2:]).swapaxes(0, 1)
    return jnp.pad(heads, ((0, 0), (0, round_up(heads.shape[1], block) - heads.shape[1]), (0, 0)))


def _whole(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """[B, N, length, H] as [B, L, N, H]: 0 for what was not read."""
    kept = gradient.swapaxes(1, 2)[:, : like.shape[1]]
    return jnp.pad(kept, ((0, 0), (0, like.shape[1] - kept.shape[1]), (0, 0), (0, 0)))
