"""Statistics, and the laws of merging: parts over split keys make the whole, and an empty part changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.execution.attend import BoundKernel, attend
from kernelry.execution.normalization import finalize, merge, to_lse
from kernelry.kernel.capabilities import Feature, Gradient, Statistic
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import Inputs
from kernelry.masks import Causal, Dense, Lengths, Mask, Segments
from kernelry.testing.conformance import samples
from kernelry.testing.conformance.bench import Answer, Bench, compile_quickly
from kernelry.testing.conformance.calls import QKV, AttentionCall
from kernelry.testing.conformance.compare import close, oracle, tolerance_for, verify
from kernelry.testing.conformance.positive import LEVEL, MAGNITUDE, Named, after_cap, but, forms, masked
from kernelry.testing.conformance.report import Case, Skip
from kernelry.testing.conformance.subject import Subject


def statistics_calls(subject: Subject, base: AttentionCall) -> Iterator[Named]:
    """Calls that return a Partial: with gradients through lse where declared, else forward."""
    if not subject.can.statistics:
        return
    causal = masked(subject, base)
    yield "statistics", "lse", forms(causal, partial=True)
    if subject.can.empty_rows:
        drawn = (mask for masks in samples.emptying(base).values() for mask in masks)
        empty = tuple(call for mask in drawn for call in forms(base, partial=True, mask=mask))
        yield "statistics", "lse of empty rows", empty
    if Feature.SOFT_CAP in subject.can.features:
        yield "statistics", "lse under a soft cap", forms(causal, partial=True, soft_cap=1.2)
    if Feature.BIAS in subject.can.features:
        yield "statistics", "lse with bias", forms(causal, partial=True, bias=base.pairs)
    if Feature.BIAS_AFTER_CAP in subject.can.features:
        yield "statistics", "lse of a bias after the soft cap", forms(causal, partial=True, **after_cap(base))
    yield "statistics", "lse of logits of ±180", forms(causal, partial=True, magnitude=MAGNITUDE)
    yield "statistics", "lse of logits around −130", forms(causal, partial=True, level=LEVEL)


def partial_cases(subject: Subject, base: AttentionCall) -> Iterator[Case]:
    """A case for each law."""
    if not subject.can.statistics:
        return
    [whole, forward] = forms(base, partial=True)
    call = whole if subject.serves(whole) else forward
    bench = subject.bench
    for statistic in sorted(subject.can.statistics, key=lambda statistic: statistic.value):
        yield Case(
            f"a Partial holds {statistic.value}", "statistics", functools.partial(_returns, bench, forward, statistic)
        )
    if base.page_size is None:  # pages are not cut in two like arrays
        both = base.mask, base.mask
        yield Case("two parts merge into the whole", "merge laws", functools.partial(_merges, bench, call, both))
    if base.page_size is not None or (subject.quick and subject.is_slow):
        return
    placed = (Causal(), Causal().at(kv_offset=base.kv_len))
    if all(subject.serves(but(call, mask=mask)) for mask in placed):
        yield Case(
            "two causal parts merge into the whole", "merge laws", functools.partial(_merges, bench, call, placed)
        )
    own = but(base, partial=False)
    shared = Causal(), Causal().at(kv_offset=base.kv_len // 2)
    differentiates = own.wanted and subject.can.gradient is Gradient.BACKWARD and subject.can.empty_rows
    if differentiates and all(subject.serves(but(own, mask=mask)) for mask in shared):
        yield Case(
            "parts of one backward, with empty rows", "merge laws", functools.partial(_one_backward, bench, own, shared)
        )
    empty = subject.first(but(call, mask=masks) for masks in _nothing(base))
    if empty is not None and subject.can.empty_rows:
        yield Case("an empty part changes nothing", "merge laws", functools.partial(_identity, bench, call, empty.mask))


def _nothing(call: AttentionCall) -> Iterator[Mask]:
    yield Causal().at(query_offset=-call.q_len)
    yield Segments(np.full(call.q_len, -1, np.int32))
    yield Lengths(np.zeros(call.batch, np.int32))
    yield Dense(np.zeros((1, 1, call.q_len, call.kv_len), bool))


def _returns(bench: Bench, call: AttentionCall, statistic: Statistic) -> None:
    program = bench.compiled(lambda arrays, mask: bench.attend(call, arrays, mask), call.arrays(), call.mask)
    partial: Partial = program(call.arrays(), call.mask)
    found = ("lse",) if partial.lse is not None else ("max", "sum") if partial.max is not None else ()
    assert found, f"it declares {statistic.value} and returned no statistics"
    many = len(bench.spec.capabilities.statistics) > 1
    wanted = ("lse",) if statistic is Statistic.LSE else ("max", "sum")
    assert many or found == wanted, f"it declares {statistic.value} and returned {', '.join(found)}"
    if partial.max is not None:
        assert partial.sum is not None, "it returned max without sum"
    close("lse", to_lse(partial).lse, oracle(call).lse, tolerance_for(bench.spec.capabilities, call).forward)


def _merges(bench: Bench, call: AttentionCall, placed: tuple[Mask, Mask]) -> None:
    """Keys split in two, each part by the kernel, merged: out, lse and gradients are those of the whole."""
    length = call.kv_len
    mask = call.mask if placed[0] is placed[1] else Causal().at(query_offset=0)
    whole = but(call, kv_len=2 * length, mask=mask)
    arrays, cotangents = whole.arrays(), whole.cotangents()

    def forward(moving: dict[str, Any], masks: Any) -> Any:
        parts = []
        for index, part in enumerate(masks):
            slots = slice(index * length, (index + 1) * length)
            own = {name: array[:, slots] if name in ("key", "value") else array for name, array in moving.items()}
            parts.append(bench.attend(call, own, part))
        merged = to_lse(merge(parts))
        return {"out": finalize(merged), "lse": merged.lse}

    verify(_answer(bench, call, forward, arrays, placed, cotangents), oracle(whole), whole, _tolerance(bench, call))


def _one_backward(bench: Bench, call: AttentionCall, placed: tuple[Mask, Mask]) -> None:
    """Keys split in two, with the out and lse of the whole in each part's backward: +inf where a part is empty."""
    if bench.host.why_not is not None:
        raise Skip(bench.host.why_not)
    length = call.kv_len
    positions = np.concatenate([np.arange(length), np.arange(length) + length // 2])
    whole = but(call, kv_len=2 * length, mask=Causal().at(query_offset=0, kv_positions=positions))
    arrays, cotangents = whole.arrays(), whole.cotangents()
    parts = []
    for mask in placed:
        request = but(call, mask=mask).request(bench.host)
        parts.append(BoundKernel(bench.spec, request, bench.spec.tilings(request)[0]))

    def forward(moving: dict[str, Any]) -> Any:
        query, *kv = (moving[name] for name in QKV)
        halves = zip(*(jnp.split(array, 2, axis=1) for array in kv), strict=True)
        given = [Inputs(query, key, value, mask.canonical()) for (key, value), mask in zip(halves, placed, strict=True)]
        return finalize(attend(tuple(parts), tuple(given), sinks=None, statistics=False))

    def program(arrays: dict[str, Any], d_out: Any) -> Any:
        out, pull = jax.vjp(forward, arrays)
        return out, pull(d_out)[0]

    with bench.host.entered(bench.spec):
        lowered = jax.jit(program).lower(arrays, cotangents["out"])
        compiled = compile_quickly(lowered, bench.host.target.platform)
    out, gradients = compiled(arrays, cotangents["out"])
    wanted = {operand.value: gradients[operand.value] for operand in whole.wanted}
    verify(Answer(out, None, None, wanted), oracle(whole), whole, _tolerance(bench, call))


def _identity(bench: Bench, call: AttentionCall, nothing: Mask) -> None:
    def forward(moving: dict[str, Any], masks: Any) -> Any:
        parts = [bench.attend(call, moving, mask) for mask in masks]
        merged = to_lse(merge(parts))
        return {"out": finalize(merged), "lse": merged.lse}

    placed = (call.mask, nothing)
    found = _answer(bench, call, forward, call.arrays(), placed, call.cotangents())
    verify(found, oracle(call), call, _tolerance(bench, call))


def _answer(
    bench: Bench, call: AttentionCall, forward: Callable[..., Any], arrays: Any, masks: Any, cotangents: Any
) -> Answer:
    wanted = sorted(operand.value for operand in call.wanted)

    def program(arrays: Any, masks: Any, cotangents: Any) -> Any:
        moving = {name: arrays[name] for name in wanted}
        returned, pull = jax.vjp(lambda moving: forward(arrays | moving, masks), moving)
        return Answer(returned["out"], returned["lse"], None, pull(cotangents)[0] if wanted else {})

    answer: Answer = bench.compiled(program, arrays, masks, cotangents)(arrays, masks, cotangents)
    assert bool(jnp.isfinite(answer.out).all()), "out is not finite"
    return answer


def _tolerance(bench: Bench, call: AttentionCall) -> Any:
    return tolerance_for(bench.spec.capabilities, call)
