"""The Pallas kernel of one head after another: a block of keys and values at a time, the softmax carried along.

The grid is (B, head blocks, blocks of slots), the last as long as the longest row needs. Rows that need fewer blocks
stay on their last one, which fetches nothing, and compute nothing. Few queries take the kernel of joined.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from kernelry_tpu_splash.lanes import LANES, SUBLANES
from kernelry_tpu_splash.ragged.layout import Blocks, Order

_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))
_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The arrays of a call.

    Args:
      query: [B, K, R, H], the R = T · G rows that read one key/value head.
      key, value: turned into their Order; with pages, of pages instead of rows. Without a value, it is the first
        elements of the key.
      key_scale, value_scale: float32 [B, K or 1, S], of quantised ones.
      visible: int32 [B or 1, K or 1, R or 1, S], 0 where a row does not see a slot.
      first, count: int32 [B], the first block that is seen, and how many there are to the last.
      whole_first, whole_end: int32 [B], the first block of which some row of every head sees every slot, and the next
        one of which that is not so; a page that does not exist is not seen.
      pages: int32 [B · pages of a row], those that the steps of a row read, one block after another; negative where
        there is none.
    """

    query: Float[Array, "B K R H"]
    key: Array
    value: Array | None
    key_scale: Float[Array, " B #K S"] | None
    value_scale: Float[Array, " B #K S"] | None
    visible: Int32[Array, "#B #K #R S"]
    first: Int32[Array, " B"]
    count: Int32[Array, " B"]
    whole_first: Int32[Array, " B"]
    whole_end: Int32[Array, " B"]
    pages: Int32[Array, " B*M"] | None

    @property
    def pages_of_row(self) -> int:
        """M; 0 without pages."""
        return 0 if self.pages is None else self.pages.shape[0] // self.query.shape[0]

    def scalars(self) -> list[jax.Array]:
        """What lies in scalar memory, in the order in which a step takes it."""
        found = [self.first, self.count, self.whole_first, self.whole_end]
        return found if self.pages is None else [*found, self.pages]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class KernelSettings:
    """What is static in the kernel.

    Args:
      blocks: what a step reads.
      value_dim: D.
      scale, soft_cap: of the logits.
      hides: whether a slot may be hidden from all rows, and hold anything.
      interpret: whether it runs on CPU.
    """

    blocks: Blocks
    value_dim: int
    scale: float
    soft_cap: float | None
    hides: bool
    interpret: bool

    def split(self, inputs: list[Any]) -> tuple[Any, list[Any], list[Any], list[Any], Any]:
        """Query, pages of keys, pages of values (none where keys hold them), scales and what is visible."""
        query, *others, visible = inputs
        keys, others = others[: self.blocks.pages], others[self.blocks.pages :]
        values = [] if self.blocks.value_in_key else others[: self.blocks.pages]
        return query, keys, values, others[len(values) :], visible

    def value_in(self, key: jax.Array) -> jax.Array:
        """The value that a head's block of keys, [S, H] or [H, S], begins with."""
        return key[: self.value_dim] if self.blocks.key.has_slots_last else key[:, : self.value_dim]


def attend(
    operands: Operands, settings: KernelSettings
) -> tuple[Float[Array, "B K R D"], Float[Array, "B K R"], Float[Array, "B K R"]]:
    """Returns the unnormalised output, the largest logits and the sums, in float32; −inf and 0 of nothing."""
    batch, kv_heads, rows, _ = operands.query.shape
    heads, pages_of_row = settings.blocks.heads, operands.pages_of_row
    scalars = operands.scalars()
    given, specs = _given(operands, settings.blocks)
    sizes = ((rows, settings.value_dim), (rows, LANES), (rows, LANES))
    out, top, total = pl.pallas_call(
        functools.partial(step, attend=_attend, settings=settings, pages_of_row=pages_of_row),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, kv_heads // heads, jnp.maximum(operands.count.max(), 1)),
            in_specs=specs,
            out_specs=[pl.BlockSpec((1, heads, *size), _by_row) for size in sizes],
            scratch_shapes=[pltpu.VMEM((heads, *size), jnp.float32) for size in sizes],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, kv_heads, *size), jnp.float32) for size in sizes],  # type: ignore[no-untyped-call]
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=settings.interpret,
        name="kernelry_ragged",
    )(*scalars, *given)
    return out, top[..., 0], total[..., 0]


