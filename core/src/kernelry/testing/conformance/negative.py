"""Calls that need one thing that a kernel does not declare: it must refuse each of them, with a reason."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax

from kernelry.errors import KernelRefusedError
from kernelry.kernel.capabilities import Capabilities, Feature, Gradient
from kernelry.kernel.refusal import RefusalCode
from kernelry.masks import AtomKind, Causal, PositionKind
from kernelry.request.checks import DTYPES
from kernelry.request.request import Mode, Operand
from kernelry.storage import INTERLEAVED, QUANTIZATIONS, SEPARATE, VALUE_IN_KEY
from kernelry.testing.conformance import samples
from kernelry.testing.conformance.bench import Bench
from kernelry.testing.conformance.calls import AttentionCall
from kernelry.testing.conformance.positive import after_cap, but, why_not_float64
from kernelry.testing.conformance.report import Case, Outcome, Skip, Verdict
from kernelry.testing.conformance.subject import Subject

Undeclared: TypeAlias = tuple[str, AttentionCall, RefusalCode]
"""What is not declared, a call that needs it, and the reason that must be among the refusals."""


def undeclared_calls(subject: Subject, base: AttentionCall) -> Iterator[Undeclared]:
    """Calls for everything that the kernel does not declare, of keys and values that are an array each."""
    base = base if base.page_size is None and base.kv_layout == SEPARATE else subject.plainest
    for part in (_kinds, _dims, _masks, _features, _results, _edges, _storage):
        yield from part(subject.can, base)


def negative_cases(subject: Subject, base: AttentionCall) -> Iterator[Case]:
    """A case for each thing that is not declared."""
    for name, call, code in undeclared_calls(subject, base):
        yield Case(f"refuses {name}", "refusals", functools.partial(_refuses, subject.bench, call, code))


def _refuses(bench: Bench, call: AttentionCall, code: RefusalCode) -> Verdict:
    if (why_not := why_not_float64(call)) is not None:
        raise Skip(why_not)
    arrays, rng = call.arrays(), jax.random.key(0) if call.dropout_rate else None
    with bench.host.entered(bench.spec):
        try:
            jax.eval_shape(lambda arrays: bench.attend(call, arrays, call.mask, rng), arrays)
        except KernelRefusedError as refused:
            return Outcome.REFUSED, _reasons(refused, code)
    raise AssertionError(f"it does not declare this, and served {call.request(bench.host)}")


def _reasons(refused: KernelRefusedError, code: RefusalCode) -> str:
    assert refused.resolution is not None, "the refusal carries no resolution"
    [candidate] = refused.resolution.candidates
    assert candidate.refusals, "it refused without a reason"
    found = {refusal.code for refusal in candidate.refusals}
    listed = "; ".join(str(refusal) for refusal in candidate.refusals)
    assert code in found, f"{code.value} is not among its reasons: {listed}"
    return listed


def _kinds(can: Capabilities, base: AttentionCall) -> Iterator[Undeclared]:
    for mode in Mode:
        if mode not in can.modes:
            yield f"mode {mode.value}", but(base, mode=mode, gradients=frozenset()), RefusalCode.MODE
    for dtype in DTYPES:
        if dtype not in can.dtypes:
            yield f"dtype {dtype}", but(base, dtype=dtype), RefusalCode.DTYPE
    for name in ("softmax", "softmax_max_sum"):
        if name not in can.normalizations:
            yield f"normalization {name}", but(base, normalization=name), RefusalCode.NORMALIZATION


def _dims(can: Capabilities, base: AttentionCall) -> Iterator[Undeclared]:
    dims = can.head_dims
    if dims is not None:
        outside = {dims.minimum - 1, *(() if dims.maximum is None else (dims.maximum + dims.multiple_of,))}
        outside |= {base.head_dim + 1} if dims.multiple_of > 1 else set()
        for dim in sorted(dim for dim in outside if dim > 0):
            yield f"head dim {dim}", but(base, head_dim=dim, value_dim=dim, scale=None), RefusalCode.HEAD_DIM
    if not can.split_head_dim:
        wider = (dims.padded(base.head_dim + 1) if dims else None) or base.head_dim + 8
        yield "H ≠ D", but(base, value_dim=wider), RefusalCode.SPLIT_HEAD_DIM
    if not can.grouped_heads:
        yield "grouped heads", but(base, q_heads=4, kv_heads=2), RefusalCode.HEAD_GROUPS
    if not can.unequal_lengths:
        yield "T ≠ S", but(base, kv_len=2 * base.kv_len), RefusalCode.UNEQUAL_LENGTHS
    if not can.empty_arrays:
        yield "an empty batch", but(base, batch=0), RefusalCode.EMPTY_ARRAY


def _masks(can: Capabilities, base: AttentionCall) -> Iterator[Undeclared]:
    for kind in AtomKind:
        drawn = samples.samples(kind, base)
        if kind not in can.atoms and drawn:
            name, (mask, *_) = next(iter(drawn.items()))
            yield f"mask {name}", but(base, mask=mask), RefusalCode.MASK_ATOM
    for position in (PositionKind.OFFSET, PositionKind.STATIC, PositionKind.TRACED):
        if position not in can.positions:
            name, (mask, *_) = next(samples.placed(position, Causal(), base))
            yield f"positions: {name}", but(base, mask=mask), RefusalCode.POSITIONS


def _features(can: Capabilities, base: AttentionCall) -> Iterator[Undeclared]:
    changes: dict[Feature, tuple[dict[str, Any], RefusalCode]] = {
        Feature.SCALE: ({"scale": 0.7}, RefusalCode.SCALE),
        Feature.BIAS: ({"bias": base.pairs}, RefusalCode.BIAS),
        Feature.SOFT_CAP: ({"soft_cap": 2.0}, RefusalCode.SOFT_CAP),
        Feature.BIAS_AFTER_CAP: (after_cap(base), RefusalCode.BIAS_AFTER_CAP),
        Feature.SINKS: ({"sinks": True}, RefusalCode.SINKS),
        Feature.DROPOUT: ({"dropout_rate": 0.25}, RefusalCode.DROPOUT),
        Feature.LOGITS_DTYPE: ({"logits_dtype": "bfloat16"}, RefusalCode.LOGITS_DTYPE),
        Feature.PRECISION: ({"precision": "highest"}, RefusalCode.PRECISION),
        Feature.MAX_LOGITS: ({"max_logits": True}, RefusalCode.MAX_LOGITS),
    }
    for feature in Feature:
        if feature not in can.features:
            change, code = changes[feature]
            yield feature.value, but(base, **change), code


def _results(can: Capabilities, base: AttentionCall) -> Iterator[Undeclared]:
    trained = but(base, mode=Mode.TRAIN)
    for operand in Operand:
        if can.gradient is Gradient.NONE or operand not in can.gradients:
            extra: dict[str, Any] = {"sinks": True} if operand is Operand.SINKS else {}
            if operand is Operand.BIAS:
                extra = {"bias": (1, *base.pairs[1:])}
            needs = but(trained, gradients=frozenset({operand}), **extra)
            yield f"the gradient of {operand.value}", needs, RefusalCode.GRADIENT
    if not can.statistics:
        yield "statistics", but(base, partial=True, gradients=frozenset()), RefusalCode.STATISTICS
    elif can.gradient is Gradient.BACKWARD and not can.lse_cotangent and base.wanted:
        yield "the gradient of lse", but(base, partial=True), RefusalCode.STATISTICS_GRADIENT


def _edges(can: Capabilities, base: AttentionCall) -> Iterator[Undeclared]:
    for name, masks in samples.emptying(base).items():
        for mask in masks[:1]:
            call, form = but(base, mask=mask), mask.form
            declared = {atom.kind for atom in form.atoms} <= can.atoms
            if not declared or form.position_kinds - {PositionKind.DEFAULT} - can.positions:
                continue
            if not can.empty_rows and form.may_have_empty_rows(call.q_len, call.kv_len):
                yield f"empty rows: {name}", call, RefusalCode.EMPTY_ROWS
            if not can.clean_hidden_slots and form.may_hide_slots(call.q_len, call.kv_len):
                yield f"hidden slots: {name}", but(call, poison=True), RefusalCode.HIDDEN_SLOTS


def _storage(can: Capabilities, base: AttentionCall) -> Iterator[Undeclared]:
    for way in sorted(QUANTIZATIONS - can.kv_quantizations):
        yield f"quantised keys: {way}", but(base, kv_quantization=way), RefusalCode.KV_QUANTIZATION
    paged = but(base, page_size=max(1, base.kv_len // 4))
    if not can.pages:
        yield "keys in pages", paged, RefusalCode.PAGES
    layouts = {SEPARATE: base, VALUE_IN_KEY: base, INTERLEAVED: paged}
    for layout in sorted(layouts.keys() - can.kv_layouts):
        yield f"kv_layout {layout}", but(layouts[layout], kv_layout=layout), RefusalCode.KV_LAYOUT
