"""Masks that a kernel evaluates in its blocks, from the positions of queries and slots of keys.

Both splash kernels take a `mask_function` of slots, ids of segments, and where each query stands.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.masks import BlockKind, Segments
from kernelry.plugin import (
    Atom,
    AtomKind,
    Axis,
    Inputs,
    Mask,
    MaskForm,
    PositionForm,
    PositionKind,
    Refusal,
    RefusalCode,
    Request,
    Side,
    array_refusals,
    is_lasting,
    static_block_map,
)

_T = TypeVar("_T")

SEGMENTS = frozenset({AtomKind.SEGMENTS, AtomKind.SEGMENTS_SEPARATE})
"""Atoms of which a kernel compares the ids."""

COMPUTED = frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.CHUNKED, AtomKind.BLOCK_CAUSAL, AtomKind.PREDICATE})
"""Atoms that the kernel evaluates in its blocks, from positions."""


def mask_refusals(mask: MaskForm) -> Iterator[Refusal]:
    """What such a kernel cannot evaluate: arrays other than one pair of ids, and most positions that are not known."""
    segments = [atom for atom in mask.atoms if atom.kind in SEGMENTS]
    computed = [atom for atom in mask.atoms if atom.kind not in SEGMENTS]
    if len(segments) > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={mask} has {len(segments)} pairs of ids")
    for atom in computed:
        yield from _atom_refusals(atom, alone=len(computed) == 1)


def _atom_refusals(atom: Atom, *, alone: bool) -> Iterator[Refusal]:
    traced = PositionKind.TRACED
    if traced in atom.position_kinds:
        if atom.kv.kind is traced or atom.query.kind is not traced:
            yield Refusal(RefusalCode.POSITIONS, f"mask atom {atom} has traced positions of keys, or inside")
        elif not alone:
            yield Refusal(RefusalCode.POSITIONS, f"mask atom {atom} has traced positions next to another atom")
    if not dataclasses.replace(atom, query=PositionForm(), kv=PositionForm()).is_static:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask atom {atom} depends on arrays")
    for inside in atom.walk():
        if "operands" not in inside.params:  # said above
            yield from array_refusals(inside)
    for form in _positions_in(atom):
        if form.kind is PositionKind.STATIC and not form.is_arithmetic:
            detail = f"mask atom {atom} has positions by row or in many runs"
            yield Refusal(RefusalCode.POSITIONS, detail, "reorder the tokens so that all rows have the same few runs")


def _positions_in(atom: Atom) -> Iterator[PositionForm]:
    for inside in atom.walk():
        yield inside.query
        yield inside.kv


@final
@dataclasses.dataclass(frozen=True, slots=True)
class SlotMask:
    """The vendor's `mask_function`: a conjunction of masks without arrays, compared by value.

    Args:
      parts: at their positions; one whose queries stand where only the running program knows is asked about positions.
    """

    parts: tuple[Mask, ...]

    def __call__(self, query: jax.Array, kv: jax.Array) -> jax.Array:
        """Returns booleans for int32 slots, or positions, of queries and slots of keys, arrays of one shape."""
        sides = Side(Axis.QUERY, query, query, whole=False), Side(Axis.KV, kv, kv, whole=False)
        visible: jax.Array = functools.reduce(operator.and_, (part.evaluate(*sides) for part in self.parts))
        return visible

    def kinds(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> np.ndarray:
        """Classifies blocks, [T / block_q, S / block_kv] of BlockKind."""
        return static_block_map(self.parts, q_len, kv_len, block_q, block_kv)

    @property
    def is_lasting(self) -> bool:
        """Whether a cache may hold it, with the functions of its predicates."""
        return all(is_lasting(part) for part in self.parts)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ComputedMask:
    """All of a call's mask but the ids of segments, without arrays: what a vendor's kernel is built from.

    Args:
      function: None where nothing is hidden.
      lengths: T and S.
      traced: whether the queries stand where only the running program knows; no block can be skipped then.
    """

    function: SlotMask | None
    lengths: tuple[int, int]
    traced: bool = False

    @classmethod
    def of(cls, inputs: Inputs, request: Request) -> ComputedMask:
        """That of a call."""
        parts = tuple(_without_arrays(mask) for mask in inputs.mask if not isinstance(mask, Segments))
        traced = any(PositionKind.TRACED in atom.position_kinds for atom in request.mask.atoms)
        return cls(SlotMask(parts) if parts else None, (request.q_len, request.kv_len), traced)

    @property
    def asked(self) -> int | None:
        """T where the kernel evaluates a mask; None where every block is full."""
        return None if self.function is None else self.lengths[0]

    def build(self, kept: Callable[..., _T], *settings: Any) -> _T:
        """Calls a function that has a cache with the mask and more, around the cache where it would hold too much."""
        if self.function is None or self.function.is_lasting:
            return kept(self, *settings)
        plain: Callable[..., _T] = inspect.unwrap(kept)
        return plain(self, *settings)

    def kinds(self, block_q: int, block_kv: int) -> np.ndarray:
        """Classifies blocks, [T / block_q, S / block_kv] of BlockKind."""
        if self.function is None or self.traced:
            known = BlockKind.FULL if self.function is None else BlockKind.PARTIAL
            return np.full((self.lengths[0] // block_q, self.lengths[1] // block_kv), known, np.int8)
        return self.function.kinds(*self.lengths, block_q, block_kv)


def _without_arrays(mask: Mask) -> Mask:
    """The mask at its positions; where only the running program knows those of the queries, without them."""
    conjunct = mask.conjuncts()[0]
    if conjunct.atom.query.kind is not PositionKind.TRACED:
        return mask
    return dataclasses.replace(conjunct, query=None).located_mask


def query_positions(inputs: Inputs, request: Request) -> jax.Array | None:
    """Where the queries stand, int32 [B, T], if only the running program knows."""
    for mask in inputs.mask:
        conjunct = mask.conjuncts()[0]
        if conjunct.atom.query.kind is PositionKind.TRACED:
            positions = Side.query(request.q_len).at(conjunct.query).positions
            return jnp.broadcast_to(positions.reshape(-1, request.q_len), (request.batch, request.q_len))
    return None


def segment_rows(inputs: Inputs) -> tuple[jax.Array, jax.Array] | None:
    """Ids as the vendors take them, int32 [B, T] and [B, S]: they know none that sees nothing, so −1 never meets −2."""
    found = next((mask for mask in inputs.mask if isinstance(mask, Segments)), None)
    if found is None:
        return None
    query_ids = jnp.asarray(found.query_ids)
    kv_ids = query_ids if found.kv_ids is None else jnp.asarray(found.kv_ids)
    batch = inputs.query.shape[0]
    query, kv = (jnp.broadcast_to(ids, (batch, ids.shape[-1])).astype(jnp.int32) for ids in (query_ids, kv_ids))
    return jnp.where(query < 0, -1, query), jnp.where(kv < 0, -2, kv)
