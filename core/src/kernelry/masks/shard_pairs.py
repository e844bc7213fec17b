"""What a mask is for each pair of a shard of queries and a shard of keys: nothing, everything, or a small mask.

A sequence is cut into equal runs of slots. Pairs whose work is the same have the same class, so that a program holds a
few masks instead of one for each pair: bounds that hide nothing within a pair are left out, and positions are moved and
closed up as far as the mask does not notice (`masks.shard_pieces`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from typing import TypeAlias, final

import numpy as np

from kernelry.errors import ArgumentError, ShapeError, nearest
from kernelry.masks.base import Mask
from kernelry.masks.blocks import Grid, decided_blocks
from kernelry.masks.form import Atom, MaskForm
from kernelry.masks.positions import ORDERS, load_balanced_order
from kernelry.masks.shard_pieces import Piece, Places, pieces_of, traced_piece

PairClass: TypeAlias = tuple[Piece, ...]
"""A conjunction; without pieces every key is visible."""

EMPTY = -1
"""In a table: the pair of shards in which nothing is visible."""


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardGrid:
    """How the queries and the keys of a call are cut into shards, each a run of slots.

    Args:
      q_len, kv_len: T and S of the whole call.
      q_shards, kv_shards: into how many shards of equal length.
      order: which tokens the slots hold, `contiguous`, `dual_chunk` or `striped`: what default positions mean where
        T = S; see `load_balanced_order`.
      kv_order: of the keys, if it is another.
      order_size: the devices that the order is for; None is the larger number of shards.

    Raises:
      ArgumentError: an order is unknown, or there are no shards.
      ShapeError: a length does not divide.
    """

    q_len: int
    kv_len: int
    q_shards: int
    kv_shards: int
    order: str = "contiguous"
    kv_order: str | None = None
    order_size: int | None = None

    def __post_init__(self) -> None:
        known = ("contiguous", *ORDERS)
        for order in (self.order, self.kv_order):
            if order is not None and order not in known:
                raise ArgumentError(f"unknown order {order!r}{nearest(str(order), known)}")
        sides = (("query length T", self.q_len, self.q_shards), ("key/value length S", self.kv_len, self.kv_shards))
        for name, length, shards in sides:
            if shards < 1:
                raise ArgumentError(f"{name}={length} cannot be cut into {shards} shards; pass 1 or more.")
            if length % shards:
                raise ShapeError(
                    f"{name}={length} does not divide into {shards} shards: {length} % {shards} = {length % shards}; "
                    f"pad to {-(-length // shards) * shards}."
                )

    @property
    def shard_lengths(self) -> tuple[int, int]:
        """Slots of a shard of queries, and of a shard of keys."""
        return self.q_len // self.q_shards, self.kv_len // self.kv_shards

    @property
    def tokens(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The positions that default ones of queries and of keys mean, int64 [T] and [S]; None is the slots."""
        orders = self.order, self.kv_order or self.order
        if self.q_len != self.kv_len or orders == ("contiguous", "contiguous"):
            return None
        size = self.order_size or max(self.q_shards, self.kv_shards)
        query, kv = (_tokens(self.q_len, size, order) for order in orders)
        return query, kv


