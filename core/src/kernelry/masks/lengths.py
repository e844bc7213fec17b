"""The mask of rows of different length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.masks.arrays import as_limits, check_limits, filled, module_of, read_slots, signed
from kernelry.masks.base import Extent, Mask, Placeholder
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.run_time import BlockGrid, Decided
from kernelry.masks.side import ArrayLike, Side

if TYPE_CHECKING:
    from kernelry.masks.composition import Conjunct
    from kernelry.masks.padding import Padding

_OF_BOTH = Atom(AtomKind.LENGTHS, ("query",))
"""With lengths of queries, too."""


@final
@pytree("kv_lengths", "query_lengths")
@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Lengths(Mask):
    """A key is visible while its slot is below the row's length; likewise queries.

    `Lengths([2])`:

        1 1 . .
        1 1 . .
        1 1 . .
        1 1 . .

    Args:
      kv_lengths: an integer, or integers [B].
      query_lengths: an integer, or integers [B]; None means every query counts.
    """

    kv_lengths: ArrayLike
    query_lengths: ArrayLike | None = None

    word: ClassVar[str] = "lengths"
    kinds: ClassVar[tuple[AtomKind, ...]] = (AtomKind.LENGTHS,)
    axes: ClassVar[Mapping[str, str]] = {"kv_lengths": "B", "query_lengths": "B"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_lengths", as_limits("Lengths: kv_lengths", self.kv_lengths))
        if self.query_lengths is not None:
            object.__setattr__(self, "query_lengths", as_limits("Lengths: query_lengths", self.query_lengths))

    @property
    def atom(self) -> Atom:
        return Atom(AtomKind.LENGTHS, () if self.query_lengths is None else ("query",))

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        visible = kv.slots < self.kv_lengths.reshape(-1, 1, 1, 1)
        if self.query_lengths is None:
            return visible
        return visible & (query.slots < self.query_lengths.reshape(-1, 1, 1, 1))

    def check(self, extent: Extent) -> None:
        for name, lengths in (("kv_lengths", self.kv_lengths), ("query_lengths", self.query_lengths)):
            if lengths is not None:
                check_limits(f"Lengths: {name}", lengths, extent.batch)

    @classmethod
    def placeholders(cls) -> dict[str, Placeholder]:
        return {"lengths": Placeholder(lambda at: Lengths(filled(at.kv_len, (at.batch,))), "lengths(2)")}

    @classmethod
    def read(cls, *values: Any, **named: Any) -> Mask:
        return cls(*read_slots(values), **named)

    def seen(self, q_len: int, kv_len: int) -> tuple[jax.Array, jax.Array]:
        """Which rows see some key, booleans [B or 1, T], and which slots some row sees, [B or 1, S]."""
        keys = jnp.asarray(self.kv_lengths).reshape(-1, 1)
        queries = jnp.full_like(keys, q_len) if self.query_lengths is None else jnp.asarray(self.query_lengths)
        queries = queries.reshape(-1, 1)
        some_key, some_query = (keys > 0) & (kv_len > 0), (queries > 0) & (q_len > 0)
        row, slot = jnp.arange(q_len)[None], jnp.arange(kv_len)[None]
        return (row < queries) & some_key, (slot < keys) & some_query

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        some_k, full_k = _reached(self.kv_lengths, grid.block_kv, grid.columns, grid.kv_len)
        some, full = some_k[:, None], full_k[:, None]
        if self.query_lengths is not None:
            some_q, full_q = _reached(self.query_lengths, grid.block_q, grid.rows, grid.q_len)
            some, full = some & some_q[:, :, None], full & full_q[:, :, None]
        return Decided.spread(some, full, grid)

    def within(self, query_start: Any, kv_start: Any, q_len: int, kv_len: int) -> Mask:
        queries = None if self.query_lengths is None else _left(self.query_lengths, query_start, q_len)
        return Lengths(_left(self.kv_lengths, kv_start, kv_len), queries)

    @classmethod
    def padded_atom(cls, atom: Atom, padding: Padding) -> Atom:
        return _OF_BOTH if padding.hide_rows else atom

    def padded(self, padding: Padding) -> Mask:
        queries: ArrayLike | None = padding.q_len if padding.hide_rows else None
        if self.query_lengths is not None:
            queries = _at_most(self.query_lengths, padding.q_len)
        return Lengths(_at_most(self.kv_lengths, padding.kv_len), queries)

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        return True

    @classmethod
    def hides_rows_behind(cls, atom: Atom) -> bool:
        return atom == _OF_BOTH

    @classmethod
    def hides_by_key_alone(cls, atom: Atom) -> bool:
        return atom != _OF_BOTH


def _at_most(lengths: ArrayLike, length: int) -> ArrayLike:
    return module_of(lengths).minimum(signed(lengths), np.int32(length))


def _left(lengths: ArrayLike, start: Any, length: int) -> jax.Array:
    return jnp.clip(jnp.maximum(signed(lengths), start) - start, 0, length)  # not negative, so that it cannot wrap


def _reached(lengths: jax.Array, block: int, blocks: int, end: int) -> tuple[jax.Array, jax.Array]:
    """Whether a length reaches into each block, and whether it covers it; [rows, blocks]."""
    column = jnp.atleast_1d(jnp.asarray(lengths)).astype(jnp.int32).reshape(-1, 1)
    starts = jnp.arange(blocks, dtype=jnp.int32)[None] * block
    return starts < column, jnp.minimum(starts + block, end) <= column