def _given(operands: Operands, blocks: Blocks) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """The arrays that are read, and which part of each in a step."""
    rows, head_dim = operands.query.shape[2:]
    heads, slots = blocks.heads, blocks.slots // blocks.pages
    given: list[jax.Array] = [operands.query]
    specs = [pl.BlockSpec((1, heads, rows, head_dim), _by_row)]
    for array, order in ((operands.key, blocks.key), (operands.value, blocks.value)):
        if array is None:
            continue
        width = array.shape[2 if order.has_slots_last else 3]
        for page in range(blocks.pages):
            given.append(array)
            index = functools.partial(_index, order, page, blocks.pages, operands.pages_of_row)
            specs.append(pl.BlockSpec(order.block(slots, heads, width), index))
    for scale in (operands.key_scale, operands.value_scale):
        if scale is not None:
            given.append(scale)
            specs.append(pl.BlockSpec((1, min(heads, scale.shape[1]), blocks.slots), over_slots(scale.shape[1:2])))
    shared = operands.visible.shape
    given.append(operands.visible)
    specs.append(pl.BlockSpec((1, min(heads, shared[1]), shared[2], blocks.slots), over_slots(shared)))
    return given, specs


def _by_row(b: Any, h: Any, i: Any, *scalars: Any) -> tuple[Any, ...]:
    return (b, h, 0, 0)


def block_at(b: Any, i: Any, first: Any, count: Any) -> Any:
    """The block that row b reads in step i: its last one from there on."""
    return first[b] + jnp.minimum(i, jnp.maximum(count[b] - 1, 0))


def _index(
    order: Order,
    page: int,
    pages: int,
    pages_of_row: int,
    b: Any,
    h: Any,
    i: Any,
    first: Any,
    count: Any,
    *others: Any,
) -> tuple[Any, ...]:
    if not pages_of_row:
        return order.place(b, block_at(b, i, first, count), h)
    return order.place(jnp.maximum(others[-1][b * pages_of_row + i * pages + page], 0), 0, h)


def over_slots(shared: tuple[int, ...]) -> Any:
    """The index map of an array [B or 1, K or 1, …, S], or [B, K or 1, S]; what is 1 is the same everywhere."""

    def index(b: Any, h: Any, i: Any, first: Any, count: Any, *others: Any) -> tuple[Any, ...]:
        block = block_at(b, i, first, count)
        if len(shared) == 1:
            return (b, h if shared[0] > 1 else 0, block)
        return (b if shared[0] > 1 else 0, h if shared[1] > 1 else 0, 0, block)

    return index


def step(*refs: Any, attend: Any, settings: KernelSettings, pages_of_row: int) -> None:
    """One block of one row: `refs` are the scalars, the inputs, the outputs and what is carried along.

    Args:
      attend: adds a block to what is carried, as `_attend` does.
      pages_of_row: of what is read in the steps of a row, whose numbers are the last scalars; 0 without pages.
    """
    first, count, whole_first, whole_end, *others = refs
    read = others.pop(0) if pages_of_row else None
    *inputs, out, top, total, sums, maxima, totals = others
    row, at = pl.program_id(0), pl.program_id(2)
    block = first[row] + at
    add = functools.partial(attend, inputs, (sums, maxima, totals), settings)

    @pl.when(at == 0)
    def _begin() -> None:
        sums[...] = jnp.zeros_like(sums)
        maxima[...] = jnp.full_like(maxima, -jnp.inf)
        totals[...] = jnp.zeros_like(totals)

    inside = at < count[row]
    may_be_part = settings.hides or read is not None
    is_whole = (block >= whole_first[row]) & (block < whole_end[row]) if may_be_part else True

    @pl.when(inside & is_whole)
    def _attend_whole() -> None:
        add(None, is_whole=True)

    if may_be_part:

        @pl.when(inside & ~is_whole)
        def _attend_part() -> None:
            at_page = row * pages_of_row + at * settings.blocks.pages
            add(None if read is None else _absent(read, at_page, settings.blocks), is_whole=False)

    @pl.when(at == pl.num_programs(2) - 1)
    def _end() -> None:
        out[0] = sums[...]
        top[0] = maxima[...]
        total[0] = totals[...]