def _tokens(length: int, size: int, order: str) -> np.ndarray:
    tokens = np.arange(length) if order == "contiguous" else load_balanced_order(length, size, order)
    return tokens.astype(np.int64)  # bounds are added to them


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PairTable:
    """The class of each pair of shards.

    Args:
      classes: the different ones.
      table: [q_shards, kv_shards], indices of classes, or EMPTY.
    """

    classes: tuple[PairClass, ...]
    table: tuple[tuple[int, ...], ...]

    def of(self, query: int, kv: int) -> PairClass | None:
        """The class of one pair; None where nothing is visible."""
        index = self.table[query][kv]
        return None if index == EMPTY else self.classes[index]

    def blocks_of(self, query: int) -> tuple[int, ...]:
        """The shards of keys of which a shard of queries may see something."""
        return tuple(kv for kv, index in enumerate(self.table[query]) if index != EMPTY)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many pairs each class has."""
        counted = collections.Counter(itertools.chain.from_iterable(self.table))
        return tuple(counted[index] for index in range(len(self.classes)))

    @property
    def full(self) -> int:
        """Pairs in which every key is visible."""
        return sum(count for count, pieces in zip(self.counts, self.classes, strict=True) if not pieces)

    @property
    def partial(self) -> int:
        """Pairs with a mask."""
        return sum(self.counts) - self.full

    @property
    def skipped(self) -> int:
        """Pairs in which nothing is visible."""
        return sum(row.count(EMPTY) for row in self.table)


@functools.lru_cache(maxsize=64)
def pair_table(form: MaskForm, grid: ShardGrid) -> PairTable:
    """Reduces a mask to one class for each pair of shards; no element of the mask is evaluated.

    Pairs in which static atoms of one set of positions show nothing are always found. Static bands, chunks and blocks
    of positions become static pieces, unless their positions are so scattered that they would be more numbers than the
    sequence has tokens; all else is known to the running program alone. Where nothing is visible at all, the first pair
    is not skipped, so that some kernel answers.

    Raises:
      ArgumentError: the sequence does not divide in the order.
    """
    shape, lengths = (grid.q_shards, grid.kv_shards), grid.shard_lengths
    if 0 in lengths:
        empty = np.full(shape, EMPTY)
        empty[0, 0] = 0
        return PairTable(((),), tuple(map(tuple, empty.tolist())))
    blocks = Grid((grid.q_len, grid.kv_len), lengths, tokens=grid.tokens)
    whole = decided_blocks(form, blocks)
    met = ~whole.empty
    if not met.any():
        met[0, 0] = True
    alone = [whole] if len(form.atoms) == 1 else [decided_blocks(MaskForm((atom,)), blocks) for atom in form.atoms]
    found = []
    for index, decided in enumerate(alone):
        pairs = [(i, j) for i, j in np.argwhere(met & ~decided.full).tolist()]
        found.append(_pieces_by_pair(index, form.atoms[index], pairs, blocks))
    numbers: dict[PairClass, int] = {}
    table = [[EMPTY] * shape[1] for _ in range(shape[0])]
    for i, j in np.argwhere(met).tolist():
        pieces = tuple(piece for by_pair in found for piece in by_pair.get((i, j), ()))
        table[i][j] = numbers.setdefault(_without_implied(pieces, form), len(numbers))
    return PairTable(tuple(numbers), tuple(tuple(row) for row in table))


def _pieces_by_pair(
    index: int, atom: Atom, pairs: list[tuple[int, int]], blocks: Grid
) -> dict[tuple[int, int], PairClass]:
    """The pieces of an atom in the pairs in which it may hide something."""
    traced: dict[tuple[int, int], PairClass] = dict.fromkeys(pairs, (traced_piece(index),))
    if not (atom.is_static and atom.mask_class.decides_ranges) or not pairs:
        return traced
    sides = []
    for side, form in enumerate((atom.query, atom.kv)):
        rows = blocks.positions(form, side)
        if len(rows) > 1:
            return traced
        sides.append([Places.of(row) for row in rows.reshape(blocks.shape[side], -1)])
    found, budget = {}, 2 * sum(blocks.lengths)
    for i, j in pairs:
        found[i, j] = pieces_of(index, atom, sides[0][i], sides[1][j])
        budget -= sum(piece.numbers for piece in found[i, j])
        if budget < 0:
            return traced
    return found


def _without_implied(pieces: PairClass, form: MaskForm) -> PairClass:
    """Leaves out static pieces that others at the same positions imply."""
    kept = list(pieces)
    for piece in pieces:
        others = [other for other in kept if other is not piece and not other.traced and not piece.traced]
        atom = piece.atom(form) if others else None
        near = (other.atom(form) for other in others if (other.query, other.kv) == (piece.query, piece.kv))
        if atom is not None and any(atom.mask_class.follows_from(atom, other) for other in near):
            kept.remove(piece)
    return tuple(kept)


def class_form(form: MaskForm, pieces: PairClass) -> MaskForm:
    """The form of a class: what a kernel is asked about."""
    atoms = [piece.atom(form) for piece in pieces]
    return MaskForm(tuple(atoms[index] for index in _sorted(atoms)))


def aligned_masks(form: MaskForm, pieces: PairClass, masks_of_pieces: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """The masks of a class's pieces, in the order of the atoms of `class_form`."""
    return tuple(masks_of_pieces[index] for index in _sorted([piece.atom(form) for piece in pieces]))


