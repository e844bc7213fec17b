"""What a kernel does with its references: reads and writes tiles, asks the mask, goes through the runs of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from kernelry.plugin import Request
from kernelry_gpu_pallas.logits import Logits
from kernelry_gpu_pallas.pallas_flash.operands import Operands, Sizes
from kernelry_gpu_pallas.slots import Slots, load
from kernelry_gpu_pallas.tile_masks import Along, Read, TileMask

ONE_HEAD = np.int32(0)
"""The place of the one head that a program of the grid goes through."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class KernelSettings:
    """What is static in a kernel.

    A tile of queries and keys is [block_q, block_kv], in a kernel over keys [block_kv, block_q]: so the sum over the
    side that goes by is a product in which nothing is transposed, which the fast paths of Hopper and Blackwell need.

    Args:
      sizes, logits, mask: of the call.
      hides: whether a slot may be seen by no query. empties: whether a query may see no slot.
      names: of the references, in their order.
    """

    sizes: Sizes
    logits: Logits
    mask: TileMask
    hides: bool
    empties: bool
    names: tuple[str, ...]

    @classmethod
    def of(cls, request: Request, operands: Operands, mask: TileMask, outputs: tuple[str, ...]) -> KernelSettings:
        """Those of a kernel with these operands and outputs."""
        lengths = request.q_len, request.kv_len
        return cls(
            operands.sizes,
            Logits.of(request),
            mask,
            request.mask.may_hide_slots(*lengths),
            request.mask.may_have_empty_rows(*lengths),
            (*operands.names, *outputs),
        )

    def named(self, refs: tuple[Any, ...]) -> dict[str, Any]:
        """The kernel's references by name."""
        return dict(zip(self.names, refs, strict=True))

    def tile_of_rows(self, rows: jax.Array) -> jax.Array:
        """A value of each query [block_q], as it meets a tile."""
        return rows[None, :] if self.sizes.by_keys else rows[:, None]

    def logits_of(
        self, refs: dict[str, Any], head: Any, tiles: tuple[jax.Array, jax.Array], slots: tuple[Slots, Slots]
    ) -> tuple[jax.Array, jax.Array | None]:
        """The logits of a tile of queries and keys, before the mask, and the slope of the soft cap.

        In float32 a kernel over keys transposes what it multiplies as the other kernels do: large logits must be
        rounded alike, for their differences to what the forward pass found are what counts.
        """
        query, key = tiles
        turned = self.sizes.by_keys and query.dtype == jnp.float32
        bias = None
        if "bias" in refs:
            bias = (_pairs if turned else self.pairs)(refs["bias"], head, *slots, other=0.0)
        if not turned:
            return self.logits(key, query, bias) if self.sizes.by_keys else self.logits(query, key, bias)
        found, slope = self.logits(query, key, bias)
        if self.logits.is_interpreted:  # XLA would multiply in the other order instead of transposing
            found = jax.lax.optimization_barrier(found)  # type: ignore[no-untyped-call]
        return found.T, None if slope is None else slope.T

    def pairs(self, ref: Any, head: Any, query: Slots, kv: Slots, *, other: Any) -> Any:
        """A tile's part of an operand of pairs; 1 along a side that has one value for all."""
        found = _pairs(ref, head, query, kv, other=other)
        return found.T if self.sizes.by_keys else found

    def visible(self, refs: dict[str, Any], head: Any, query: Slots, kv: Slots) -> jax.Array | None:
        """What of a tile is visible; None where all of it is.

        Queries beyond T see nothing: a key that only they would see is hidden, and whatever it holds must be cleaned.
        """
        by_keys = self.sizes.by_keys
        found = self.mask.visible(query.numbers, kv.numbers, self._reader(refs, head, query, kv), by_keys=by_keys)
        if found is not None and query.inside is not None:
            found = found & self.tile_of_rows(query.inside)
        if kv.inside is not None:
            inside = kv.inside[:, None] if by_keys else kv.inside[None, :]
            found = inside if found is None else found & inside
        shape = (kv.block, query.block) if by_keys else (query.block, kv.block)
        return None if found is None else jnp.broadcast_to(found, shape)

    def _reader(self, refs: dict[str, Any], head: Any, query: Slots, kv: Slots) -> Read:
        """Reads a tile's part of what the mask carries, each operand once."""
        held: dict[int, Any] = {}

        def read(index: int) -> Any:
            if index not in held:
                operand, ref = self.mask.operands[index], refs[f"mask{index}"]
                if operand.along is Along.ROW:
                    held[index] = ref[0]
                elif operand.along is Along.PAIRS:
                    held[index] = self.pairs(ref, head, query, kv, other=False)
                else:
                    slots = query if operand.along is Along.QUERY else kv
                    held[index] = load(ref.at[slots.window], slots, other=0)
            return held[index]

        return read


def _pairs(ref: Any, head: Any, query: Slots, kv: Slots, *, other: Any) -> Any:
    """A tile's part of an operand of pairs, [block_q or 1, block_kv or 1]."""
    _, q_len, kv_len = ref.shape
    rows = query if q_len > 1 else Slots(0, 1, 1)
    columns = kv if kv_len > 1 else Slots(0, 1, 1)
    part = ref.at[head if ref.shape[0] > 1 else np.int32(0), rows.window, columns.window]
    if rows.inside is None and columns.inside is None:
        return part[...]
    down = jnp.ones((rows.block, 1), bool) if rows.inside is None else rows.inside[:, None]
    across = jnp.ones((1, columns.block), bool) if columns.inside is None else columns.inside[None, :]
    return plgpu.load(part, mask=down & across, other=other)


def over_runs(refs: dict[str, Any], visit: Callable[[bool, Any, Any], Any], carried: Any) -> Any:
    """Visits the blocks of every run of this program's block: those that need no mask first.

    Args:
      refs: the tables of runs, where there are any.
      visit: makes the next `carried` of (masked, block, carried).
      carried: what is carried along.
    """
    for name, masked in (("full", False), ("partial", True)):
        if name in refs:
            carried = _over_table(refs[name], visit, masked, carried)
    return carried


def _over_table(table: Any, visit: Callable[[bool, Any, Any], Any], masked: bool, carried: Any) -> Any:
    def over_run(run: Any, carried: Any) -> Any:
        return jax.lax.fori_loop(table[run, 0], table[run, 1], lambda at, now: visit(masked, at, now), carried)

    count = table.shape[0]
    return over_run(0, carried) if count == 1 else jax.lax.fori_loop(0, count, over_run, carried)
