"""Sequences shared out over a mesh axis: what transformer-engine does with them, and their order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Self, final

import numpy as np

from kernelry.plugin import Atom, AtomKind, ContextParallel, PositionForm, Refusal, RefusalCode, Request
from kernelry.plugin import load_balanced_order as order_of


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """Who shares the sequences of a call.

    Args:
      axis, size: of the mesh.
      strategy: `ring` or `all_gather`.
      order: the order of the tokens, `dual_chunk` or `striped`; None is one after another.
    """

    axis: str
    size: int
    strategy: str
    order: str | None

    @classmethod
    def of(cls, request: Request) -> Self | None:
        """Reads a request; None where each device has whole sequences."""
        if request.context_parallel is None:
            return None
        context = ContextParallel.parse(request.context_parallel)
        assert context.size is not None
        return cls(context.axis, context.size, context.strategy, _order(request, context.size))


def _order(request: Request, size: int) -> str | None:
    band = next((atom for atom in request.mask.atoms if atom.is_band), None)
    if band is None:
        return None
    return next((name for name, pieces in _PIECES.items() if _stands(band, name, request.q_len, size, pieces)), None)


_PIECES = {"dual_chunk": 2, "striped": 1}
"""How many parts of a sequence each device has, at the least."""


def _stands(band: Atom, order: str, length: int, size: int, pieces: int) -> bool:
    return length % (pieces * size) == 0 and all(_is(side, order, length, size) for side in (band.query, band.kv))


@functools.lru_cache(maxsize=256)
def _is(positions: PositionForm, order: str, length: int, size: int) -> bool:
    found = positions.positions(length)
    return found is not None and len(found) == 1 and bool(np.array_equal(found[0], order_of(length, size, order)))


def refusals(request: Request) -> Iterator[Refusal]:
    """What transformer-engine does not do across devices; it says so while it partitions, or not at all."""
    shared = Shared.of(request)
    if shared is None:
        return
    for name, neutral in (("bias", None), ("dropout_rate", 0.0), ("sinks", False), ("max_logits", False)):
        if getattr(request, name) != neutral:
            yield _no(request, f"{name}={getattr(request, name)}")
    if request.partial:
        yield _no(request, "partial=True")
    if request.q_len != request.kv_len:
        yield _no(request, f"q_len={request.q_len} that differs from kv_len={request.kv_len}")
    pieces = shared.size * (2 if shared.order == "dual_chunk" else 1)
    if request.q_len % pieces:
        yield Refusal(RefusalCode.SEQUENCE_LENGTH, f"q_len={request.q_len} is not a multiple of {pieces}")
    yield from _mask(request, shared)


def _mask(request: Request, shared: Shared) -> Iterator[Refusal]:
    kinds = {atom.kind for atom in request.mask.atoms}
    if not kinds:
        return
    if kinds == {AtomKind.CAUSAL}:
        band = request.mask.atoms[0]
        plain = band.query.start == band.kv.start == 0
        if shared.order != "dual_chunk" and not plain:
            yield _disorder(request, "one after another or in dual_chunk order", "dual_chunk")
    elif kinds == {AtomKind.CAUSAL, AtomKind.SEGMENTS}:
        if shared.strategy != "ring":
            yield _no(request, f"mask={request.mask}", "say strategy='ring'")
        if shared.order != "striped":
            yield _disorder(request, "in striped order where rows are packed", "striped")
    else:
        yield _no(request, f"mask={request.mask}")


def _no(request: Request, what: str, remedy: str | None = None) -> Refusal:
    return Refusal(RefusalCode.CONTEXT_PARALLEL, f"context_parallel={request.context_parallel} with {what}", remedy)


def _disorder(request: Request, wanted: str, order: str) -> Refusal:
    detail = f"context_parallel={request.context_parallel} needs tokens {wanted}; mask={request.mask}"
    remedy = f"give the mask .at(query_positions=p, kv_positions=p), p = load_balanced_order(T, size, {order!r})"
    return Refusal(RefusalCode.POSITIONS, detail, remedy)