def _sorted(atoms: list[Atom]) -> list[int]:
    return sorted(range(len(atoms)), key=lambda index: atoms[index].sort_key)


def blocks_per_shard(form: MaskForm, grid: ShardGrid, block: int = 128) -> np.ndarray:
    """Counts the blocks of each pair of shards that may hold something, of block × block slots.

    Returns:
      int64 [q_shards, kv_shards]. Blocks that only an array, a predicate or a negation could empty are counted.
    """
    tokens, (rows, columns) = grid.tokens, grid.shard_lengths
    table, of_class = pair_table(form, grid), {EMPTY: 0}
    counts = np.zeros((grid.q_shards, grid.kv_shards), np.int64)
    for i, j in np.ndindex(counts.shape):
        index = table.table[i][j]
        if index not in of_class and _says_all(form, table.classes[index]):
            part = Grid((rows, columns), (block, block))
            of_class[index] = _held(class_form(form, table.classes[index]), part)
        part = Grid((rows, columns), (block, block), (i * rows, j * columns), tokens)
        counts[i, j] = of_class[index] if index in of_class else _held(form, part)
    return counts


def _held(form: MaskForm, grid: Grid) -> int:
    return int((~decided_blocks(form, grid).empty).sum())


def _says_all(form: MaskForm, pieces: PairClass) -> bool:
    """Whether what is known of a mask without its arrays is in the static pieces."""
    traced = [form.atoms[piece.index] for piece in pieces if piece.traced]
    return not any(atom.is_static or any(isinstance(param, MaskForm) for param in atom.params) for atom in traced)


def lockstep(blocks: np.ndarray) -> int:
    """The blocks that a ring waits for: of each step those of the slowest device, summed.

    Args:
      blocks: [q_shards, kv_shards], as `blocks_per_shard` counts them; in step r device i has the keys of shard i − r.
    """
    devices, steps = np.arange(blocks.shape[0])[:, None], np.arange(blocks.shape[1])[None]
    return int(blocks[devices, (devices - steps) % blocks.shape[1]].max(axis=0).sum())


def lockstep_efficiency(blocks: np.ndarray) -> float:
    """The blocks of the mean device by those that a ring waits for: 1.0 where no device waits for another."""
    waited = lockstep(blocks)
    return float(blocks.sum(axis=1).mean() / waited) if waited else 1.0


_GRAIN = 8
"""The most blocks of a shard by which orders are compared: at T = 8192 on 8 devices they are of 128 slots."""

_WORTH = 0.9
"""The most of the contiguous order's blocks at which another order is taken: windows and chunks end a ring after few
steps, while a balanced order passes keys through all of them. At T = 8192 on 8 devices, in blocks of 128, chunks of
2048 cost 100 in 2 steps, and 96 striped in 8; causal costs 484, and 260 in dual chunks."""


@functools.lru_cache(maxsize=256)
def best_order(form: MaskForm, length: int, size: int) -> str:
    """Returns the order in which a ring waits for the fewest blocks; what only arrays hide counts as visible.

    Args:
      form: of a mask of T = S = length.
      length: of the sequence.
      size: devices of the ring.

    Raises:
      ShapeError: the length does not divide.
    """
    plain = ShardGrid(q_len=length, kv_len=length, q_shards=size, kv_shards=size)
    contiguous = _waited(form, plain)
    orders = [order for order in ORDERS if order != "dual_chunk" or length % (2 * size) == 0]
    waited = {order: _waited(form, dataclasses.replace(plain, order=order)) for order in orders}
    best = min(orders, key=waited.__getitem__)
    return best if waited[best] <= _WORTH * contiguous else "contiguous"


def _waited(form: MaskForm, grid: ShardGrid) -> int:
    """The blocks that a ring waits for, in blocks that no shard cuts."""
    length = grid.shard_lengths[0]
    parts = max(part for part in range(1, _GRAIN + 1) if length % part == 0)
    blocks = (length // parts,) * 2
    empty = decided_blocks(form, Grid((grid.q_len, grid.kv_len), blocks, tokens=grid.tokens)).empty
    return lockstep((~empty).reshape(grid.q_shards, parts, grid.kv_shards, parts).sum(axis=(1, 3)))
