"""A call on a mesh, as its devices see it: one request for each class of pairs of shards, and their resolutions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, final

import numpy as np

from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.masks.form import Atom, MaskForm, PositionForm, PositionKind
from kernelry.masks.positions import StaticPositions, load_balanced_order
from kernelry.masks.shard_pairs import EMPTY, PairTable, ShardGrid, best_order, class_form, pair_table
from kernelry.masks.spread import why_not_cut
from kernelry.request.context_parallel import ContextParallel
from kernelry.request.request import Operand, Request
from kernelry.request.sharding import Sharding
from kernelry.resolution.explanation import Candidate, Resolution
from kernelry.resolution.question import Question, choose

_AUTO = ("ring", "ulysses", "all_gather")
"""What `auto` tries, in this order: a ring holds least memory, and serves any mask that can be cut."""

_NATIVE = ("ring", "all_gather")
"""The strategies of kernels that attend across devices themselves, in the order in which `native` tries them."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Shards:
    """How a request is cut.

    Args:
      sharding: the sharding, with sizes and a strategy.
      requests: what a device is asked: one for each class of `table`, or the only one.
      table: the classes of pairs of shards; None where each device has all keys that its queries may see.
    """

    sharding: Sharding
    requests: tuple[Request, ...]
    table: PairTable | None = None

    def pairs(self, place: int) -> int:
        """How many pairs of shards are of a class."""
        return 1 if self.table is None else sum(row.count(place) for row in self.table.table)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ShardedResolution:
    """The resolutions of a call's shards, aligned with `shards.requests`."""

    shards: Shards
    resolutions: tuple[Resolution, ...]


class _NotCutError(Exception):
    """A request that a strategy does not serve, with the reason."""

    def __init__(self, detail: str, remedy: str | None = None) -> None:
        self.refusal = Refusal(RefusalCode.SHARDING, detail, remedy)
        super().__init__(detail)


def choose_sharded(question: Question) -> Resolution:
    """Asks about the shards of a call that says how it is sharded; `auto` takes the first strategy that serves it.

    Where no kernel serves the shards of a strategy, those that have it themselves are asked about the whole call.
    """
    request = question.request
    assert request.sharding is not None
    sharding = with_order(request, Sharding.parse(request.sharding))
    refused: list[Candidate] = []
    first: Resolution | None = None
    for strategy in _strategies(sharding):
        named = dataclasses.replace(sharding, strategy=strategy)
        found: Resolution | None
        try:
            found = _native(question, named) if strategy == "native" else _of_shards(question, cut(request, named))
        except _NotCutError as error:
            named_by = strategy if sharding.sequence else "sharding"  # without sequences there is no strategy
            refused.append(Candidate(named_by, "kernelry", (error.refusal,)))
            found = None
        if found is None or found.plan is None:
            first = first or found
            found = _native(question, named) if strategy in _NATIVE and _one_axis(named) else None
        if found is not None and found.plan is not None:
            return found
    if first is not None:
        return dataclasses.replace(first, candidates=(*first.candidates, *refused))
    return Resolution(request, None, tuple(refused), "the sharding")


def with_order(request: Request, sharding: Sharding) -> Sharding:
    """The sharding with the order that suits the mask, where it leaves that open."""
    if sharding.order != "auto":
        return sharding
    # Of a symbolic length no strategy serves any order.
    alike = request.q_len == request.kv_len and not request.symbolic_sizes
    ring = sharding.size(sharding.ring)
    order = best_order(request.mask, request.q_len, ring) if alike else "contiguous"
    return dataclasses.replace(sharding, order=order)


def _strategies(sharding: Sharding) -> tuple[str, ...]:
    if sharding.strategy != "auto":
        return (sharding.strategy,)
    if not sharding.sequence:
        return ("ring",)  # only a name: nothing is passed around
    return ("all_gather",) if sharding.kv_axes == () else _AUTO


def _of_shards(question: Question, shards: Shards) -> Resolution:
    request = question.request
    found = tuple(choose(dataclasses.replace(question, request=part)) for part in shards.requests)
    unserved = next((resolution for resolution in found if resolution.plan is None), None)
    most = max(range(len(found)), key=shards.pairs)
    shown = unserved or found[most]
    return dataclasses.replace(shown, request=request, shards=ShardedResolution(shards, found))


