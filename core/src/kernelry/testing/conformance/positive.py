"""Calls that a kernel says it serves, generated from its capabilities alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np

from kernelry.kernel.capabilities import Dims, Feature
from kernelry.masks import AtomKind, Causal, Mask, PositionKind
from kernelry.request.request import Mode, Operand
from kernelry.testing.conformance import samples
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.stored import MaskedOut
from kernelry.testing.conformance.subject import Subject

Named: TypeAlias = tuple[str, str, tuple[AttentionCall, ...]]
"""The claim, the name of a case, and calls of which the first that is served tests the claim."""

_VARIED_LENGTHS = (5, 1, 40, 72, 128, 200, 256)
_LARGEST_DIM = 256
MAGNITUDE, LEVEL = 40.0, 6.0
"""Logits up to ±180, and around −130: beyond ±88.7 exp overflows in float32, below −104 it is 0."""


def named_calls(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    """Every claim of the kernel, with calls that test it."""
    for part in (_sizes, _dtypes, _modes, _masks, _positions, _features, _gradients, _edges, _combinations):
        yield from part(subject, base)


def but(base: AttentionCall, **changes: Any) -> AttentionCall:
    """The base call with changes."""
    return dataclasses.replace(base, **changes)


def forms(base: AttentionCall, **changes: Any) -> tuple[AttentionCall, AttentionCall]:
    """The base call with changes; and forward alone, for a kernel that serves no more."""
    changed = but(base, **changes)
    return changed, but(changed, gradients=frozenset())


def masked(subject: Subject, base: AttentionCall) -> AttentionCall:
    """The base call with a causal mask where the kernel takes one."""
    causal = but(base, mask=Causal())
    return causal if subject.serves(causal) else base


def _sizes(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    yield "output", "full attention", (base,)
    yield "output", "logits of ±180", (but(base, magnitude=MAGNITUDE),)
    yield "output", "logits around −130", (but(base, level=LEVEL),)
    for batch in (1, 3):
        yield "output", f"B = {batch}", (but(masked(subject, base), batch=batch),)
    if base.scale is not None:
        yield "scale", "the default scale", (but(base, scale=None),)
        yield "scale", "a negative scale", (but(base, scale=-base.scale, magnitude=MAGNITUDE),)
        yield "scale", "a scale of 0", (but(base, scale=0.0),)
    yield from _heads(subject, base)
    yield from _head_dims(subject, base)
    square = [but(masked(subject, base), q_len=n, kv_len=n) for n in _VARIED_LENGTHS if n != base.q_len]
    served = [call for call in square if subject.serves(call)]
    for call in served[: 1 if subject.quick else 4]:
        yield "lengths", f"T = S = {call.q_len}", (call,)
    if subject.can.unequal_lengths:
        yield from _unequal(base)


def _heads(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    counts = [(4, 4), (1, 1)] + ([(4, 2), (6, 2), (4, 1)] if subject.can.grouped_heads else [(3, 3)])
    for q_heads, kv_heads in counts:
        if (q_heads, kv_heads) != (base.q_heads, base.kv_heads):
            yield "heads", f"N = {q_heads}, K = {kv_heads}", (but(base, q_heads=q_heads, kv_heads=kv_heads),)


def _head_dims(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    dims = subject.can.head_dims or Dims()
    largest = _LARGEST_DIM if dims.maximum is None else dims.maximum
    asked = (dims.padded(1), dims.padded(20), dims.padded(64), largest - largest % dims.multiple_of)
    if subject.can.split_head_dim:
        wider = dims.padded(2 * base.head_dim) or base.head_dim
        for head_dim, value_dim in ((base.head_dim, wider), (wider, base.head_dim)):
            name = f"H = {head_dim}, D = {value_dim}"
            yield "head dims", name, (but(base, head_dim=head_dim, value_dim=value_dim, scale=None),)
    for dim in dict.fromkeys(dim for dim in asked if dim and dim != base.head_dim):
        yield "head dims", f"H = D = {dim}", (but(base, head_dim=dim, value_dim=dim, scale=None),)


def _unequal(base: AttentionCall) -> Iterator[Named]:
    for q_len, kv_len in ((base.q_len, 2 * base.kv_len), (2 * base.q_len, base.kv_len), (1, base.kv_len)):
        name = f"T = {q_len}, S = {kv_len}"
        sized = but(base, q_len=q_len, kv_len=kv_len)
        yield "lengths", name, (sized,)
        yield "lengths", f"{name}, causal", (but(sized, mask=Causal().at(query_offset=max(kv_len - q_len, 0))),)
    step = but(base, q_len=1, mask=Causal().at(query_offset=base.kv_len // 2))
    yield "lengths", "T = 1, causal amid the keys", (step,)


def _dtypes(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    for dtype in sorted(subject.can.dtypes - {base.dtype}):
        yield "dtypes", dtype, (but(masked(subject, base), dtype=dtype),)


def _modes(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    for mode in sorted(subject.can.modes - {base.mode}, key=lambda mode: mode.value):
        one, many = but(base, mode=mode, q_len=1), but(masked(subject, base), mode=mode)
        yield "modes", mode.value, (one, many) if mode is Mode.DECODE else (many, one)


def _masks(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    for kind in sorted(subject.can.atoms, key=lambda kind: kind.value):
        drawn = samples.samples(kind, base).items()
        for name, alternatives in itertools.islice(drawn, 1 if subject.quick else None):
            yield "masks", name, tuple(but(base, mask=mask) for mask in alternatives)


def _positions(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    for kind in sorted(subject.can.positions - {PositionKind.DEFAULT}, key=lambda kind: kind.value):
        served = [
            (f"{name} at {where}", tuple(but(base, mask=mask) for mask in alternatives))
            for name, plain in samples.positional(base).items()
            if subject.serves(but(base, mask=plain)) or name == "causal"
            for where, alternatives in samples.placed(kind, plain, base)
        ]
        kept = [(name, calls) for name, calls in served if subject.first(calls)] or served[:1]
        for name, calls in kept[: 2 if subject.quick else None]:
            yield "positions", name, calls


def _features(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    can, causal = subject.can.features, masked(subject, base)
    batch, heads, q_len, kv_len = base.batch, base.q_heads, base.q_len, base.kv_len
    if Feature.BIAS in can:
        yield "bias", "bias for every pair", (but(causal, bias=base.pairs),)
        yield "bias", "slots biased by −1e9", (but(base, bias=base.pairs, biased_out=-1e9),)
        for shape in ((1, heads, q_len, kv_len), (batch, 1, 1, kv_len), (1, 1, q_len, 1)):
            yield "bias", f"bias of shape {shape}", (but(causal, bias=shape),)
        yield "bias", "slots biased by −inf", (but(base, bias=base.pairs, biased_out=-np.inf),)
    if Feature.SOFT_CAP in can:
        yield "soft cap", "soft cap", (but(causal, soft_cap=1.2),)
        yield "soft cap", "a soft cap of 30", (but(causal, soft_cap=30.0, magnitude=MAGNITUDE),)
    if Feature.BIAS_AFTER_CAP in can:
        late = after_cap(base)
        yield "bias after cap", "a bias after the soft cap", (but(causal, **late),)
        yield "bias after cap", "slots biased by −1e9 after the soft cap", (but(base, **late, biased_out=-1e9),)
    if Feature.SINKS in can:
        yield "sinks", "sinks", (but(causal, sinks=True),)
        yield "sinks", "sinks of ±40, logits of ±180", (but(causal, sinks=True, magnitude=MAGNITUDE),)
    if Feature.MAX_LOGITS in can:
        yield "max logits", "max logits", (but(causal, max_logits=True),)
        yield "max logits", "max logits around −130", (but(causal, max_logits=True, level=LEVEL),)
    if Feature.PRECISION in can:
        yield "precision", "highest precision", (but(causal, precision="highest"),)
    if Feature.LOGITS_DTYPE in can:
        yield "logits dtype", "bfloat16 logits", (but(causal, logits_dtype="bfloat16"),)
    for name in sorted(subject.can.normalizations - {base.normalization}):
        if name in ("softmax", "softmax_max_sum"):  # what the oracle knows
            yield "normalizations", name, (but(causal, normalization=name),)


def _gradients(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    if base.mode is not Mode.TRAIN:
        return
    causal = masked(subject, base)
    wanted = sorted(base.wanted, key=lambda operand: operand.value)
    for operand in wanted[: 1 if subject.quick else None]:
        yield "gradients", f"the gradient of {operand.value} alone", (but(causal, gradients=frozenset({operand})),)
    if Feature.BIAS in subject.can.features and not subject.quick:
        constant = base.gradients - {Operand.BIAS}
        yield "gradients", "a constant bias", (but(causal, gradients=constant, bias=(1, *base.pairs[1:])),)


def _edges(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    if subject.can.empty_arrays:
        for name in ("batch", "q_len", "kv_len"):
            yield "empty arrays", f"{name} = 0", (but(base, **{name: 0}), but(base, q_len=0, kv_len=0))
    drawn = {name: tuple(but(base, mask=mask) for mask in calls) for name, calls in samples.emptying(base).items()}
    served = [(name, call) for name, calls in drawn.items() if (call := subject.first(calls))]
    most = 2 if subject.quick else len(served)
    for name, call in [(n, c) for n, c in served if MaskedOut.of(c).queries.any()][:most]:
        if subject.can.empty_rows:
            yield "empty rows", f"empty rows: {name}", (call,)
    first = tuple(call for _, call in served)  # none where such masks hide slots, too, and an adapter must clean those
    if first and subject.can.empty_rows and Feature.SINKS in subject.can.features:
        yield "empty rows", "empty rows with sinks", tuple(but(call, sinks=True) for call in first)
    if first and subject.can.empty_rows and Feature.MAX_LOGITS in subject.can.features:
        blank = [call for call in first if MaskedOut.of(call).queries.all(axis=1).any()]
        yield (
            "max logits",
            "max logits where nothing is visible",
            tuple(but(c, max_logits=True) for c in blank or first),
        )
    for name, call in [(n, c) for n, c in served if MaskedOut.of(c).slots.any()][:most]:
        if subject.can.clean_hidden_slots:
            yield "hidden slots", f"NaN in hidden slots: {name}", (but(call, poison=True),)


def _combinations(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    kinds: Iterable[AtomKind] = (AtomKind.SEGMENTS, AtomKind.LENGTHS, AtomKind.DENSE, AtomKind.SPANS, AtomKind.CHUNKED)
    bands: tuple[Mask, ...] = (Causal(), *samples.samples(AtomKind.WINDOW, base)["window"])
    for kind in [kind for kind in kinds if kind in subject.can.atoms][: 1 if subject.quick else 5]:
        name, (other, *_) = next(iter(samples.samples(kind, base).items()))
        yield "combinations", f"band & {name}", tuple(but(base, mask=band & other) for band in reversed(bands))
    call, names = together(subject, masked(subject, base))
    if len(names) > 1:
        yield "combinations", "every feature at once", (call,)


def after_cap(call: AttentionCall) -> dict[str, Any]:
    """What makes a call one with a bias for every pair, after a soft cap."""
    return {"bias": call.pairs, "soft_cap": 1.2, "bias_after_cap": True}


def feature_changes(call: AttentionCall) -> dict[str, dict[str, Any]]:
    """What each feature that has a formula changes in a call, by name."""
    return {
        "soft cap": {"soft_cap": 3.0},
        "bias": {"bias": (1, *call.pairs[1:])},
        "sinks": {"sinks": True},
        "max logits": {"max_logits": True},
    }


def together(subject: Subject, call: AttentionCall) -> tuple[AttentionCall, tuple[str, ...]]:
    """All features that go together, added one by one as far as they are served, and their names."""
    names: tuple[str, ...] = ()
    for name, change in feature_changes(call).items():
        more = but(call, **change)
        if subject.serves(more):
            call, names = more, (*names, name)
    return call, names


def why_not_float64(call: AttentionCall) -> str | None:
    """Says why a call cannot be made as long as 64-bit types are off."""
    wide = "float64" in (call.dtype, call.logits_dtype)
    off = jax.dtypes.canonicalize_dtype(np.float64) != np.float64
    return "float64 needs 64-bit types, which are off: set JAX_ENABLE_X64=1" if wide and off else None
