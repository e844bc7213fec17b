"""Calls whose keys and values are stored quantised or in pages, where a kernel declares that it reads those."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from kernelry.kernel.capabilities import Dims, Feature
from kernelry.masks import AtomKind, Dense, Lengths, Mask, PositionKind, SlidingWindow
from kernelry.request.request import Mode
from kernelry.storage import INTERLEAVED, SEPARATE, VALUE_IN_KEY
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.positive import Named, but, forms, masked
from kernelry.testing.conformance.subject import Subject

_KV_LENGTHS = (16, 128)
_ROWS = (1, 3)
"""T of a decode step, and of one with draft tokens."""

_QUANTISED = "quantised keys"
_PAGES = "pages"
_LAYOUTS = {VALUE_IN_KEY: "values in keys", INTERLEAVED: "interleaved pages"}


def stored_calls(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    """Every such claim, the most telling cases first, as a quick run keeps three of each."""
    ways = sorted(subject.can.kv_quantizations, reverse=True)
    yield from _quantised(subject, base, ways)
    if subject.can.pages:
        yield from _in_pages(subject, base, ways)
    for layout in sorted(subject.can.kv_layouts - {SEPARATE}):
        yield from _in_layout(subject, base, layout, ways)


def _in_layout(subject: Subject, base: AttentionCall, layout: str, ways: list[str]) -> Iterator[Named]:
    """Values that are stored with the keys: as arrays, in pages, quantised, few queries, hidden slots, one head."""
    claim = _LAYOUTS[layout]
    together = but(masked(subject, base), kv_layout=layout, value_dim=base.head_dim)
    if layout == VALUE_IN_KEY and subject.can.split_head_dim:
        dims = subject.can.head_dims or Dims()
        wide = but(together, head_dim=dims.padded(2 * base.head_dim) or base.head_dim, scale=None)
        together = wide if subject.first((wide, *_with_pages(wide))) else together
    one_head = but(together, kv_heads=1, q_heads=base.q_heads if subject.can.grouped_heads else 1)
    cases: list[tuple[str, tuple[AttentionCall, ...]]] = [("", (together,)), (", K = 1", (one_head,))]
    cases += [(f", {name}", calls) for name, calls in _rows(subject, but(together, mask=base.mask))]
    if subject.can.clean_hidden_slots:
        cases.append((", NaN in hidden slots", _hiding(subject, together, 3)))
    cases += [(f", {name.partition(': ')[2]}", calls) for _, name, calls in _results(subject, together, claim)]
    for name, calls in cases:
        if layout != INTERLEAVED:
            yield claim, f"{layout}{name}", calls
        if subject.can.pages:
            yield claim, f"{layout}, in pages{name}", _all_with_pages(calls)
    for way in ways[:1] if layout != INTERLEAVED else ():
        for name, calls in cases[:3]:
            narrow = tuple(but(call, kv_quantization=way) for call in calls)
            yield claim, f"{layout}, {way}{name}", narrow
            if subject.can.pages:
                yield claim, f"{layout}, {way}, in pages{name}", _all_with_pages(narrow)


def _quantised(subject: Subject, base: AttentionCall, ways: list[str]) -> Iterator[Named]:
    for way in ways:
        yield _QUANTISED, f"quantised keys: {way}", (but(masked(subject, base), kv_quantization=way),)
        if subject.can.clean_hidden_slots:
            hiding = tuple(but(call, kv_quantization=way) for call in _hiding(subject, base, 3))
            yield _QUANTISED, f"NaN in hidden slots: {way}", hiding
    for way in ways[:1]:
        for name, calls in _rows(subject, base):
            yield _QUANTISED, f"quantised keys: {name}", tuple(but(call, kv_quantization=way) for call in calls)
        yield from _results(subject, but(masked(subject, base), kv_quantization=way), _QUANTISED)


def _in_pages(subject: Subject, base: AttentionCall, ways: list[str]) -> Iterator[Named]:
    yield _PAGES, "pages", _with_pages(masked(subject, base))
    if subject.can.clean_hidden_slots:
        yield _PAGES, "NaN in hidden slots: pages", _all_with_pages(_hiding(subject, base, 3))
    for way in ways:
        plain = but(masked(subject, base), kv_quantization=way)
        hiding = tuple(but(call, kv_quantization=way) for call in _hiding(subject, base, 1))
        yield _PAGES, f"quantised pages: {way}", _with_pages(plain)
        if subject.can.clean_hidden_slots:
            yield _PAGES, f"NaN in hidden slots: quantised pages, {way}", _all_with_pages(hiding)
    for name, calls in _rows(subject, base):
        yield _PAGES, f"pages: {name}", _all_with_pages(calls)
    if subject.can.grouped_heads:
        yield _PAGES, "pages: N = 4, K = 1", _with_pages(but(masked(subject, base), q_heads=4, kv_heads=1))
    for claim, name, calls in _results(subject, masked(subject, base), _PAGES):
        yield claim, name, _all_with_pages(calls)


def _rows(subject: Subject, base: AttentionCall) -> Iterator[tuple[str, tuple[AttentionCall, ...]]]:
    """Few queries; each row of the batch sees another number of keys."""
    for q_len in _ROWS if subject.can.unequal_lengths else ():
        sized = _sized(subject, base, q_len)
        if AtomKind.LENGTHS in subject.can.atoms:
            yield f"lengths, T = {q_len}", tuple(but(call, mask=_lengths(call)) for call in sized)
        if AtomKind.WINDOW in subject.can.atoms and PositionKind.TRACED in subject.can.positions:
            yield f"window at traced offsets, T = {q_len}", tuple(but(call, mask=_window(call)) for call in sized)


def _results(subject: Subject, call: AttentionCall, claim: str) -> Iterator[Named]:
    if subject.can.statistics:
        yield claim, f"{claim}: lse", forms(call, partial=True)
    if Feature.MAX_LOGITS in subject.can.features:
        yield claim, f"{claim}: max logits", (but(call, max_logits=True),)


def _hiding(subject: Subject, base: AttentionCall, q_len: int) -> tuple[AttentionCall, ...]:
    """Calls under which whole pages of one row are hidden, and some slots of the other."""
    sized = _sized(subject, base, q_len)
    return tuple(but(call, mask=mask, poison=True) for call in sized for mask in (_lengths(call), _dense(call)))


def _sized(subject: Subject, base: AttentionCall, q_len: int) -> tuple[AttentionCall, ...]:
    if not subject.can.unequal_lengths:
        return (base,)
    lengths = dict.fromkeys(max(kv_len, base.kv_len) for kv_len in _KV_LENGTHS)
    mode = Mode.DECODE if q_len == 1 and Mode.DECODE in subject.can.modes else base.mode
    return tuple(but(base, q_len=q_len, kv_len=kv_len, mode=mode) for kv_len in lengths)


def _seen(call: AttentionCall) -> np.ndarray:
    return np.array([call.kv_len - 3, call.kv_len // 4], np.int32).clip(1)


def _lengths(call: AttentionCall) -> Mask:
    return Lengths(_seen(call))


def _dense(call: AttentionCall) -> Mask:
    return Dense((np.arange(call.kv_len) < _seen(call)[:, None])[:, None, None])


def _window(call: AttentionCall) -> Mask:
    last = _seen(call) - 1
    return SlidingWindow(5, 0).at(query_offset=jnp.asarray(np.maximum(last - call.q_len + 1, 0)))


def _with_pages(call: AttentionCall) -> tuple[AttentionCall, ...]:
    """The call with pages of few slots, or else of more."""
    sizes = dict.fromkeys(max(1, call.kv_len // count) for count in (4, 2, 1))
    return tuple(but(call, page_size=size) for size in sizes)


def _all_with_pages(calls: tuple[AttentionCall, ...]) -> tuple[AttentionCall, ...]:
    return tuple(paged for call in calls for paged in _with_pages(call))