def _one_axis(sharding: Sharding) -> bool:
    """Whether one axis cuts queries and keys alike."""
    return len(sharding.sequence) == 1 and sharding.kv_sequence is None


def _native(question: Question, sharding: Sharding) -> Resolution:
    """Asks the kernels that attend across devices themselves; `native` is by any strategy of theirs."""
    request = question.request
    strategies = _NATIVE if sharding.strategy == "native" else (sharding.strategy,)
    if not _one_axis(sharding):
        raise _NotCutError(
            f"kernels attend across devices themselves by {' or '.join(_NATIVE)}, over one axis that cuts "
            f"queries and keys alike, not by sharding={sharding}"
        )
    (axis,) = sharding.sequence
    size, mask = sharding.size((axis,)), _ordered(request, sharding)
    asked = (
        dataclasses.replace(
            request, sharding=None, mask=mask, context_parallel=str(ContextParallel(axis, strategy, size))
        )
        for strategy in strategies
    )
    found = [choose(dataclasses.replace(question, request=own)) for own in asked]
    served = next((resolution for resolution in found if resolution.plan is not None), found[0])
    return dataclasses.replace(served, request=request)


def cut(request: Request, sharding: Sharding) -> Shards:
    """Returns what each device is asked.

    Args:
      request: the whole call.
      sharding: with sizes, and a strategy other than `auto` and `native`.

    Raises:
      _NotCutError: the strategy does not serve the request.
    """
    for refusal in _refusals(request, sharding):
        raise _NotCutError(refusal.detail, refusal.remedy)
    shape = _local_shape(request, sharding)
    if not _meets_shards(sharding):
        mask = _with_traced_rows(_ordered(request, sharding), sharding)
        return Shards(sharding, (dataclasses.replace(request, **shape, mask=mask, sharding=None),))
    table = pair_table(request.mask, grid_of(request, sharding))
    asked = dataclasses.replace(
        request,
        sharding=None,
        sinks=False,
        statistics=True,
        gradients=request.gradients - {Operand.SINKS},
        mask=MaskForm(),
        **shape,
    )
    forms = (class_form(request.mask, pieces) for pieces in table.classes)
    return Shards(sharding, tuple(dataclasses.replace(asked, mask=form) for form in forms), table)


def _meets_shards(sharding: Sharding) -> bool:
    """Whether queries meet the keys in several shards, whose results are merged."""
    return bool(sharding.ring or (sharding.kv_axes and not sharding.sequence))


def ring_offsets(table: PairTable) -> tuple[int, ...]:
    """The steps of a ring: how far before a device the keys of each come from.

    It is the shortest run that covers all steps in which some pair shows something, with a device's own keys first
    where no step can be left out.

    Args:
      table: of as many shards of keys as of queries.
    """
    size = len(table.table)
    classes, devices = np.asarray(table.table), np.arange(size)
    full = [offset for offset in range(size) if (classes[devices, (devices - offset) % size] != EMPTY).any()]
    gaps = [(after - before, after) for before, after in zip(full, [*full[1:], full[0] + size], strict=True)]
    _, start = max(gaps, key=lambda gap: (gap[0], gap[1] == size))
    start = start % size
    last = max((offset - start) % size for offset in full)
    return tuple((start + step) % size for step in range(last + 1))


def grid_of(request: Request, sharding: Sharding) -> ShardGrid:
    """The shards of queries and keys along the axes of a ring, or of keys alone."""
    ring = sharding.size(sharding.ring)
    keys = ring if sharding.sequence else sharding.size(sharding.kv_axes)
    order = sharding.order if request.q_len == request.kv_len else "contiguous"
    return ShardGrid(
        q_len=request.q_len,
        kv_len=request.kv_len,
        q_shards=ring,
        kv_shards=keys,
        order=order,
        order_size=sharding.size(sharding.ordered),
    )


