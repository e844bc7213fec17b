"""How keys and values lie in a TPU's memory, and the blocks that are read from there.

XLA chooses the layout of an array that no program has constrained: the dimension of which least is padded becomes the
lanes. A kernel that asks for another one has the whole cache copied before it reads a slot, so this one follows.
Confirmed in tests/aot/test_tpu_ragged.py: no copy of keys or values is in the compiled programs.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import final

import jax
import jax.numpy as jnp

from kernelry.errors import ConfigError
from kernelry.plugin import VALUE_IN_KEY, Request, Tiling, round_up
from kernelry_tpu_splash.lanes import LANES, SUBLANES

_FLOAT32_BYTES = _INT32_BYTES = 4

MOST_PAGES = 64
"""Of a block, each an operand of the kernel."""

MOST_JOINED_ROWS = {"bfloat16": 128, "float32": 64}
"""T · N up to which all rows are multiplied with the keys of all heads. By the schedule of libtpu 0.0.42, a block of
512 slots of 8 heads of 128 bfloat16 takes 2802 (v5e) and 2160 cycles (v6e) with so many, against the 3841 and 2238 in
which memory delivers it; twice as many rows take 5150 and 3979."""

_MOST_BYTES = 2.25 * 2**20
"""Of a block of keys and one of values, of which vector memory holds two each besides what is computed from them: 2048
slots of 576 elements of 2 bytes."""


@final
class Order(enum.Enum):
    """The order in which a cache [B, S, K, H] lies in memory, as an einsum of its dimensions."""

    AS_IT_IS = "BSKH->BSKH"
    HEADS_FIRST = "BSKH->BKSH"
    SLOTS_LAST = "BSKH->BKHS"

    @classmethod
    def of(cls, heads: int, width: int, itemsize: int) -> Order:
        """That of K heads of H elements: H is the lanes where it fills them, and S where it does not.

        Heads that fill no sublane, which holds 4 bytes of each lane, would be padded, and are outside instead.
        """
        if width % LANES:
            return cls.SLOTS_LAST
        packed = 4 // itemsize
        whole = heads > 1 and heads % packed == 0 and (heads % SUBLANES == 0 or heads & (heads - 1) == 0)
        return cls.AS_IT_IS if whole else cls.HEADS_FIRST

    def turn(self, array: jax.Array) -> jax.Array:
        """The array with its dimensions in this order, which moves nothing where it lies so."""
        before, after = self.value.split("->")
        return jnp.transpose(array, [before.index(name) for name in after])

    @property
    def has_slots_last(self) -> bool:
        """Whether a head's block is [H, S] and not [S, H]."""
        return self is Order.SLOTS_LAST

    def block(self, slots: int, heads: int, width: int) -> tuple[int, ...]:
        """The shape of a block of one row, or page."""
        if self is Order.AS_IT_IS:
            return (1, slots, heads, width)
        return (1, heads, width, slots) if self.has_slots_last else (1, heads, slots, width)

    def place(self, row: jax.Array, block: jax.Array | int, head: jax.Array) -> tuple[jax.Array | int, ...]:
        """The block's indices in the array."""
        if self is Order.AS_IT_IS:
            return (row, block, head, 0)
        return (row, head, 0, block) if self.has_slots_last else (row, head, block, 0)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """What a step of the kernel reads.

    Args:
      slots: of a block, a multiple of 128.
      heads: key/value heads of a block.
      pages: of which a block consists; 1 where keys and values are not in pages.
      key, value: how they lie.
      value_in_key: whether a key begins with its value, so that values are no array of their own.
      joined: whether keys of all heads are read as rows of one matrix; `heads` is then all of them.
    """

    slots: int
    heads: int
    pages: int
    key: Order
    value: Order
    value_in_key: bool
    joined: bool

    @classmethod
    def of(cls, request: Request, tiling: Tiling) -> Blocks:
        """The blocks of a request.

        Raises:
          ConfigError: a block does not hold whole pages and vector registers.
        """
        itemsize = _bytes_of_element(request)
        slots, unit = tiling["block_kv"], unit_of(request)
        if slots % unit:
            pages = "" if request.page_size is None else f", which holds whole pages of {request.page_size}"
            raise ConfigError(f"tiling: block_kv={slots} of ragged is not a multiple of {unit}{pages}")
        slots = min(slots, _padded(request))
        joined = _may_join(request, slots)
        orders = [Order.of(request.kv_heads, width, itemsize) for width in widths(request)]
        return cls(
            slots,
            request.kv_heads if joined else _heads_apart(request.kv_heads, itemsize),
            1 if request.page_size is None else slots // request.page_size,
            orders[0],
            orders[-1],
            is_value_in_key(request),
            joined,
        )


