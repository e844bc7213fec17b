"""Serves lengths with a kernel that takes segments only."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeAlias, final

import numpy as np

from kernelry.execution.adapters.base import Adapter, Cost, aligned
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.masks.arrays import module_of, signed
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, AtomKind
from kernelry.masks.ids import Segments
from kernelry.masks.lengths import Lengths
from kernelry.masks.padding import form_of
from kernelry.masks.side import ArrayLike
from kernelry.request.request import Request

_SEGMENTS = (AtomKind.SEGMENTS, AtomKind.SEGMENTS_SEPARATE)
_INT32_BYTES = 4

_Split: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Indices of the atoms that become one Segments, and of the rest."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class LengthsAsSegments(Adapter):
    """Writes lengths as ids, −1 behind them, into the segments of the mask or into new ones.

    Queries and keys need an array each: without `query_lengths` the rows behind the keys' length
    still see the keys before it, so that −1 must hide those slots as keys and not as queries.
    """

    name: ClassVar[str] = "lengths_as_segments"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.MASK_ATOM})

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        lengths = any(atom.kind is AtomKind.LENGTHS for atom in request.mask.atoms)
        takes = capabilities.atoms
        if not lengths or AtomKind.LENGTHS in takes or AtomKind.SEGMENTS_SEPARATE not in takes:
            return None
        _, kept = _split(request)
        atoms = (*(request.mask.atoms[i] for i in kept), Atom(AtomKind.SEGMENTS_SEPARATE))
        return request.rewritten(mask=form_of(atoms))

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        joined, kept = _split(before)
        segments = _joined([inputs.mask[i] for i in joined], before)
        pairs = [(before.mask.atoms[i], inputs.mask[i]) for i in kept]
        mask = aligned([*pairs, (Atom(AtomKind.SEGMENTS_SEPARATE), segments)])
        return dataclasses.replace(inputs, mask=mask)

    def cost(self, before: Request, after: Request) -> Cost:
        return Cost(extra_bytes=before.batch * (before.q_len + before.kv_len) * _INT32_BYTES)


def _split(request: Request) -> _Split:
    """All lengths, with the first segments."""
    segments = request.mask.take(lambda atom: atom.kind in _SEGMENTS)[0][:1]
    lengths = request.mask.take(lambda atom: atom.kind is AtomKind.LENGTHS)[0]
    joined = (*segments, *lengths)
    return joined, tuple(i for i in range(len(request.mask.atoms)) if i not in joined)


def _joined(masks: list[Mask], request: Request) -> Segments:
    query: ArrayLike = np.zeros((1, request.q_len), np.int32)
    kv: ArrayLike = np.zeros((1, request.kv_len), np.int32)
    for mask in masks:
        match mask:
            case Segments(query_ids=query_ids, kv_ids=kv_ids):
                query, kv = _rows(query_ids), _rows(query_ids if kv_ids is None else kv_ids)
            case Lengths(kv_lengths=kv_lengths, query_lengths=query_lengths):
                kv = _cut(kv, kv_lengths)
                query = query if query_lengths is None else _cut(query, query_lengths)
    return Segments(query, kv)


def _rows(ids: ArrayLike) -> ArrayLike:
    return signed(ids if ids.ndim == 2 else ids[None])


def _cut(ids: ArrayLike, lengths: ArrayLike) -> ArrayLike:
    """Puts −1 behind each row's length."""
    xp = module_of(ids, lengths)
    slots = xp.arange(ids.shape[-1], dtype=np.int32)[None]
    return xp.where(slots < lengths.reshape(-1, 1), ids, xp.asarray(-1, ids.dtype))