def _local_shape(request: Request, sharding: Sharding) -> dict[str, Any]:
    heads = sharding.size(sharding.head_axes)
    repeats = sharding.kv_repeats(request.q_heads, request.kv_heads)
    batch, ring = sharding.size(sharding.batch), sharding.size(sharding.ring)
    keys = ring if sharding.sequence else sharding.size(sharding.kv_axes)
    bias = request.bias
    if bias is not None:
        cuts = (batch, heads, ring, keys)
        bias = tuple(size if size == 1 else size // cut for size, cut in zip(bias, cuts, strict=True))
    return {
        "batch": request.batch // batch,
        "q_len": request.q_len // ring,
        "kv_len": request.kv_len // keys,
        "q_heads": request.q_heads // heads,
        "kv_heads": request.kv_heads * repeats // heads,
        "bias": bias,
    }


def _refusals(request: Request, sharding: Sharding) -> Iterator[Refusal]:
    code = RefusalCode.SHARDING
    if request.symbolic_sizes:
        yield Refusal(code, f"sharding={sharding} of a symbolic {request.symbolic_sizes[0]}", "export it for a number")
    heads = sharding.size(sharding.head_axes)
    if request.q_heads % heads:
        detail = f"heads N={request.q_heads} do not divide over {' and '.join(sharding.head_axes)}: "
        yield Refusal(code, detail + f"{request.q_heads} % {heads} = {request.q_heads % heads}", _FEWER_HEADS)
    if request.page_size is not None and (sharding.batch or sharding.cuts_sequences):
        cut = "the batch" if sharding.batch else "the sequence"
        detail = f"{cut} of paged keys cannot be cut: a row's pages may be anywhere in the pool"
        yield Refusal(code, detail, _POOL_OF_ITS_OWN)
    why = why_not_cut(request.mask)
    if why is not None and not sharding.is_empty:
        yield Refusal(code, f"mask={request.mask} cannot be cut: {why}")
    if sharding.cuts_sequences and sharding.kv_axes and request.normalization != "softmax":
        yield Refusal(code, f"normalization={request.normalization} of keys on several devices")
    if _meets_shards(sharding) and request.logits_dtype == "float64":
        detail = "logits_dtype=float64 of keys in several shards, whose results are merged in float32"
        yield Refusal(code, detail, "leave sequences whole on each device, or let the strategy be ulysses")


_POOL_OF_ITS_OWN = "cut their heads alone, or give each shard a cache with a pool of its own, inside a shard_map"
_FEWER_HEADS = "share heads out over fewer devices, or let the strategy be ring"


def _ordered(request: Request, sharding: Sharding) -> MaskForm:
    """The mask's form with the positions of an order where it has none."""
    if sharding.order == "contiguous" or request.q_len != request.kv_len:
        return request.mask
    order = load_balanced_order(request.q_len, sharding.size(sharding.ordered), sharding.order)
    return _at(request.mask, StaticPositions.of_array(order).form)


def _at(form: MaskForm, where: PositionForm) -> MaskForm:
    return MaskForm(tuple(sorted((_atom_at(atom, where) for atom in form.atoms), key=lambda atom: atom.sort_key)))


def _atom_at(atom: Atom, where: PositionForm) -> Atom:
    params = tuple(_at(param, where) if isinstance(param, MaskForm) else param for param in atom.params)
    atom = dataclasses.replace(atom, params=params)
    if not atom.mask_class.positional:
        return atom
    query = where if atom.query == PositionForm() and atom.mask_class.uses_query_positions else atom.query
    return dataclasses.replace(atom, query=query, kv=where if atom.kv == PositionForm() else atom.kv)


def _with_traced_rows(form: MaskForm, sharding: Sharding) -> MaskForm:
    """Static positions that differ between batch rows differ between shards of the batch."""
    return spread_rows(form) if sharding.batch else form


@functools.lru_cache(maxsize=256)
def spread_rows(form: MaskForm) -> MaskForm:
    """The form with static positions of several batch rows as arrays."""
    return MaskForm(tuple(sorted(map(_without_rows, form.atoms), key=lambda atom: atom.sort_key)))


def _without_rows(atom: Atom) -> Atom:
    params = tuple(spread_rows(param) if isinstance(param, MaskForm) else param for param in atom.params)
    return dataclasses.replace(atom, params=params, query=_rowless(atom.query), kv=_rowless(atom.kv))


def _rowless(positions: PositionForm) -> PositionForm:
    rows = len(positions.value) if isinstance(positions.value, tuple) else 1
    return PositionForm(PositionKind.TRACED) if rows > 1 else positions


__all__ = ["EMPTY", "ShardedResolution", "Shards", "choose_sharded", "cut", "grid_of", "spread_rows"]