def block_sizes(request: Request, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of about so many slots that fit in vector memory, the best first; at least one.

    Args:
      request: whose keys are read.
      wanted: slots.
    """
    unit, itemsize = unit_of(request), _bytes_of_element(request)
    slot = 2 * _heads_of_block(request) * sum(widths(request)) * itemsize
    slot += _converted_bytes(request)
    most = _padded(request) if request.page_size is None else min(_padded(request), MOST_PAGES * request.page_size)
    sizes = (max(unit, min(most, slots) // unit * unit) for slots in wanted)
    return tuple(dict.fromkeys(size for size in sizes if size * slot <= 2 * _MOST_BYTES)) or (unit,)


def vector_bytes(request: Request) -> int:
    """What the smallest block takes in vector memory: two of keys and of values, and what is carried along, twice."""
    unit, itemsize = unit_of(request), _bytes_of_element(request)
    heads = _heads_of_block(request)
    rows = round_up(request.q_len * request.groups, SUBLANES)
    carried = heads * rows * (request.value_dim + 2 * LANES) * _FLOAT32_BYTES
    held = 2 * heads * sum(widths(request)) * itemsize + _converted_bytes(request)
    return unit * held + 2 * carried


def is_value_in_key(request: Request) -> bool:
    """Whether keys begin with their values."""
    return request.kv_layout == VALUE_IN_KEY


def widths(request: Request) -> tuple[int, ...]:
    """The last dimensions of the arrays that are read: of keys, and of values where they are an array of their own."""
    return (request.head_dim,) if is_value_in_key(request) else (request.head_dim, request.value_dim)


def table_bytes(request: Request) -> int:
    """What the numbers of pages take in scalar memory; 0 without pages."""
    if request.page_size is None:
        return 0
    return round_up(request.batch * _padded(request) // request.page_size, SUBLANES * LANES) * _INT32_BYTES


def _converted_bytes(request: Request) -> int:
    """Of a slot whose whole numbers become floats before its heads are taken apart."""
    if request.kv_quantization is None:
        return 0
    itemsize = _bytes_of_element(request)
    turned = sum(width for width in widths(request) if Order.of(request.kv_heads, width, itemsize) is Order.AS_IT_IS)
    return _heads_of_block(request) * turned * int(jnp.dtype(request.dtype).itemsize)


def _bytes_of_element(request: Request) -> int:
    """Of keys and values as they are held."""
    return 1 if request.kv_quantization is not None else int(jnp.dtype(request.dtype).itemsize)


def _padded(request: Request) -> int:
    """S in whole units."""
    return round_up(request.kv_len, unit_of(request))


def unit_of(request: Request) -> int:
    """The fewest slots of a block: whole vector registers, and whole pages."""
    return LANES if request.page_size is None else math.lcm(LANES, request.page_size)


def _may_join(request: Request, slots: int) -> bool:
    """Whether blocks of so many slots are read as [S · K, H]: they lie so, fit, and the rows are few."""
    heads, itemsize = request.kv_heads, _bytes_of_element(request)
    converted = 0 if request.kv_quantization is None else int(jnp.dtype(request.dtype).itemsize)
    rows_held = request.kv_len if request.page_size is None else request.page_size
    # Of fewer heads than sublanes, a tile holds several slots, and each further tile of lanes is elsewhere.
    lies_so = all(
        Order.of(heads, width, itemsize) is Order.AS_IT_IS and (heads % SUBLANES == 0 or width == LANES)
        for width in widths(request)
    )
    return (
        lies_so
        and heads & (heads - 1) == 0
        and rows_held * heads % SUBLANES == 0
        and request.q_len * request.q_heads <= MOST_JOINED_ROWS[request.dtype]
        and slots * heads * sum(widths(request)) * (itemsize + converted) <= 2 * _MOST_BYTES
    )


def _heads_of_block(request: Request) -> int:
    """Of the smallest block."""
    if _may_join(request, min(unit_of(request), _padded(request))):
        return request.kv_heads
    return _heads_apart(request.kv_heads, _bytes_of_element(request))


def _heads_apart(heads: int, itemsize: int) -> int:
    """All of them, or as many as fill the sublanes."""
    few = SUBLANES if itemsize > 1 else 4 * SUBLANES
    return few if heads % few == 0 else heads
