"""Calls longer than a kernel's own tiles and than 128 tokens: what is right in the first tile must be right in all.

Generated from its capabilities, like the small calls: one case for each mask and kind of positions, the features in
as few calls as serve them all, statistics, a backward pass, quantised keys and pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp

from kernelry.kernel.capabilities import Feature, Gradient
from kernelry.masks import AtomKind, Causal, Full, Mask, PositionKind, SlidingWindow
from kernelry.request.request import Mode
from kernelry.storage import Quantization
from kernelry.testing.conformance import samples
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.positive import (
    MAGNITUDE,
    Named,
    after_cap,
    but,
    feature_changes,
    forms,
    masked,
    together,
)
from kernelry.testing.conformance.subject import Subject

_SMALLEST_TILE = 8
_MOST_PAIRS = 2**22
"""Pairs of queries and keys, which the reference has in memory in float64."""

_LANES = 128
_MORE = 5
"""Tokens beyond a tile and a half, so that no block size of a kernel divides the length."""

_MOST_LENGTHS = 3
_PAGE_SIZES = (8, 16, 32, 64, 128)
_MOST_PAGES = 12
_FEW = 3
"""Queries of a decode step with draft tokens."""

_ONE_SIDE = frozenset({AtomKind.SEGMENTS, AtomKind.SPANS, AtomKind.ANY_OF, AtomKind.NOT})
"""Their samples have the same ids for queries and keys."""


def longer(subject: Subject, base: AttentionCall) -> tuple[AttentionCall, ...]:
    """The base call at lengths beyond the kernel's tiles, if possible not multiples of them; shortest first."""
    sizes = {"q_heads": 2, "kv_heads": 1 if subject.can.grouped_heads else 2}
    small = subject.first((but(base, **sizes),)) or base
    tile = _tile(subject, small)
    lengths = (tile + tile // 2 + _MORE, *(count * tile for count in (2, 3, 5, 7, 11)))
    resized = (call for length in lengths for call in _resized(small, length) if subject.serves(call))
    found = (call for call in resized if max((0, *_tiles(subject, call))) < call.kv_len)
    return tuple(itertools.islice(found, _MOST_LENGTHS))


def longer_calls(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    """Every claim of the kernel that a longer call can test."""
    plain, causal = longer(subject, base), longer(subject, masked(subject, base))
    if causal:
        yield from _numbers(subject, causal[0])
        yield from _masks(subject, causal)
        yield from _positions(subject, causal)
        yield from _features(subject, causal[0])
        yield from _statistics(subject, causal[0])
        yield from _quantised(subject, causal, {"q_heads": base.q_heads, "kv_heads": base.kv_heads})
        yield from _in_pages(subject, causal[0])
    if plain and causal and plain[0].mask.form != causal[0].mask.form:
        yield from _served(subject, "lengths", "full attention", plain)


def _tiles(subject: Subject, call: AttentionCall) -> tuple[int, ...]:
    """The sizes in the tiling that the kernel would use, whatever their names."""
    tiling = subject.spec.tilings(call.request(subject.host))[0]
    return tuple(value for _, value in tiling.values if value >= _SMALLEST_TILE)


def _tile(subject: Subject, call: AttentionCall) -> int:
    return max((_LANES, *_tiles(subject, call)))


def _resized(call: AttentionCall, length: int) -> Iterator[AttentionCall]:
    """The call with as many queries as keys, and with the queries that it has, at the end of the keys."""
    if length**2 <= _MOST_PAIRS:
        yield but(call, q_len=length, kv_len=length)
    last = call.mask if call.mask.form == Full().form else call.mask.at(query_offset=length - call.q_len)
    yield but(call, kv_len=length, mask=last)


def _served(subject: Subject, claim: str, name: str, calls: Iterable[AttentionCall]) -> Iterator[Named]:
    """A case of the first call that is served, if there is one; the small calls say why there is none."""
    call = subject.first(calls)
    if call is not None:
        yield claim, f"beyond its tiles, {name}: T = {call.q_len}, S = {call.kv_len}", (call,)


def _numbers(subject: Subject, call: AttentionCall) -> Iterator[Named]:
    yield "lengths", f"beyond its tiles: T = {call.q_len}, S = {call.kv_len}", (call,)
    yield from _served(subject, "lengths", "logits of ±180", (but(call, magnitude=MAGNITUDE),))
    for dtype in sorted(subject.can.dtypes & {"bfloat16", "float16"}):
        uniform = but(call, dtype=dtype, magnitude=0.0, value_mean=1.0)
        yield from _served(subject, "lengths", f"{dtype} sums", (uniform,))
    if subject.can.unequal_lengths:
        modes = {Mode.DECODE} & subject.can.modes or {call.mode}
        few = but(call, q_len=_FEW, mode=min(modes, key=lambda mode: mode.value))
        last = few.kv_len - _FEW
        traced = jnp.asarray([last, last // 2 + 9])
        placed = {
            "causal": Causal().at(query_offset=last),
            "causal at traced offsets": Causal().at(query_offset=traced),
            "window at traced offsets": SlidingWindow(5, 0).at(query_offset=traced),
        }
        for name, mask in placed.items():
            yield from _served(subject, "lengths", f"few queries, {name}", (but(few, mask=mask),))


def _masks(subject: Subject, calls: tuple[AttentionCall, ...]) -> Iterator[Named]:
    for kind in sorted(subject.can.atoms - {AtomKind.CAUSAL}, key=lambda kind: kind.value):
        small = itertools.islice(samples.samples(kind, calls[0]), 0 if kind is AtomKind.PREFIX_LM else 1)
        for name in (*small, *samples.wide(kind, _LANES)):
            yield from _served(subject, "masks", name, _of(subject, kind, name, calls))


def _of(subject: Subject, kind: AtomKind, name: str, calls: tuple[AttentionCall, ...]) -> Iterator[AttentionCall]:
    """The calls with each of the masks of a name, drawn for their own lengths."""
    for call in calls:
        if call.q_len != call.kv_len and kind in _ONE_SIDE:
            continue
        drawn = {**samples.samples(kind, call), **samples.wide(kind, _tile(subject, call))}
        yield from (but(call, mask=samples.rows_of(mask, call)) for mask in drawn[name])


def _positions(subject: Subject, calls: tuple[AttentionCall, ...]) -> Iterator[Named]:
    square = [call for call in calls if call.q_len == call.kv_len]
    for kind in sorted(subject.can.positions - {PositionKind.DEFAULT}, key=lambda kind: kind.value):
        drawn = [(call, dict(samples.placed(kind, Causal(), call))) for call in square]
        for name in [name for _, masks in drawn[:1] for name in masks][:2]:
            placed = (but(call, mask=mask) for call, masks in drawn for mask in masks[name])
            yield from _served(subject, "positions", f"causal at {name}", placed)


def _features(subject: Subject, call: AttentionCall) -> Iterator[Named]:
    """All features that can be combined in one case, each of the others in its own, and a bias shared by all rows."""
    call = but(call, peaks=Feature.MAX_LOGITS in subject.can.features)
    joined, names = together(subject, call)
    if names:
        yield from _served(subject, "combinations", " and ".join(names), (joined,))
    for name, change in feature_changes(call).items():
        if name not in names:
            yield from _served(subject, name, name, (but(call, **change),))
    if Feature.BIAS in subject.can.features:
        yield from _served(subject, "bias", "bias for every key", (but(call, bias=(call.batch, 1, 1, call.kv_len)),))
    if Feature.BIAS_AFTER_CAP in subject.can.features:
        late = but(call, **{**after_cap(call), "bias": (1, *call.pairs[1:])})
        yield from _served(subject, "bias after cap", "a bias after the soft cap", (late,))


def _statistics(subject: Subject, call: AttentionCall) -> Iterator[Named]:
    partial = but(call, partial=True)
    if subject.can.statistics:
        yield from _served(subject, "statistics", "lse", forms(call, partial=True))
    if subject.can.gradient is Gradient.BACKWARD and call.wanted and not subject.serves(partial):
        # its backward runs where statistics are differentiated, which an adapter can make it do
        adapted = next((c for c in (partial, but(call, sinks=True)) if subject.serves_adapted(c)), None)
        if adapted is not None:
            size = f"T = {call.q_len}, S = {call.kv_len}"
            yield "gradients", f"beyond its tiles, backward: {size}", (adapted,)


def _quantised(subject: Subject, calls: tuple[AttentionCall, ...], heads: Mapping[str, int]) -> Iterator[Named]:
    """One quantisation for each shape of scales, with heads that may share a scale."""
    ways = {Quantization.parse(way).axis: way for way in sorted(subject.can.kv_quantizations)}
    for way in ways.values():
        quantised = (but(call, kv_quantization=way, **heads) for call in calls)
        yield from _served(subject, "quantised keys", f"quantised keys: {way}", quantised)


def _in_pages(subject: Subject, call: AttentionCall) -> Iterator[Named]:
    """More pages than fit into a tile, of which each row sees some; also with the first quantisation."""
    if not subject.can.pages:
        return
    tile = _tile(subject, call)
    calls = [_of_pages(subject, call, size, max(_MOST_PAGES, 3 * tile // 2 // size)) for size in _PAGE_SIZES]
    yield from _served(subject, "pages", "pages", calls)
    for way in sorted(subject.can.kv_quantizations)[:1]:
        yield from _served(subject, "pages", f"quantised pages: {way}", (but(c, kv_quantization=way) for c in calls))


def _of_pages(subject: Subject, call: AttentionCall, size: int, count: int) -> AttentionCall:
    q_len = _FEW if subject.can.unequal_lengths else size * count
    offset = size * count - q_len
    mask: Mask = call.mask if call.mask.form == Full().form else Causal().at(query_offset=offset)
    return but(call, q_len=q_len, kv_len=size * count, page_size=size, mask=mask)