def _attend(
    inputs: list[Any],
    carried: tuple[Any, Any, Any],
    settings: KernelSettings,
    absent: Any,
    *,
    is_whole: bool,
) -> None:
    """Adds a block to what is carried; of a whole one some row sees every slot, and nothing has to be cleaned."""
    sums, maxima, totals = carried
    blocks = settings.blocks
    query, keys, values, scales, visible = settings.split(inputs)
    held_keys = _held(keys, blocks.key, query.dtype)
    held_values = _held(values, blocks.value, query.dtype) if values else held_keys
    # Where XLA interprets it on CPU, the select keeps the scale and the maximum's subtraction from being one operation,
    # which rounds once: a logit of 1e9 would not be its own maximum. A TPU has no such operation.
    all_seen = is_whole and visible.shape[1:3] == (1, 1) and not settings.interpret
    for head in range(blocks.heads):
        seen = None if all_seen else visible[0, min(head, visible.shape[1] - 1)] != 0
        factors = [scale[0, min(head, scale.shape[1] - 1)][None] for scale in scales]
        key = _head(held_keys, head, blocks.key, query.dtype)
        logits = product(query[0, head], key, by_columns=blocks.key.has_slots_last) * settings.scale
        if factors:
            logits = logits * factors[0]
        if settings.soft_cap is not None:
            logits = settings.soft_cap * jnp.tanh(logits / settings.soft_cap)
        if absent is not None:
            logits = jnp.where(absent, jnp.nan, logits)
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        before = maxima[head][:, :1]
        now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        # A row that has seen nothing yet has −inf, of which a difference is NaN.
        shift = jnp.where(now == -jnp.inf, 0.0, now)
        weights = jnp.exp(logits - shift)
        shrink = jnp.exp(before - shift)
        totals[head] = jnp.broadcast_to(
            shrink * totals[head][:, :1] + weights.sum(axis=1, keepdims=True), totals.shape[1:]
        )
        maxima[head] = jnp.broadcast_to(now, maxima.shape[1:])
        value = _head(held_values, head, blocks.value, query.dtype) if values else settings.value_in(key)
        if seen is not None and not is_whole:
            value = cleaned(value, seen, blocks.value)
        if factors:
            weights = weights * (factors[-1] if seen is None else jnp.where(seen, factors[-1], 0))
        more = product(weights.astype(value.dtype), value, by_columns=not blocks.value.has_slots_last)
        sums[head] = shrink * sums[head] + more


def _held(pages: list[Any], order: Order, dtype: Any) -> list[Any]:
    """The pages of a block; whole numbers become floats before a head is taken from among others.

    libtpu of jax 0.10 dies of the conversion after it, for v6e.
    """
    if order is Order.AS_IT_IS and jnp.issubdtype(pages[0].dtype, jnp.integer):
        return [page[...].astype(dtype) for page in pages]
    return pages


def _head(pages: list[Any], head: int, order: Order, dtype: Any) -> jax.Array:
    """A head's block, [S, H] or [H, S]. int8 and int4 are exact in bfloat16."""
    if order is Order.AS_IT_IS:
        found = [page[0, :, head, :] for page in pages]
    else:
        found = [page[0, head] for page in pages]
    whole = found[0] if len(found) == 1 else jnp.concatenate(found, axis=1 if order.has_slots_last else 0)
    return whole.astype(dtype)


def product(rows: jax.Array, other: jax.Array, *, by_columns: bool) -> jax.Array:
    """In float32, of rows with the rows of another array, or its columns."""
    return jax.lax.dot_general(
        rows,
        other,
        _ROWS_BY_COLUMNS if by_columns else _ROWS_BY_ROWS,
        # One pass of the matrix unit multiplies bfloat16, whatever it is given.
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def cleaned(value: jax.Array, seen: jax.Array, order: Order) -> jax.Array:
    """Zeroes what no row sees: 0 · NaN is NaN."""
    by_any = seen.astype(jnp.float32).max(axis=0, keepdims=True)  # [1, S]
    if not order.has_slots_last:
        by_any = jnp.broadcast_to(by_any, (SUBLANES, by_any.shape[1])).T[:, :1]
    return jnp.where(by_any > 0, value, jnp.zeros_like(value))


def _absent(read: Any, at_page: Any, blocks: Blocks) -> jax.Array:
    """[1, S], or [1, S · K] of joined heads: whether a slot is in a page that does not exist."""
    length = blocks.slots * (blocks.heads if blocks.joined else 1)
    size = length // blocks.pages
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
    absent = jnp.zeros((1, length), jnp.bool_)
    for page in range(blocks.pages):
        inside = (slot >= page * size) & (slot < (page + 1) * size)
        absent = absent | (inside & (read[at_page + page] < 0))
    return absent
